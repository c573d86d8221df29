"""Norms of the weights, by part of the model: of the float32 masters, which updates change.

Shards of masters cover each trained weight once over all ranks. A frozen weight has no master, but is the
same on all ranks that hold it: each adds its share.

Shapes: P parts of the model.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from k25_train.config.metrics import MetricsConfig
from k25_train.config.parts import ModelPart
from k25_train.model.build import Model
from k25_train.optim.build import is_expert_weight
from parallel.megatron.skip_non_finite import SkipNonFiniteOptimizer
from parallel.norms import sum_of_squares
from parallel.topology import Topology

PARTS = tuple(ModelPart)
"""In the order of the sums."""


class WeightNorms:
    """Sums up the squares of this rank's weights in every `metrics.weight_norm_interval`-th step."""

    def __init__(
        self,
        names: Iterable[tuple[nn.Parameter, str]],
        optimizer: SkipNonFiniteOptimizer,
        num_holders: Callable[[nn.Parameter], int],
        interval: int,
        device: torch.device,
    ) -> None:
        """
        Args:
            names: every parameter of this rank with its name in the whole model.
            optimizer: has the masters.
            num_holders: number of ranks that hold the whole of a frozen parameter.
            interval: steps from one sum to the next; the first step is one, too.
            device: where the sums are.
        """
        self._part_of = {parameter: ModelPart.of(name) for parameter, name in names}
        self._optimizer = optimizer
        self._num_holders = num_holders
        self._interval = interval
        self._device = device

    def is_due(self, step: int) -> bool:
        """Whether a step, counted from 1, has norms: it depends on the step alone, as after a resume."""
        return step == 1 or step % self._interval == 0

    @torch.no_grad()
    def squares(self, step: int) -> Tensor:
        """This rank's share [P] float64 of the squares of the weights that the step begins with."""
        found = torch.zeros(len(PARTS), dtype=torch.float64, device=self._device)
        if self.is_due(step):
            for index, part in enumerate(PARTS):
                found[index] = self._masters(part) + self._frozen(part)
        return found

    def norms(self, step: int, squares: Sequence[float]) -> Mapping[str, float]:
        """Part -> norm, from sums [P] over all ranks; nothing between two of them. A part that the model does
        not have has none."""
        if not self.is_due(step):
            return {}
        return {part.value: math.sqrt(each) for part, each in zip(PARTS, squares, strict=True) if each}

    def _masters(self, part: ModelPart) -> Tensor | float:
        shards = (each for own in self._optimizer.chained_optimizers for each in own.shards().values())
        masters = [
            each.master for each in shards if self._part_of[each.parameter] == part and len(each.master)
        ]
        return sum_of_squares(masters).to(self._device) if masters else 0.0

    def _frozen(self, part: ModelPart) -> Tensor | float:
        frozen = [each for each in self._part_of if not each.requires_grad and self._part_of[each] == part]
        shares = [sum_of_squares([each.detach()]) / self._num_holders(each) for each in frozen]
        return torch.stack(shares).sum() if shares else 0.0


def build_weight_norms(
    model: Model, optimizer: SkipNonFiniteOptimizer, config: MetricsConfig, topology: Topology
) -> WeightNorms:
    """The norms of a rank's part of a model."""
    everywhere = {parameter for encoder in model.encoders for parameter in encoder.parameters()}

    def num_holders(parameter: nn.Parameter) -> int:
        if parameter in everywhere:
            return topology.world_size
        groups = topology.groups
        group = groups.expt_dp if is_expert_weight(parameter) else groups.dp_cp
        return group.size()

    return WeightNorms(
        model.parameter_names(), optimizer, num_holders, config.weight_norm_interval, topology.device
    )
