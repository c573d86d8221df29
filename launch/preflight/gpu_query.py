"""Questions to nvidia-smi, and values in the spellings of its versions.

A value that a GPU or driver does not have reads `N/A`, `[N/A]`, `[Not Supported]`, `[Unknown Error]` or
`Requested functionality has been deprecated`; each of them becomes None.
"""

import csv
import re
from collections.abc import Sequence

from launch.preflight.system import BrokenError, System


def query(system: System, what: str, fields: Sequence[str]) -> list[dict[str, str]]:
    """Field -> value for each GPU, from `nvidia-smi --query-WHAT`.

    Raises:
        AbsentError: nvidia-smi is not installed.
        BrokenError: nvidia-smi fails, does not know a field, or prints something unexpected.
    """
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    rows = []
    for cells in csv.reader(system.run(command).splitlines(), skipinitialspace=True):
        if len(cells) != len(fields):
            raise BrokenError(f"{' '.join(command)}: printed {cells!r}; expected {len(fields)} values")
        rows.append(dict(zip(fields, (cell.strip() for cell in cells), strict=True)))
    return rows


def required_int(text: str, base: int = 10) -> int:
    """An integer without which nothing makes sense. Raises `BrokenError`."""
    try:
        return int(text, base)
    except ValueError as error:
        raise BrokenError(f"nvidia-smi printed {text!r} where a number was expected") from error


def number(text: str) -> float | None:
    """The number at the start of a value such as `700.00 W`, `16x` or `3`; None if it is none."""
    found = re.match(r"\d+(\.\d+)?", text)
    return float(found[0]) if found else None


def whole(text: str) -> int | None:
    """As `number`, for counts."""
    found = number(text)
    return None if found is None else int(found)


def switch(text: str) -> bool | None:
    """On or off, in the spellings of different driver versions."""
    return {"enabled": True, "yes": True, "1": True, "disabled": False, "no": False, "0": False}.get(
        text.lower()
    )
