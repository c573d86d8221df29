"""A Python of its own with packages that this project's exclude."""

import subprocess
import sys
from pathlib import Path

UV = Path(sys.executable).with_name("uv")


def foreign_python(folder: Path, *requirements: str) -> Path:
    """A new virtual environment with them; its Python."""
    base = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    python = folder / "bin" / "python"
    if not python.exists():
        for command in (
            ["venv", "-q", "-p", str(base), str(folder)],
            ["pip", "install", "-q", "-p", str(python), *requirements],
        ):
            subprocess.run([str(UV), *command], check=True, capture_output=True, timeout=600)
    return python
