"""Whether engines have the weights of the trainer: log-probabilities of fixed sequences, on both sides.

    first rank: sequences ─► every engine: log-probabilities ──────────────┐
                    └─► file ─► every rank: a forward pass of its share ─► compared, token by token
                                                                           beyond the tolerance: fenced off

Status codes, labels of versions and checksums say yes to wrong weights (an engine that keeps its experts
packed does not notice that they are old); the distribution of the next token does not.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from k25_train.checkpoint.agreement import on_first_rank
from k25_train.config.schema import Config
from k25_train.data.trajectories.rows import Trajectories, Trajectory
from k25_train.data.trajectories.source import TrajectorySource, rollouts_of
from k25_train.data.trajectories.step_file import step_path, write_step_file
from k25_train.objectives.base import NamedSums, ObjectiveOutput, Targets
from k25_train.rl.probe_gaps import apart, gaps_of, is_flip
from k25_train.rl.transports.base import Waiting
from k25_train.rollout.engines.base import ProbeSequence
from k25_train.rollout.engines.images import expand_placeholders, num_image_tokens
from k25_train.rollout.engines.pool import EnginePool
from k25_train.training.evaluation import forward_sums
from k25_train.training.inputs import InputReader
from k25_train.training.run import Run, share_of
from k25_train.training.staging import build_staging
from parallel.config import DepSchedule

FOLDER = "probe"
"""Of the file of the sequences, among the step files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How far engines are from the trainer, in nats of a token's log-probability."""

    mean: float
    """Over all tokens of all engines."""
    largest: float
    """Of any token of any engine; infinite where an engine's is no number."""
    flipped: int = 0
    """Sequences, of all engines, that are further off although their engine serves (`probe_gaps.is_flip`)."""


class TokenLogprobs:
    """An objective that only reports: the log-probability of each token at its number, which stands in the
    place of its advantage. Every number is of one token of one rank, so a sum over ranks has all of them."""

    def __init__(self, num_tokens: int) -> None:
        """`num_tokens`: of all sequences."""
        self._num_tokens = num_tokens

    @property
    def sum_names(self) -> tuple[str, ...]:
        """The numbers."""
        return tuple(map(str, range(self._num_tokens)))

    def loss(self, sums: NamedSums) -> float:
        """See `Objective`: nothing is trained."""
        return 0.0

    def figures(self, sums: NamedSums) -> dict[str, float]:
        """See `Objective`."""
        return {}

    def __call__(self, token_losses: Tensor, targets: Targets) -> ObjectiveOutput:
        """See `Objective`."""
        losses, policy = token_losses.float().flatten(), targets.policy
        is_drawn = (policy.responses >= 0) & (targets.loss_mask > 0)
        found = torch.zeros(self._num_tokens, dtype=torch.float64, device=losses.device)
        found[policy.advantages[is_drawn].round().long()] = -losses[is_drawn].double()
        return ObjectiveOutput(losses.sum(), targets.loss_mask.sum().to(torch.int), found)


class Probe:
    """Fixed sequences, and the trainer's side of them. Every rank calls every method."""

    def __init__(
        self,
        run: Run,
        sequences: Sequence[ProbeSequence],
        media_pad: int,
        pool: EnginePool | None,
        wait: Waiting,
    ) -> None:
        """
        Args:
            run: the trainer.
            sequences: with one placeholder for each image; those of the first rank count.
            media_pad: the placeholder.
            pool: the engines, on the first rank; None on others.
            wait: runs calls of engines, on the first rank.

        Raises `DataError` for a sequence whose placeholders are not those of its images, or that is longer
        than a sequence of training.
        """
        assert run.config.rollout is not None, "a run of reinforcement learning"
        self._run = run
        self._pool = pool
        self._wait = wait
        self._tolerance = run.config.rollout.probe_tolerance
        self._sequences = tuple(sequences)
        folder = rollouts_of(run.config) / FOLDER
        self._lengths = on_first_rank(lambda: _write(run.config, self._sequences, media_pad, folder))
        self._num_tokens = sum(self._lengths)
        self._before = np.full(self._num_tokens, np.inf)
        """What the trainer had at the check before; infinite until there was one."""
        self._source = TrajectorySource(_for_forward(run.config), folder)
        self._source.open()
        self._source.take(share_of(run.config, run.topology))
        self._reader = InputReader(
            self._source, run.topology, build_staging(run.topology.device), run.tracker
        )

    def check(self) -> Gap:
        """Compare every serving engine with the trainer; one that is off by more than
        `rollout.probe_tolerance`, or has the weights of the push before, is fenced off, but for what may be
        a router's tie (`probe_gaps.py`). Raises `EngineError` if none is left."""
        with self._run.tracker.phase("probe engines", range(self._run.topology.world_size)):
            own = self.trainer_logprobs()
            gap = on_first_rank(lambda: self._compare(own))
            self._before = own
            return gap

    def trainer_logprobs(self) -> np.ndarray:
        """[tokens] float64 of all sequences, one after another, without the first token of each; the same on
        every rank."""
        objective = TokenLogprobs(self._num_tokens)
        inputs = self._reader.step(1)
        sums = forward_sums(self._run, inputs, objective)
        return np.array([sums[name] for name in objective.sum_names])

    def close(self) -> None:
        """End all reading."""
        self._source.close()

    def _compare(self, own: np.ndarray) -> Gap:
        assert self._pool is not None, "the first rank has the engines"
        found = self._wait(self._pool.probe(self._sequences))
        gaps = {name: gaps_of(logprobs, own) for name, logprobs in found.items()}
        have_images = [bool(each.images) for each in self._sequences]
        flipped = 0
        for name, gap in gaps.items():
            before = gaps_of(found[name], self._before)
            are_apart = apart(gap, before, self._lengths, self._tolerance)
            if is_flip(are_apart, have_images):
                flipped += int(are_apart.sum())
                continue
            is_first = not np.isfinite(self._before).all()
            than_before = "" if is_first else f", and up to {float(before.max()):.2g} from the push before"
            self._pool.fence(
                name,
                f"its log-probabilities of the probe are up to {float(gap.max()):.2g} nats from the "
                f"trainer's, rollout.probe_tolerance={self._tolerance:g} is allowed{than_before}; in "
                f"{int(are_apart.sum())} of {len(self._lengths)} sequences it has other weights, or other "
                "arithmetic",
            )
        every = np.concatenate([np.zeros(0), *gaps.values()])
        mean, largest = (float(every.mean()) if len(every) else 0.0), float(every.max(initial=0.0))
        return Gap(mean=mean, largest=largest, flipped=flipped)


def _write(config: Config, sequences: Iterable[ProbeSequence], media_pad: int, folder: Path) -> list[int]:
    """The file of the sequences, in which every token but the first counts as drawn; how many these are, of
    each sequence."""
    made: list[Trajectory] = []
    for number, sequence in enumerate(sequences):
        counts = [num_image_tokens(image, config.model.vision) for image in sequence.images]
        ids = expand_placeholders(sequence.token_ids, counts, media_pad)
        tokens = np.array(ids, dtype=np.int32)
        generated = np.ones(len(tokens), dtype=np.bool_)
        generated[0] = False
        made.append(
            Trajectory(
                name=f"probe {number}",
                response=number,
                tokens=tokens,
                generated=generated,
                rollout_logprobs=np.zeros(len(tokens), dtype=np.float32),
                versions=np.zeros(len(tokens), dtype=np.int32),
                media=sequence.images,
            )
        )
    rows = Trajectories.of(made)
    numbers = np.cumsum(rows.generated) - 1
    weights = rows.generated.astype(np.float32)
    rows = rows.weighted(np.where(rows.generated, numbers, 0), weights, weights)
    write_step_file(step_path(folder, 1), rows, {})
    return [len(each.tokens) - 1 for each in made]


def _for_forward(config: Config) -> Config:
    """How the trainer reads them: alone, with images encoded ahead of the pass, as in evaluations."""
    assert config.algorithm is not None, "a run of reinforcement learning"
    return replace(
        config,
        dep=replace(config.dep, schedule=DepSchedule.upfront),
        algorithm=replace(config.algorithm, ptx_coeff=0.0),
    )
