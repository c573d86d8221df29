"""What ranks send, as a table."""

from rich.table import Table

from k25_train.config.schema import Config
from k25_train.plan.time.communication import communication
from k25_train.plan.time.expert_exchange import between_nodes
from k25_train.units import GB
from parallel.dispatcher import Dispatcher


def communication_table(config: Config) -> Table:
    """One row per kind: what a rank sends in a step, on average over all ranks."""
    table = Table(title="Sent in a step", title_justify="left")
    table.add_column("kind", no_wrap=True)
    table.add_column("GB per rank", justify="right", no_wrap=True)
    for kind, volume in communication(config).items():
        table.add_row(kind, f"{volume.sent_bytes / config.world_size / GB:,.3f}")
    return table


def dispatcher_table(config: Config) -> Table:
    """One row per dispatcher: what a rank sends over the network for experts in a step, and how long its
    card takes for that."""
    table = Table(title="Tokens between nodes in a step", title_justify="left")
    table.add_column("dispatcher", no_wrap=True)
    for name in ("GB per rank", "seconds of its card"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind in Dispatcher:
        num_bytes, seconds = between_nodes(config, kind)
        mark = " ◄" if kind is config.parallelism.dispatcher else ""
        table.add_row(kind.value + mark, f"{num_bytes / GB:,.0f}", f"{seconds:,.1f}")
    return table
