"""What ranks send, as a table."""

from rich.table import Table

from k25_train.config.schema import Config
from k25_train.plan.time.communication import communication
from k25_train.units import GB


def communication_table(config: Config) -> Table:
    """One row per kind: what a rank sends in a step, on average over all ranks."""
    table = Table(title="Sent in a step", title_justify="left")
    table.add_column("kind", no_wrap=True)
    table.add_column("GB per rank", justify="right", no_wrap=True)
    for kind, volume in communication(config).items():
        table.add_row(kind, f"{volume.sent_bytes / config.world_size / GB:,.3f}")
    return table
