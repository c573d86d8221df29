"""What the manager of a rank's activations asks of the engine, and when."""

from dataclasses import dataclass, field

import torch

from parallel.activations.manager import ActivationManager
from parallel.activations.order import OffloadOrder
from parallel.activations.policy import Policy
from parallel.activations.sizes import OUTPUTS_IN_FLIGHT
from parallel.pipeline.schedule import PassKey


@dataclass
class Prefetches:
    """An engine that notes what is asked of it."""

    asked: list[PassKey] = field(default_factory=list)

    def prefetch(self, key: PassKey) -> None:
        self.asked.append(key)


def test_each_pass_is_prefetched_once_and_in_time() -> None:
    engine = Prefetches()
    first, second, third = (PassKey(0, number) for number in range(3))
    order = OffloadOrder(frozenset(), {1: (first, second), 3: (third,)})
    manager = ActivationManager({"rest": Policy.offload}, [], order, engine)  # type: ignore[arg-type]
    for num_passes, expected in [(0, []), (0, []), (1, [first, second]), (1, [first, second])]:
        manager.before_pass(num_passes)
        assert engine.asked == expected
    manager.before_pass(5)
    assert engine.asked == [first, second, third]


def test_passes_that_stay_are_not_offloaded() -> None:
    stays, leaves = PassKey(0, 0), PassKey(0, 1)
    engine = Prefetches()
    order = OffloadOrder(frozenset({stays}), {})
    manager = ActivationManager({"rest": Policy.offload}, [], order, engine)  # type: ignore[arg-type]
    assert manager.forward_pass(stays)._engine is None
    assert manager.forward_pass(leaves)._engine is engine


def test_a_step_of_another_length_has_an_order_of_its_own() -> None:
    engine = Prefetches()
    first, second = PassKey(0, 0), PassKey(0, 1)
    long = OffloadOrder(frozenset(), {1: (first, second)})
    manager = ActivationManager({"rest": Policy.offload}, [], long, engine)  # type: ignore[arg-type]
    manager.start_step(OffloadOrder(frozenset({second}), {1: (first,)}))
    manager.before_pass(3)
    assert engine.asked == [first]
    assert manager.forward_pass(second)._engine is None


def test_outputs_are_freed_once_two_more_are_made() -> None:
    manager = ActivationManager({"rest": Policy.offload}, [], OffloadOrder(frozenset(), {}), None)
    outputs = [(torch.ones(4, 4, requires_grad=True) * 2) for _ in range(OUTPUTS_IN_FLIGHT + 1)]
    for output in outputs:
        manager.hold_output(output)
    sizes = [output.untyped_storage().nbytes() for output in outputs]
    assert sizes == [4, *[64] * OUTPUTS_IN_FLIGHT]
    assert outputs[0].shape == (4, 4)
    outputs[0].backward(torch.ones(4, 4))
