"""Documentation that follows from the code is current, and what the rest names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from slime_async.config.fields import PASS_THROUGH, fields, sections
from tests.docs.pages import PAGES, ROOT, prose

LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")


def test_generated_pages_are_current() -> None:
    argv = [sys.executable, "scripts/generate_docs.py", "--check"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{page.name} links to {target}"


# in tasks.md, `task` is the object that an episode gets
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "tasks.md"], ids=lambda page: page.name)
def test_configuration_keys_that_a_page_names_exist(page: Path) -> None:
    keys = {field.key for field in fields()} | set(sections())
    names = "|".join([*sections(), *PASS_THROUGH])
    for named in re.findall(rf"`({names})\.([a-z_]+)(?: = [^`]*)?`", prose(page)):
        key = ".".join(named)
        assert named[0] in PASS_THROUGH or key in keys or named[1] in ("py", "md", "toml", "json", "html"), (
            f"{page.name}: {key}"
        )
