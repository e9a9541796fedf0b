"""The page in a real browser: nothing in the console, nothing wider than a phone, in the light and in the dark."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from fake_runs import make_run

from keeplora.report import render_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine")

# Run inside the page (its policy, which forbids scripts, is taken out of the copy): open every fold, then measure.
MEASURE = """<script>
document.querySelectorAll('details').forEach(d => d.open = true);
const width = document.documentElement.clientWidth, wide = [];
document.querySelectorAll('body *').forEach(e => {
  const box = e.getBoundingClientRect();
  // An element's text may stick out of its box.
  const text = e instanceof HTMLElement && e.clientWidth ? box.left + e.scrollWidth : 0;
  const right = Math.max(box.right, text);
  if (right > width + 1 && !e.closest('.scroll, .skip')) wide.push(e.tagName + '.' + e.className);
});
const heights = [...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height);
const small = heights.filter(h => h && h < 10).length;
const found = {width, scroll: document.documentElement.scrollWidth, wide, small,
  scrolled: [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.ariaLabel),
  columns: [...document.querySelectorAll('div.grid')].map(g => getComputedStyle(g).gridTemplateColumns.split(' ').length),
  dark: getComputedStyle(document.body).backgroundColor, charts: document.querySelectorAll('figure svg').length};
window.parent.document.title = JSON.stringify(found);
</script>"""


def browse(page: str, tmp_path: Path, *, width: int, dark: bool = False, measure: str = MEASURE) -> tuple[dict, str]:
    """Show ``page`` in a frame ``width`` pixels wide (a headless window cannot be that narrow); measurements and console."""
    frame = tmp_path / "frame.html"
    inner = html.escape(
        re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", measure + "</body>")
    )
    frame.write_text(
        f'<iframe style="border:0;width:{width}px;height:3000px" srcdoc="{inner}"></iframe>', encoding="utf-8"
    )
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,3000", "--hide-scrollbars", "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    if dark:
        command.insert(1, "--blink-settings=preferredColorScheme=0")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(title[1])), console


@pytest.fixture
def page(tmp_path: Path) -> str:
    long = [
        "emoji",
        "Verkehrszeichenerkennungsaufgabe_ohne_Leerzeichen",
        "digits 0-9",
        "textile defects",
        "clip-art",
        "six",
    ]
    path = make_run(
        tmp_path / "runs", "kpp", tasks=long, warnings=["w" * 120], error="/a/very/long/path" * 12, state="failed"
    )
    make_run(tmp_path / "runs", "lora", "lora", tasks=long)
    return render_report(path).read_text(encoding="utf-8")


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, False)])
def test_fits_and_is_quiet(page: str, tmp_path: Path, width: int, dark: bool) -> None:
    found, console = browse(page, tmp_path, width=width, dark=dark)
    assert console == ""
    assert found["width"] == width
    assert found["scroll"] <= width, found["wide"]
    assert found["wide"] == []
    assert found["charts"] > 10
    assert found["small"] == 0
    assert found["dark"] == ("rgb(15, 19, 24)" if dark else "rgb(244, 246, 249)")


def test_tables_take_the_width_that_there_is(page: str, tmp_path: Path) -> None:
    wide, _ = browse(page, tmp_path, width=1400)
    assert not [name for name in wide["scrolled"] if name.startswith(("Methods", "Accuracy", "Data"))]
    middle, _ = browse(page, tmp_path, width=700)
    assert set(middle["columns"]) == {2}  # charts side by side, not one in two thirds of the width
    assert any(name.startswith("Methods") for name in browse(page, tmp_path, width=390)[0]["scrolled"])


def test_the_check_itself_sees_overflow_and_console_errors(page: str, tmp_path: Path) -> None:
    bad = page.replace(
        "<main", '<div class="bar" style="width:500px">x</div><script>console.error("seen")</script><main', 1
    )
    found, console = browse(bad, tmp_path, width=390)
    assert found["scroll"] > 390
    assert "DIV.bar" in found["wide"]
    assert "seen" in console


def test_the_real_page_with_its_policy_is_quiet(page: str, tmp_path: Path) -> None:
    """As a person opens it: the policy in place, no frame, no measuring script."""
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr
    assert "</footer>" in done.stdout
