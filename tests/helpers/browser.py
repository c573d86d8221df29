"""A real browser, headless, for pages that people look at."""

import html
import os
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
"""Path of one that is installed; empty without."""


def opened(page: Path, script: str, profile: Path, *, width: int | None = None, is_dark: bool = False) -> str:
    """What a browser makes of a page: its document after loading, as HTML, with what `script` wrote into it.

    Skips the test where there is no browser, unless in continuous integration; fails if the page has the
    browser complain.

    Args:
        page: the file.
        script: run at the end of the page.
        profile: folder of the browser's own files.
        width: pixels of a frame around the page, in whose `top` document the script leaves what it saw: a
            window cannot be as narrow as a telephone. Without, the page is that document.
        is_dark: whether the reader prefers dark colours.
    """
    if not BROWSER:
        assert not os.environ.get("CI"), "no browser: .ci/run installs chromium"
        pytest.skip("no chromium on PATH")
    copy = page.with_name("opened_" + page.name)
    text = page.read_text(encoding="utf-8") + f"<script>{script}</script>"
    if width is not None:
        style = f"width:{width}px;height:800px;border:0"
        text = f'<!doctype html><iframe style="{style}" srcdoc="{html.escape(text)}"></iframe>'
    copy.write_text(text, encoding="utf-8")
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
        *("--enable-logging=stderr", f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"),
        *("--window-size=1200,900", "--virtual-time-budget=5000", "--dump-dom", copy.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]
    assert not complaints, complaints
    return done.stdout
