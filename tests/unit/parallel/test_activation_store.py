"""When the store of a rank's activations asks for what."""

from dataclasses import dataclass, field

import torch

from parallel.activations.manager import ActivationManager
from parallel.activations.order import OffloadOrder, PassKey
from parallel.activations.policy import Policy
from parallel.activations.sizes import OUTPUTS_UNDER_WAY


@dataclass
class Prefetches:
    """An engine that notes what is asked of it."""

    asked: list[PassKey] = field(default_factory=list)

    def prefetch(self, batch: PassKey) -> None:
        self.asked.append(batch)


def test_each_batch_is_prefetched_once_before_its_pass() -> None:
    engine = Prefetches()
    first, second, third = (PassKey(0, number) for number in range(3))
    order = OffloadOrder(frozenset(), {1: (first, second), 3: (third,)})
    store = ActivationManager({"rest": Policy.offload}, [], order, engine)  # type: ignore[arg-type]
    for num_passes, expected in [(0, []), (0, []), (1, [first, second]), (1, [first, second])]:
        store.before_pass(num_passes)
        assert engine.asked == expected
    store.before_pass(5)
    assert engine.asked == [first, second, third]


def test_passes_that_stay_are_not_offloaded() -> None:
    stays, leaves = PassKey(0, 0), PassKey(0, 1)
    engine = Prefetches()
    order = OffloadOrder(frozenset({stays}), {})
    store = ActivationManager({"rest": Policy.offload}, [], order, engine)  # type: ignore[arg-type]
    assert store.forward_pass(stays)._engine is None
    assert store.forward_pass(leaves)._engine is engine


def test_outputs_are_freed_once_two_more_are_made() -> None:
    store = ActivationManager({"rest": Policy.offload}, [], OffloadOrder(frozenset(), {}), None)
    outputs = [(torch.ones(4, 4, requires_grad=True) * 2) for _ in range(OUTPUTS_UNDER_WAY + 1)]
    for output in outputs:
        store.hold_output(output)
    sizes = [output.untyped_storage().nbytes() for output in outputs]
    assert sizes == [4, *[64] * OUTPUTS_UNDER_WAY]
    assert outputs[0].shape == (4, 4)
    outputs[0].backward(torch.ones(4, 4))
