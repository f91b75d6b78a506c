# Shared by the scripts beside it: the repository's own Python environment, .venv, with pinned packages.
#
#   PYTHON          the interpreter to build it with (python3 and newer names are tried otherwise)
#   TORCH_INDEX     where CPU-only machines look for torch without CUDA packages; empty to look nowhere else

MINIMUM_PYTHON="3.11"
TORCH_INDEX="${TORCH_INDEX-https://download.pytorch.org/whl/cpu}"

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# The first Python that is new enough, by path.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c "import sys; sys.exit(sys.version_info < (${MINIMUM_PYTHON/./, }))" 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    fail "needs Python $MINIMUM_PYTHON or newer; ${PYTHON:-python3} is $("${PYTHON:-python3}" --version 2>&1 | head -n 1). \
Install one (Debian, Ubuntu: apt install python3 python3-venv), or name it: PYTHON=/path/to/python3 $0"
}

# Debian splits ensurepip off into python3-venv; where only pip is there, pip installs itself into the environment.
make_venv() {
    local python="$1"
    "$python" -m venv .venv >/dev/null 2>&1 && return
    rm -rf .venv
    "$python" -m venv --without-pip .venv || fail "$python cannot make a virtual environment: install python3-venv"
    "$python" -m pip --quiet --python .venv/bin/python install pip \
        || fail "$python has neither ensurepip nor pip: install python3-venv or python3-pip"
}

# On Linux without an NVIDIA GPU, torch's own index has a build that is a tenth of the size. Asked first, as an index
# that cannot be reached would hold pip up for minutes. torch_index_options [ENVIRONMENT].
torch_index_options() {
    [[ -n "$TORCH_INDEX" && "$(uname -s)" == Linux && ! -e /dev/nvidiactl ]] || return 0
    if "${1:-.venv}/bin/python" -c "import urllib.request as r; r.urlopen('$TORCH_INDEX/torch/', timeout=5)" 2>/dev/null; then
        printf '%s\n' --extra-index-url "$TORCH_INDEX"
    fi
}

# ensure_venv EXTRA: .venv holds this package with that extra; does nothing when that is so already.
ensure_venv() {
    local extra="$1" python stamp wanted
    stamp=".venv/installed-$extra"
    wanted="$PWD $(cat pyproject.toml requirements/constraints.txt | cksum)"
    [[ -x .venv/bin/python && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]] && return
    python="$(find_python)"
    if ! [[ -x .venv/bin/python ]] || ! .venv/bin/python -c pass 2>/dev/null; then
        echo "making .venv with $("$python" --version)"
        rm -rf .venv
        make_venv "$python"
    fi
    install_packages "$extra"
    echo "$wanted" >"$stamp"
    [[ "$extra" != dev ]] || cp "$stamp" .venv/installed-demo # dev holds all of demo
}

# install_packages EXTRA: pip's own words go to a log, of which large downloads are shown as they come.
install_packages() {
    local log=".venv/install.log"
    echo "installing pinned packages into .venv (the first time takes minutes: torch is large)"
    # shellcheck disable=SC2046  # options, one per word
    .venv/bin/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
        $(torch_index_options) -c requirements/constraints.txt -e ".[$1]" 2>&1 \
        | tee "$log" | { grep --line-buffered -oE 'Downloading .*[0-9] [MG]B|^(Building|Installing) .{1,60}' || true; } \
        || { tail -n 15 "$log" >&2; fail "pip could not install the packages; all it said is in $PWD/$log"; }
}
