"""The report in a real browser: nothing wider than a narrow window, no error, no request."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from slime_async.report.page import render
from slime_async.report.run import read_run
from tests.report.runs import write_run

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
TIMEOUT_S = 100

FRAME = """<!doctype html><body><iframe id="f" style="width:{width}px;height:900px" srcdoc="{page}"></iframe>
<script>
const errors = [];
const frame = document.getElementById("f");
frame.addEventListener("load", () => {{
  const page = frame.contentDocument;
  const svg = page.querySelector("svg[data-x]");
  const box = svg.getBoundingClientRect();
  const move = {{clientX: box.left + box.width / 2, clientY: box.top + 5}};
  svg.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", move));
  document.body.dataset.found = JSON.stringify({{
    wide: page.documentElement.scrollWidth,
    figures: page.querySelectorAll("figure svg").length,
    readout: page.querySelector("output").textContent,
  }});
}});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
@pytest.mark.parametrize("width", [340, 1280])
def test_a_report_fits_its_window_and_reads_out_values(tmp_path: Path, width: int) -> None:
    assert BROWSER is not None
    page = render([read_run(write_run(tmp_path / "run"))])
    (tmp_path / "frame.html").write_text(FRAME.format(width=width, page=escape(page)))
    argv = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    argv += ["--virtual-time-budget=10000", "--dump-dom", f"file://{tmp_path / 'frame.html'}"]
    dom = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=True).stdout
    [found] = re.findall(r'data-found="([^"]*)"', dom)
    measured = json.loads(unescape(found))
    assert measured["wide"] <= width
    assert measured["figures"] >= 15
    assert measured["readout"].startswith("value 0.")
