"""Tables of sources: what they have and how they will be used, before a run; what they gave, at its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from k25_train.data.served import SourceSummary
from k25_train.metrics.mix_plot import TOKENS, sources_of
from k25_train.metrics.sinks import Row, number

EPOCHS = "source_epochs/"


def table_before(sources: Sequence[SourceSummary], tokens: Mapping[str, float]) -> Table:
    """What each source has, and how often a run draws its samples.

    Args:
        sources: in the order of the configuration.
        tokens: source -> tokens that the whole run draws from it (`served.planned_tokens`).
    """
    table = _table("sources", "documents", "tokens", "weight", "epochs of the run")
    for source in sources:
        epochs = tokens[source.name] / max(source.num_tokens, 1)
        limit = "" if source.max_epochs is None else f", at most {source.max_epochs:g}"
        has = f"{source.num_documents:,}", f"{source.num_tokens:,}"
        table.add_row(source.name, *has, f"{source.weight:g}", f"{epochs:.3g}{limit}")
    return table


def table_after(rows: Sequence[Row]) -> Table:
    """What each source gave to a whole run, by the rows of its steps."""
    table = _table("sources", "tokens served", "share", "epochs", "held-out loss")
    names = sources_of(rows)
    tokens = {name: sum(_values(rows, f"{TOKENS}{name}")) for name in names}
    total = max(sum(tokens.values()), 1)
    for name in names:
        epochs, losses = (_values(rows, f"{prefix}{name}") for prefix in (EPOCHS, "eval_loss/"))
        last = [
            f"{values[-1]:{form}}" if values else "" for values, form in ((epochs, ".3g"), (losses, ".4f"))
        ]
        table.add_row(name, f"{tokens[name]:,.0f}", f"{tokens[name] / total:.1%}", *last)
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=None, header_style="bold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [number(row[key]) for row in rows if key in row]
