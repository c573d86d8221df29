"""Step files held against the printed equation in any layout, without a model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.data.loader import DataLoader
from k25_train.data.trajectories.documents import NAME
from k25_train.objectives.policy_gradient import PolicyGradient
from tests.helpers.bigram_policy import Found, by_equation, made_policy, through_micro_batches
from tests.helpers.parity import NARROW
from tests.helpers.policy_runs import RL
from tests.helpers.runs import layout, overrides
from tests.helpers.step_files import Rollouts, make_rollouts, write_steps
from tests.helpers.tiny_shards import VOCAB_SIZE, write_tiny_shard_set

TOLERANCE = 1e-6
LOW, HIGH, PENALTY = 0.7, 1.6, 0.05
LAYOUTS: tuple[dict[str, int], ...] = ({}, {"dp": 2}, {"dp": 4}, {"cp": 2}, {"dp": 2, "cp": 2})


class Trials:
    """A tiny set, and layouts of one model over it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._set = write_tiny_shard_set(folder / "data")
        self._layouts: dict[int, Config] = {}
        config = self.config()
        self.data = DataLoader(config.data, config.of_batch(5).train, config.model.vision)

    def layout(self, number: int) -> Config:
        """That of one of the layouts."""
        if number not in self._layouts:
            more = (*RL, *NARROW, *layout(**LAYOUTS[number]), "train.global_batch_size=32")
            self._layouts[number] = compose(overrides(self._set, self.folder / "run", *more))
        return self._layouts[number]

    def config(self, number: int = 0, micro_batch_size: int = 1, ptx_coeff: float = 0.0) -> Config:
        """The same with other micro-batches, and with sequences of data."""
        of = self.layout(number)
        assert of.algorithm is not None
        algorithm = replace(of.algorithm, ptx_coeff=ptx_coeff)
        return replace(of, train=replace(of.train, micro_batch_size=micro_batch_size), algorithm=algorithm)

    def rollouts(self, seed: int, **more: Any) -> Rollouts:
        """Of some groups."""
        return make_rollouts(self.data.tokenizer, self.config().model.vision, seed=seed, **more)

    def found(self, config: Config, policy: torch.Tensor, *, is_sequence: bool = False) -> Found:
        """What the objective makes of the first step."""
        objective = PolicyGradient(
            [*self.data.sources, NAME],
            (),
            ratio_low=LOW,
            ratio_high=HIGH,
            ratio_penalty=PENALTY,
            is_sequence=is_sequence,
        )
        return through_micro_batches(config, self.data, self.folder / "steps", objective, policy)

    def errors(self, config: Config, rollouts: Rollouts, seed: int, **options: Any) -> tuple[float, float]:
        """How far loss (in nats) and gradient (relative) of some rollouts are from the equation's."""
        write_steps(self.folder / "steps", [rollouts.weighted(**options)])
        policy = made_policy(VOCAB_SIZE, seed)
        found = self.found(config, policy)
        return errors_of(
            found, *by_equation(rollouts, policy, low=LOW, high=HIGH, penalty=PENALTY, **options)
        )


def errors_of(found: Found, loss: float, gradient: torch.Tensor) -> tuple[float, float]:
    """How far it is from a loss, in nats (rewards of both signs may cancel, so that a loss is as small as one
    likes), and from a gradient, relative."""
    norm = max(float(gradient.norm()), 1e-12)
    return abs(found.loss - loss), float((found.gradient - gradient).norm()) / norm
