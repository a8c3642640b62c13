"""Pages opened in headless Chromium: what it measures, asks for and complains about, and what it shows."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
NONE = f"no browser: install one of {', '.join(NAMES)}, or set CHROMIUM to its path"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run", "--disable-extensions")
FRAME = """<!doctype html><body style="margin:0">
<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe>
<script>
const frame = document.querySelector("iframe");
window.onload = () => {{
  const page = frame.contentDocument.documentElement, inside = frame.contentWindow;
  const broken = [...page.querySelectorAll("img")].filter(each => !each.naturalWidth).length;
  const asked = inside.performance.getEntriesByType("resource").map(each => each.name);
  document.body.innerHTML = "<pre>" + JSON.stringify({{width: page.scrollWidth, asked, broken}})
    .replace(/&/g, "&amp;").replace(/</g, "&lt;") + "</pre>";
}};
</script>"""


@dataclass(frozen=True)
class Seen:
    """A page in a frame of some width: how wide its content is, and what went wrong."""

    width: int
    asked: list[str]
    """Addresses that the page loaded something from; data URIs are none."""
    broken: int
    """Pictures that could not be shown."""
    console: list[str]
    """Errors and warnings, of the page's policy too."""


def browser() -> str | None:
    """Path of Chromium or Chrome, if there is one."""
    named = os.environ.get("CHROMIUM")
    return named or next((path for name in NAMES if (path := shutil.which(name))), None)


def look(page: Path, width: int, scratch: Path) -> Seen:
    """Open `page` in a frame `width` pixels wide, as windows cannot be as narrow as a phone."""
    frame = scratch / "frame.html"
    frame.write_text(FRAME.format(width=width, page=escape(page.read_text(encoding="utf-8"))), encoding="utf-8")
    done = _run(scratch, "--enable-logging=stderr", "--virtual-time-budget=4000", "--dump-dom", frame.resolve().as_uri())
    report = json.loads(unescape(re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)[1]))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(report["width"], report["asked"], report["broken"], console)


def picture(page: Path, file: Path, scratch: Path, width: int = 1200, height: int = 900, dark: bool = False) -> None:
    """A PNG of the top of the page."""
    scheme = ("--blink-settings=preferredColorScheme=0",) if dark else ()
    _run(scratch, *scheme, f"--window-size={width},{height}", f"--screenshot={file}", page.resolve().as_uri())


def _run(scratch: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(browser()), *FLAGS, f"--user-data-dir={scratch / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
