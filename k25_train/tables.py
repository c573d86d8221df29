"""Tables of results that fit the width of a terminal."""

from collections.abc import Collection, Mapping, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_ANY_WIDTH = Console(width=10_000)


def fitting_table(
    title: str,
    rows: Sequence[Mapping[str, str]],
    width: int,
    *,
    least: Sequence[str] = (),
    left: Collection[str] = (),
    wraps: Collection[str] = (),
) -> Table:
    """A table without as many of its `least` important columns, the first ones first, as `width` asks for.

    Args:
        title: what it shows.
        rows: name of a column -> text, in the order of columns.
        width: characters that it may have.
        least: columns that may be left out, which the caption then says.
        left: columns of words, aligned to the left; others are numbers.
        wraps: columns whose texts may take several lines.
    """
    for number in range(len(least) + 1):
        out = [name for name in least[:number] if rows and name in rows[0]]
        table = _plain(title)
        for name in rows[0] if rows else ():
            if name not in out:
                table.add_column(
                    name,
                    justify="left" if name in left else "right",
                    no_wrap=name not in wraps,
                    overflow="fold",
                )
        for row in rows:
            table.add_row(*(escape(value) for name, value in row.items() if name not in out))
        if out:
            table.caption = f"no room for {', '.join(out)}"
        if _ANY_WIDTH.measure(table).maximum <= width:
            break
    return table


def _plain(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
