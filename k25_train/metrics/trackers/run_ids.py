"""Under which name a service knows a run: kept in the run folder, so that a resumed run is one run there."""

from __future__ import annotations

import json
import os
from pathlib import Path


class RunId:
    """The file with the name that one service has for a run."""

    def __init__(self, folder: Path, service: str, where: str) -> None:
        """`where` in the service the run is: project or experiment. Elsewhere it has another name."""
        self.path = folder / f"{service}.json"
        self._where = where

    def load(self) -> str | None:
        """The name; None if the run is not there yet, or the file is damaged."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        is_ours = isinstance(found, dict) and found.get("where") == self._where
        return found["id"] if is_ours and isinstance(found.get("id"), str) and found["id"] else None

    def save(self, name: str) -> None:
        """Keep the name. Raises OSError."""
        scratch = self.path.with_suffix(".tmp")
        scratch.write_text(json.dumps({"where": self._where, "id": name}) + "\n", encoding="utf-8")
        os.replace(scratch, self.path)
