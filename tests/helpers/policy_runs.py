"""Short runs on step files of made-up rollouts, in any layout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k25_train.compose.resolve import compose
from k25_train.config.algorithm import OtherVersions
from k25_train.data.tokenizer import load_tokenizer
from tests.helpers.parity import NARROW, Case
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.step_files import make_rollouts, write_steps

RL = (
    "algorithm=k25_free", "rollout=in_process", "environment=sums", "rollout.max_prompt_tokens=32",
    "algorithm.ptx_sequences=3",
)  # fmt: skip
STILL = ("optim.lr=1e-12", "optim.min_lr=1e-12", "optim.warmup=1", "optim.decay=1")
"""Weights stay as they are, so that each step is a trial of its own."""
SERIAL = Case({}, more=("dep.mode=coupled",))
PTX = ("algorithm.ptx_coeff=0.3",)


@dataclass(frozen=True, slots=True)
class Trained:
    """What a run reports, the same on every rank."""

    losses: Sequence[float]
    """Of each step."""
    grad_norms: Sequence[float]
    """Of each step."""
    figures: dict[str, float]
    """Of the objective, in the last step."""
    evaluation: dict[str, float]
    """Held-out losses behind it."""

    def difference(self, other: "Trained") -> float:
        """Worst difference of a loss, in nats, or of a gradient norm, relative."""
        of_losses = [abs(a - b) for a, b in zip(self.losses, other.losses, strict=True)]
        norms = zip(self.grad_norms, other.grad_norms, strict=True)
        return max(of_losses + [abs(a / b - 1) for a, b in norms])


def trained(context: RankContext, arguments: Sequence[str]) -> Trained:
    """Train on the step files that the run folder has."""
    run = start_run(context, arguments)
    from k25_train.training.evaluation import eval_losses
    from k25_train.training.step import train_step

    with run.data:
        results = [train_step(run, step) for step in range(1, run.config.train.steps + 1)]
        evaluation = eval_losses(run, run.config.train.eval_sequences)
    losses, norms = [each.loss for each in results], [each.grad_norm for each in results]
    return Trained(losses, norms, dict(results[-1].figures), evaluation)


class PolicyRuns:
    """Runs of one set of step files: groups of all kinds, the last steps with images."""

    def __init__(self, data: Path, folder: Path, num_steps: int) -> None:
        self._data, self._folder, self._num_steps = data, folder, num_steps
        self._found: dict[tuple[str, ...], Trained] = {}
        vision = compose(self.arguments(SERIAL)).model.vision
        tokenizer = load_tokenizer(str(data / "tokenizer.json"))
        made = [
            make_rollouts(tokenizer, vision, seed=seed, sizes=(4, 2, 3, 5), num_images=min(seed, 2))
            for seed in range(num_steps)
        ]
        kinds = list(OtherVersions)
        write_steps(
            folder / "rollouts",
            [
                each.weighted(current_version=1, other_versions=kinds[seed % len(kinds)])
                for seed, each in enumerate(made)
            ],
        )

    def arguments(self, case: Case, *more: str) -> list[str]:
        """The overrides of a layout's run."""
        steps = f"train.steps={self._num_steps}"
        sizes = (*layout(**case.sizes), "train.global_batch_size=16")
        return overrides(self._data, self._folder, *RL, *NARROW, *STILL, steps, *sizes, *case.more, *more)

    def of(self, case: Case, *more: str) -> Trained:
        """What the layout's run reports; each run is made once."""
        arguments = self.arguments(case, *more)
        key = tuple(arguments)
        if key not in self._found:
            by_rank = run_ranks(trained, case.num_ranks, arguments, timeout_s=300.0)
            assert all(each == by_rank[0] for each in by_rank), "ranks report differently"
            self._found[key] = by_rank[0]
            assert all(map(math.isfinite, by_rank[0].losses))
        return self._found[key]


CASES = (
    Case({"pp": 2, "vpp": 2}),
    Case({"dp": 2}, more=("train.micro_batch_size=2",)),
    Case({"dp": 2, "ep": 2}),
    Case({"cp": 2}, more=("train.micro_batch_size=2",)),
    Case({"cp": 2}, more=("dep.mode=coupled",)),
    Case({"pp": 2}, more=("dep.schedule=bubbles",)),
    Case({"pp": 2, "vpp": 2, "ep": 2, "dp": 2}, more=("parallelism.overlap_expert_comm=true",)),
)
"""Each kind of parallelism, with the tower coupled, around the pipeline and in its bubbles."""
