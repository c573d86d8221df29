"""The bytes that all ranks send in a step."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import start_run


@dataclass(frozen=True, slots=True)
class Counted:
    """Of one rank, or of all of them."""

    payload: Counter[str]
    sent: Counter[str]
    padding: int
    """Elements of the buffers that belong to no parameter, of groups of more than one rank."""
    features: int
    """Bytes that the decoupled encoder says it has sent."""
    tokens: int
    """Of the global batch, without padding."""
    vision_tokens: int
    """Of the global batch."""


def count_a_step(context: RankContext, arguments: Sequence[str]) -> Counted:
    """The second step: with overlap, the first one's parameters are gathered in it."""
    from k25_train.training.step import train_step
    from tests.helpers.traffic import counted_traffic

    run = start_run(context, arguments)
    with run.data:
        train_step(run, 1)
        with counted_traffic() as traffic:
            train_step(run, 2)
    buffers = [each for module in run.modules for each in module.buffers + module.expert_parallel_buffers]
    padding = sum(
        buffer.numel - sum(parameter.numel() for parameter in buffer.params)
        for buffer in buffers
        if buffer.data_parallel_group.size() > 1
    )
    payload, sent = Counter(traffic.payload_bytes), Counter(traffic.sent_bytes)
    features = run.tower.engine.stats.sent_bytes
    sizes = run.data.loader.plan(1).sizes()
    return Counted(payload, sent, padding, features, sizes.num_tokens, sizes.num_vision_tokens)


def count(arguments: list[str], num_ranks: int) -> Counted:
    """A step of all ranks."""
    ranks = run_ranks(count_a_step, num_ranks, arguments)
    total: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    for rank in ranks:
        total.update(rank.payload)
        sent.update(rank.sent)
    padding, features = sum(rank.padding for rank in ranks), sum(rank.features for rank in ranks)
    return Counted(total, sent, padding, features, ranks[0].tokens, ranks[0].vision_tokens)
