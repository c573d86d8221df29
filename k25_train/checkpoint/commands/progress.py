"""How far a command has read, with its pace."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[[int], None]
"""Called with the bytes that were read since the last call."""


@contextmanager
def reading(console: Console, what: str, num_bytes: int, *, is_quiet: bool = False) -> Iterator[Advance]:
    """A bar of bytes, GB/s and the time that is left, on a terminal; nothing elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=is_quiet or not console.is_terminal) as bar:
        task = bar.add_task(escape(what), total=num_bytes)
        yield lambda more: bar.update(task, advance=more)
