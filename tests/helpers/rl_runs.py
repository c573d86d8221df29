"""Runs of reinforcement learning of a shrunk model, with a scripted engine or a real one."""

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from k25_train.config.schema import Config
from k25_train.environments.base import Response, Task, Verdict, scored
from k25_train.rollout.engines.base import EngineError, Generated, Request
from tests.helpers.ranks import RankContext
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.scripted_engine import ScriptedEngine
from tests.helpers.tiny_shards import tiny_samples, write_shard_set

SMALL = (
    "experiment=smoke algorithm=k25_free rollout=in_process environment=sums parallelism=serial "
    "dep.mode=coupled model.num_layers=2 model.vision.num_layers=1 train.seq_len=64 train.micro_batch_size=2 "
    "train.global_batch_size=4 train.steps=6 train.eval_interval=100 optim.lr=1e-3 optim.min_lr=1e-3 "
    "optim.warmup=1 optim.decay=0 checkpoint.interval=2 algorithm.prompts_per_step=2 algorithm.group_size=3 "
    "algorithm.ptx_sequences=2 rollout.max_prompt_tokens=40 rollout.max_tokens=12 rollout.max_running=8 "
    "rollout.eval_tasks=3 rollout.probe_sequences=2 environment.tasks.sums.num_tasks=40"
).split()
SCRIPTED, REAL, DYING = "scripted", "real", "dying"
"""Engines: without a model; transformers' in process; the first, which fails for good at a drawn moment."""


def write_rl_data(directory: Path) -> Path:
    """A tiny shard set whose vocabulary has the tokens of conversations."""
    texts = [sample for sample in tiny_samples(4, seed=0) if sample.kind == "text"]
    return write_shard_set(directory, {"train": texts, "heldout": texts[:2]}, chat_tokens=True)


def rl_overrides(data: Path, run: Path, *more: str) -> list[str]:
    """Overrides of a run of one rank on `data` that writes into `run`."""
    only_text = ["~data.sources.caption", "~data.sources.ocr", "~data.sources.video"]
    return overrides(data, run, *SMALL, *layout(), *only_text, *more)


class ShortJudge:
    """Rewards by the length of the response: what a policy can earn without having learned to write."""

    async def judge(self, task: Task, response: Response) -> Verdict:
        """See `Judging`."""
        return scored(float(response.num_tokens % 3 == 0), {"accuracy": float(response.ended)})

    def check(self, tasks: Iterable[Task]) -> None:
        """Judges anything."""

    async def close(self) -> None:
        """Nothing to end."""


class DyingEngine(ScriptedEngine):
    """Fails every request from a drawn moment on."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._dies_at = time.monotonic() + random.uniform(0.0, 1.5)

    async def generate(self, request: Request) -> Generated:
        if time.monotonic() > self._dies_at:
            raise EngineError("scripted: connection refused")
        return await super().generate(request)


def fit_rl(
    context: RankContext, arguments: Sequence[str], engine: str = SCRIPTED, mark: Callable[[], None] = list
) -> int:
    """Reinforce as the command does; returns the last step. `mark` is called when training begins."""
    run = start_run(context, arguments)
    from k25_train.metrics.report import Report
    from k25_train.rl import build
    from k25_train.training.trainer import Trainer

    if engine != REAL:
        replace_engine(DyingEngine if engine == DYING else ScriptedEngine)
    report = Report(run.config, is_main=run.is_main, device_name="cpu")
    with report, run.data, run.claim:
        trainer = Trainer(run, report, build.build_reinforcement(run, report))
        mark()
        trainer.fit()
    return trainer.finished_step


def replace_engine(kind: type[ScriptedEngine]) -> None:
    """Have runs of this process use an engine without a model, which no probe can fit, and a judge that
    rewards what it makes."""
    from k25_train.rl import build, probe, workplace

    async def engines(config: Config, *_: Any) -> list[Any]:
        await asyncio.sleep(0)
        return [kind(num_ids=200, pause_s=0.0005)]

    build.open_engines = engines
    workplace.open_judges = lambda *_, **__: ShortJudge()  # type: ignore[assignment, return-value]
    probe.Probe.check = lambda self: probe.Gap(mean=0.0, largest=0.0)  # type: ignore[method-assign]
