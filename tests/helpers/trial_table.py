"""The table that a bench of many trials ends with."""

from collections import Counter

from rich.table import Table


def table_of(counts: Counter[tuple[str, str]], kind_of_trial: str) -> Table:
    """Counts by kind and outcome, with totals; `kind_of_trial` heads the kinds."""
    outcomes = sorted({outcome for _, outcome in counts})
    kinds = sorted({kind for kind, _ in counts})
    table = Table(kind_of_trial, *outcomes, "all")
    for kind in kinds:
        own = [counts[kind, outcome] for outcome in outcomes]
        table.add_row(kind, *(str(count or "") for count in own), str(sum(own)))
    totals = [sum(counts[kind, outcome] for kind in kinds) for outcome in outcomes]
    table.add_row("all", *map(str, totals), str(sum(totals)))
    return table
