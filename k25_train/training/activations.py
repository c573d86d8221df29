"""The activation policies of one rank, assembled: names from the configuration, budgets from the plan.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

from k25_train.errors import ConfigError
from k25_train.model.multimodal import MultimodalModel
from k25_train.plan.memory.offload import offload_budget
from k25_train.plan.pipeline import StagePlan, passes_of_stage
from parallel.activations.manager import ActivationManager, build_engine
from parallel.activations.offload import NoOffload, OffloadStats
from parallel.activations.order import OffloadOrder, offload_order
from parallel.activations.storage import deallocate_data
from parallel.host.memory import HostMemoryError
from parallel.megatron.ep_overlap_activations import save_by_policy
from parallel.pipeline.schedule import PassKey
from parallel.topology import Topology


class Activations(Protocol):
    """How a rank's passes save what their backward passes need."""

    def start_step(self, num_micro_batches: int) -> None:
        """Begin a step of so many micro-batches on each replica."""

    def forward(self, run: Callable[[], Any], model: MultimodalModel, micro_batch: int) -> Any:
        """The output of `run`, a forward pass of a micro-batch through a chunk."""

    def forward_plan(self, run: Callable[[], Any], model: MultimodalModel, micro_batch: int) -> Any:
        """The schedule plan that `run` returns instead of an output; its nodes run, and save, later."""

    def before_pass(self, num_done: int) -> None:
        """Start bringing back what is needed soon, once this rank has completed `num_done` passes."""

    def finish_step(self) -> OffloadStats | NoOffload:
        """Figures of offloading, of the worst rank, after all passes of a step. Called by every rank."""

    def close(self) -> None:
        """Release host memory."""


class KeepEverything:
    """Leaves all activations as torch saves them."""

    def start_step(self, num_micro_batches: int) -> None:
        """Do nothing."""

    def forward(self, run: Callable[[], Any], model: MultimodalModel, micro_batch: int) -> Any:
        """The output of `run`."""
        return run()

    forward_plan = forward

    def before_pass(self, num_done: int) -> None:
        """Do nothing."""

    def finish_step(self) -> NoOffload:
        """No figures."""
        return NoOffload()

    def close(self) -> None:
        """Do nothing."""


class ByPolicy:
    """Saves each tensor by the policy of its name."""

    def __init__(self, manager: ActivationManager, order_of: Callable[[int], OffloadOrder]) -> None:
        """`order_of` gives the order of a step of so many micro-batches, which it may keep."""
        self.manager = manager
        self._order_of = order_of

    def start_step(self, num_micro_batches: int) -> None:
        """Offload and prefetch in the order that suits the passes of the step."""
        self.manager.start_step(self._order_of(num_micro_batches))

    def forward(self, run: Callable[[], Any], model: MultimodalModel, micro_batch: int) -> Any:
        """The output of `run`, whose saved tensors are stored by policy."""
        with self.manager.forward_pass(PassKey(model.vp_stage or 0, micro_batch)).active():
            output = run()
        # The schedule holds a chunk's input for its gradient only, and its output for its history.
        if not model.pre_process:
            deallocate_data(model.language_model.decoder.input_tensor)
        if not model.post_process:
            self.manager.hold_output(output)
        return output

    def forward_plan(self, run: Callable[[], Any], model: MultimodalModel, micro_batch: int) -> Any:
        """The schedule plan that `run` gives, whose nodes store by policy when they run."""
        saving = self.manager.forward_pass(PassKey(model.vp_stage or 0, micro_batch))
        with saving.active():
            plan = run()
        save_by_policy(plan, saving, self.manager.hold_output)
        return plan

    def before_pass(self, num_done: int) -> None:
        """Prefetch from the host."""
        self.manager.before_pass(num_done)

    def finish_step(self) -> OffloadStats | NoOffload:
        """Figures of offloading, if any policy offloads."""
        return self.manager.finish_step()

    def close(self) -> None:
        """Release the pinned host memory."""
        self.manager.close()


def build_activations(stage: StagePlan, chunks: Sequence[MultimodalModel], topology: Topology) -> Activations:
    """What saves this rank's activations as the configuration says.

    Raises `ConfigError` if the host does not have the memory to offload to.
    """
    activation = stage.config.activation
    if activation.keeps_all:
        return KeepEverything()
    # 1. Host memory, sized by the plan and taken before the first step.
    engine = None
    if activation.offloads:
        budget = offload_budget(stage)
        try:
            engine = build_engine(topology.device, budget.host_bytes, budget.device_bytes)
        except HostMemoryError as error:
            raise ConfigError(str(error)) from error

    # 2. Which passes offload, and when each tensor comes back.
    @cache
    def order_of(num_micro_batches: int) -> OffloadOrder:
        passes = passes_of_stage(stage.config.parallelism, num_micro_batches, stage.stage)
        return offload_order(passes, activation.passes_ahead)

    manager = ActivationManager(activation.policies(), chunks, order_of(stage.num_micro_batches), engine)
    return ByPolicy(manager, order_of)
