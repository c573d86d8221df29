"""What autograd saves of the tiny model, as a pass by policy stores it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from parallel.activations.order import Batch, OffloadOrder
from parallel.activations.policy import Policy
from parallel.activations.saving import Stored
from parallel.activations.store import ActivationStore, build_engine
from tests.helpers.ranks import RankContext
from tests.helpers.tiny_model import build_random_model, documents, random_tokens

Record = tuple[str, tuple[int, ...], Policy, int, int]
"""Name, shape, what was done with it, bytes on the device, bytes in the host."""
NO_OFFLOAD_ORDER = OffloadOrder(stay=frozenset(), prefetch={})
"""Everything is offloaded, and nothing prefetched."""


class Case(NamedTuple):
    """One forward pass."""

    policies: Mapping[str, Policy]
    dtype: torch.dtype
    lengths: tuple[int, ...]
    stays: bool = False
    """Whether nothing of it is offloaded."""


def records_of_cases(
    context: RankContext, cases: Sequence[Case], model_overrides: Mapping[str, Any]
) -> list[Counter[Record]]:
    """What one pass through the whole tiny model stores in each case; backward passes are run too."""
    model = build_random_model(context, **model_overrides)
    engine = build_engine(torch.device("cpu"), 16 << 20, 4 << 20)
    found = []
    for case in cases:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(case.dtype)
        stored: list[Stored] = []
        batch = Batch(0, 0)
        order = OffloadOrder(frozenset([batch]), {}) if case.stays else NO_OFFLOAD_ORDER
        store = ActivationStore(case.policies, [model], order, engine, stored.append)
        tokens = random_tokens(sum(case.lengths))
        saving = store.forward_pass(batch)
        with saving.active():
            losses = model(
                tokens=tokens,
                documents=documents(case.lengths),
                labels=tokens.roll(-1),
                media_positions=torch.empty(0, dtype=torch.long),
            )
        del saving
        losses.sum().backward()
        del losses
        store.finish_step()
        found.append(Counter(map(record_of, stored)))
    engine.close()
    return found


def record_of(stored: Stored) -> Record:
    return (stored.name, stored.shape, stored.policy, stored.device_bytes, stored.host_bytes)
