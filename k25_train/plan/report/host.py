"""Host memory of each different node, as a table."""

from dataclasses import fields

from rich import box
from rich.table import Table

from k25_train.plan.memory.node import RankHost, fullest_node, node_memories, rank_host
from k25_train.plan.report.planned import Planned
from k25_train.plan.report.text import format_gb

COLUMNS = {
    "activations": "offloaded",
    "optimizer": "optimizer",
    "snapshot": "checkpoint's\ncopy",
    "loading": "checkpoint's\nbuffers",
    "batches": "batches",
    "processes": "processes",
    "tensors": "tensors",
}
"""Field of `RankHost` -> heading."""


def host_table(planned: Planned) -> Table:
    """One row per different node: what its ranks keep in the host together, in GB, the fullest marked."""
    pipeline, memories = planned.pipeline, planned.memories
    nodes = node_memories(pipeline, memories)
    ranks = [rank_host(stage, memory) for stage, memory in zip(pipeline.stages, memories, strict=True)]
    title = f"GB in the host of a node, which has {format_gb(planned.verdict.node_limit_bytes)}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("node", no_wrap=True)
    table.add_column("stages", no_wrap=True)
    names = [field.name for field in fields(RankHost)]
    for name in (*(COLUMNS[name] for name in names), "sum"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    most = fullest_node(nodes)
    for node in nodes:
        amounts = [
            sum(count * getattr(ranks[stage], name) for stage, count in node.num_ranks.items())
            for name in names
        ]
        table.add_row(
            str(node.first),
            ", ".join(f"{count} of {stage}" for stage, count in node.num_ranks.items()),
            *(format_gb(each) if each else "-" for each in (*amounts, node.total)),
            "◄" if node is most else "",
        )
    return table
