"""A real browser, headless, for pages that people look at."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
"""Path of one that is installed; empty without."""


def opened(page: Path, script: str, profile: Path) -> str:
    """What a browser makes of a page: its document after loading, as HTML, with what `script` wrote into it.

    Skips the test where there is no browser, unless in continuous integration.
    """
    if not BROWSER:
        assert not os.environ.get("CI"), "no browser: .ci/run installs chromium"
        pytest.skip("no chromium on PATH")
    copy = page.with_name("opened_" + page.name)
    copy.write_text(page.read_text(encoding="utf-8") + f"<script>{script}</script>", encoding="utf-8")
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
        *("--window-size=1200,900", "--virtual-time-budget=5000", "--dump-dom", copy.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
