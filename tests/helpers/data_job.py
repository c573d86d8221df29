"""A job that reads its data and trains nothing: replicas that read, checkpoints of where the loader is, and
records of all that they got. It can be killed at any moment, and go on in another layout."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from k25_train.checkpoint import folders
from k25_train.checkpoint.data_state import DataState, mixture_of, read_data_state
from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.data.batch import Reads
from k25_train.data.mix.plan import StepPlan
from k25_train.data.regions import leave_pageable
from k25_train.data.share_reader import HostInputs, Share, ShareReader
from k25_train.data.start import start_source
from tests.helpers.written_checkpoints import write_checkpoint

READS = Reads(tokens=True, labels=True, pixels=True)
PATIENCE_S = 240.0
"""Longest time that an attempt may take."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What may differ from one attempt to the next."""

    dp_size: int = 1
    more: tuple[str, ...] = ()
    """Overrides of the configuration: sizes of micro-batches, prefetching, where data are read."""

    def told(self) -> str:
        """In words."""
        return " ".join([f"dp={self.dp_size}", *self.more])


@dataclass(frozen=True, slots=True)
class Job:
    """A run of steps, whose folder has checkpoints and records."""

    folder: Path
    arguments: tuple[str, ...]
    """Overrides of the configuration that all attempts share."""
    num_steps: int
    interval: int = 2
    """Steps between checkpoints."""

    @property
    def records(self) -> Path:
        """Where each replica writes what it got, a file a step."""
        return self.folder / "records"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.folder / "checkpoints"

    def saved_step(self) -> int:
        """The step of the newest checkpoint."""
        newest = folders.newest_checkpoint(self.checkpoints)
        return folders.step_of(newest) if newest else 0

    def reached_step(self, attempt: int) -> int:
        """The latest step that a replica of an attempt has a record of."""
        steps = [int(path.name.split(".")[1]) for path in self.records.glob(f"{attempt}.*.json")]
        return max(steps, default=0)

    def start(self, attempt: int, layout: Layout) -> int:
        """Start an attempt in a process group of its own; returns its leader's process id."""
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            code = 1
            with contextlib.suppress(KeyboardInterrupt):
                code = _lead(self, attempt, layout)
            os._exit(code)
        return pid

    def finish(self, attempt: int, layout: Layout) -> None:
        """Run an attempt to the end. Raises RuntimeError if it fails."""
        _, status = os.waitpid(self.start(attempt, layout), 0)
        if status:
            raise RuntimeError(f"attempt {attempt} ({layout.told()}) ended with status {status}")

    def run_killed(self, attempt: int, layout: Layout, step: int, delay_s: float) -> None:
        """Run an attempt until one of its replicas has got `step`, and kill all of it `delay_s` later."""
        pid, deadline = self.start(attempt, layout), time.monotonic() + PATIENCE_S
        while self.reached_step(attempt) < step and not _has_ended(pid):
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
        time.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise RuntimeError(f"attempt {attempt} ({layout.told()}) ended with status {status}")

    def record(self, step: int, attempt: int) -> dict[str, list[Any]] | None:
        """What the replicas of an attempt got of a step, one after another; None unless all have got it."""
        found = [
            json.loads(path.read_text()) for path in sorted(self.records.glob(f"{attempt}.{step}.*.json"))
        ]
        if not found or len(found) < found[0]["of"]:
            return None
        names = ("ids", "sequences", "items")
        return {name: [each for of_rank in found for each in of_rank[name]] for name in names}

    def attempts_of(self, step: int) -> list[int]:
        """The attempts that have records of a step, in order."""
        return sorted({int(path.name.split(".")[0]) for path in self.records.glob(f"*.{step}.*.json")})


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _lead(job: Job, attempt: int, layout: Layout) -> int:
    """The leader: starts the replicas from the newest checkpoint, and waits for them."""
    torch.set_num_threads(1)
    job.records.mkdir(parents=True, exist_ok=True)
    job.checkpoints.mkdir(exist_ok=True)
    newest = folders.newest_checkpoint(job.checkpoints)
    step, state = (folders.step_of(newest), read_data_state(newest)) if newest else (0, DataState({}, []))
    config = compose([*job.arguments, *layout.more, f"cluster.gpus_per_node={layout.dp_size}"])
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(layout.dp_size)
    arguments = [
        (job, attempt, config, rank, layout.dp_size, step, state, barrier) for rank in range(layout.dp_size)
    ]
    replicas = [context.Process(target=_replica, args=each) for each in arguments]
    for replica in replicas:
        replica.start()
    for replica in replicas:
        replica.join()
    return max(abs(replica.exitcode or 0) for replica in replicas)


def _replica(
    job: Job, attempt: int, config: Config, rank: int, size: int, start: int, state: DataState, barrier: Any
) -> None:
    """One replica: takes its share of each step, and writes down what it got."""
    share = Share(rank=rank, dp_rank=rank, dp_size=size, reads=READS)
    with telling_ids(), start_source(config) as source:
        source.open()
        source.take(share, leave_pageable)
        if start:
            source.start_from(start, state.loader)
        for step in range(start, job.num_steps):
            inputs = source.step(step)
            state_after = dict(inputs.state_after)
            content = {"of": size, "ids": state_after.pop("ids"), **digests(inputs, config.train.seq_len)}
            path = job.records / f"{attempt}.{step + 1}.{rank}.json"
            path.with_suffix(".tmp").write_text(json.dumps(content))
            os.replace(path.with_suffix(".tmp"), path)
            # Ranks wait for one another in every step, and for the first one while it saves.
            barrier.wait(PATIENCE_S)
            if rank == 0 and (step + 1) % job.interval == 0:
                mixtures = [*state.mixtures, mixture_of(config, start + 1)]
                text = DataState(state_after, mixtures).to_text()
                write_checkpoint(job.checkpoints, step + 1, texts={folders.DATA_STATE: text})
            barrier.wait(PATIENCE_S)


@contextlib.contextmanager
def telling_ids() -> Iterator[None]:
    """Sources that are started meanwhile tell with each step of which samples their sequences are."""
    read: Callable[[ShareReader, StepPlan], HostInputs] = ShareReader.step

    def step(reader: ShareReader, plan: StepPlan) -> HostInputs:
        inputs = read(reader, plan)
        return replace(inputs, state_after={**inputs.state_after, "ids": ids_of(plan, reader._share)})

    with mock.patch.object(ShareReader, "step", step):
        yield


def ids_of(plan: StepPlan, share: Share) -> list[list[Any]]:
    """[sequence of the share] -> source, and for each piece its sample, first token and length."""
    size = len(plan.sequences) // share.dp_size
    return [
        [
            sequence.source,
            [[piece.record.key, piece.start, piece.length] for piece in sequence.pieces],
        ]
        for sequence in plan.sequences[share.dp_rank * size : (share.dp_rank + 1) * size]
    ]


def digests(inputs: HostInputs, seq_len: int) -> dict[str, list[str]]:
    """Hashes of the bytes of each sequence and of each vision item, in order."""
    batches = inputs.batches
    kinds = (batches.tokens, batches.labels, batches.loss_mask, batches.source)
    rows = zip(*(kind.reshape(-1, seq_len) for kind in kinds), strict=True)
    grids = [grid for documents in batches.documents for grid in documents.grid_thw]
    items = batches.pixels.split([grid.num_patches for grid in grids]) if grids else ()
    return {"sequences": [_digest(row) for row in rows], "items": [_digest([item]) for item in items]}


def _digest(tensors: Sequence[torch.Tensor]) -> str:
    digest = sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def run_with_kills(job: Job, layouts: Sequence[Layout], num_kills: int, rng: random.Random) -> list[str]:
    """Run a job to its end, killed at random moments, in the next layout each time; what happened."""
    told = []
    for attempt in range(num_kills):
        layout, saved = layouts[attempt % len(layouts)], job.saved_step()
        # So that there is something left to do for all of them.
        farthest = saved + max(1, 2 * (job.num_steps - 1 - saved) // (num_kills - attempt))
        step = 0 if rng.random() < 0.15 else rng.randint(saved + 1, min(farthest, job.num_steps - 1))
        delay_s = rng.uniform(0.0, 0.3 if step == 0 else 0.05)
        job.run_killed(attempt, layout, step, delay_s)
        at = f"in step {job.reached_step(attempt) + 1}" if job.reached_step(attempt) else "while it started"
        told.append(f"{layout.told()}: from step {saved}, killed {at}, saved is step {job.saved_step()}")
    job.finish(num_kills, layouts[num_kills % len(layouts)])
    return told


def differences(job: Job, reference: Job) -> list[str]:
    """What any attempt of a job got otherwise than the reference, and steps that nobody has got."""
    found = []
    for step in range(1, job.num_steps + 1):
        whole = reference.record(step, 0)
        got = {attempt: job.record(step, attempt) for attempt in job.attempts_of(step)}
        if not any(got.values()):
            found.append(f"step {step}: no attempt has all of it")
        for attempt, record in got.items():
            if record is not None and whole is not None:
                names = [name for name in record if record[name] != whole[name]]
                found += [f"step {step}, attempt {attempt}: other {name}" for name in names]
    return found
