# Sourced by the other scripts: makes .venv next to the project and installs into it what is asked for.
#
#   use_venv EXTRA     e.g. use_venv demo; afterwards .venv is active
#
# A stamp remembers what was installed, so that the second call takes no time. SLIME_ASYNC_VENV names another folder,
# PYTHON another interpreter.

use_venv() {
    local extra=$1 python=${PYTHON:-python3} venv=${SLIME_ASYNC_VENV:-.venv}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "slime_async needs Python 3.11 or newer; '$python' is $("$python" --version 2>&1). Set PYTHON to another one." >&2
        exit 1
    fi
    if [ ! -x "$venv/bin/python" ]; then
        echo "making a virtual environment in $venv" >&2
        "$python" -m venv "$venv"
    fi
    # shellcheck disable=SC1091
    . "$venv/bin/activate"
    local stamp="$venv/installed-$extra" wanted
    wanted=$(cat pyproject.toml requirements/constraints.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing slime_async[$extra] and what it needs (minutes the first time; torch is the largest part)" >&2
        python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt torch
        python -m pip install --quiet --disable-pip-version-check -c requirements/constraints.txt -e ".[$extra]"
        echo "$wanted" >"$stamp"
    fi
}
