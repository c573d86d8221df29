"""Jobs of a few ranks that save one checkpoint after the other as a run does, of tensors made by rule."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from k25_train.checkpoint import folders
from k25_train.checkpoint.agreement import on_first_rank
from k25_train.checkpoint.files.parts import Part
from k25_train.checkpoint.manifest import Manifest
from k25_train.checkpoint.records import Contents
from k25_train.checkpoint.saving import Saving
from k25_train.checkpoint.snapshot import build_snapshot
from k25_train.errors import CheckpointError
from tests.helpers.ranks import start_context

SHAPES = {"weight": (64, 8192), "optimizer.state.param.weight": (64, 8192), "router.expert_bias": (512,)}
DTYPES = {"weight": torch.bfloat16, "optimizer.state.param.weight": torch.float32}
NUM_WRITERS = 2
CONFIG = "train:\n  seed: 7\n"
PHASES = ("snapshot", "write", "commit", "prune")
DONE = "done"
PATIENCE_S = 60.0


class Mark(NamedTuple):
    """What a job has come to."""

    phase: str
    """One of `PHASES` that begins, `saved` for a checkpoint that counts, `done`, or the text of an error."""
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a job does."""

    root: Path
    first: int
    """The first step that it saves."""
    last: int
    salt: int = 0
    """Whose tensors: those of another job differ."""
    num_ranks: int = 2
    keep: int = 1
    keep_every: int = 0
    most_bytes: tuple[int, int] = (0, 0)
    """A rank and the size that its files may have after the first step; 0 for any."""


def state_of(salt: int, step: int) -> dict[str, Tensor]:
    """The tensors of a step: every element depends on its place, the step and the salt."""
    state = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        numel = torch.Size(shape).numel()
        values = (torch.arange(numel) * (2 * salt + 3) + 7919 * step + 31 * number) % 251 - 125
        state[name] = values.to(DTYPES.get(name, torch.float32)).view(shape)
    return state


class Job:
    """A running job. Its ranks are processes of their own."""

    def __init__(self, plan: Plan, scratch: Path) -> None:
        """Start it. `scratch` is for the ranks' rendezvous, and no other job's."""
        self.plan = plan
        context = start_context("cpu")
        self._marks, sender = context.Pipe(duplex=False)
        self.ranks = [
            context.Process(target=_rank_main, args=(plan, rank, str(scratch), sender), daemon=True)
            for rank in range(plan.num_ranks)
        ]
        for rank in self.ranks:
            rank.start()
        sender.close()
        self.marks: list[Mark] = []

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()
        self._marks.close()

    def wait_for(self, phase: str, step: int) -> bool:
        """Wait until it comes there; False if it ended before."""
        while Mark(phase, step) not in self.marks:
            if not self._receive():
                return False
        return True

    def kill(self, *numbers: int) -> None:
        """SIGKILL some ranks, all by default. Those that are left get a moment to notice, and go as well."""
        for number in numbers or range(len(self.ranks)):
            self.ranks[number].kill()
        deadline = time.monotonic() + (2.0 if numbers else 0.0)
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
            rank.kill()
            rank.join()
        self.finish()

    def signal(self, number: int, what: signal.Signals) -> None:
        """Send one rank a signal, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.ranks[number].pid, what)

    def finish(self) -> None:
        """Wait for the end of all ranks."""
        while self._receive():
            pass
        for rank in self.ranks:
            rank.join(PATIENCE_S)
            assert not rank.is_alive(), "a rank did not end"

    @property
    def saved(self) -> int:
        """The newest step that the job said to be saved; 0 for none."""
        return max((mark.step for mark in self.marks if mark.phase == "saved"), default=0)

    @property
    def errors(self) -> list[str]:
        """What its ranks ended with."""
        return [mark.phase for mark in self.marks if mark.phase not in (*PHASES, "saved", DONE)]

    def _receive(self) -> bool:
        if self._marks.closed or not wait([self._marks], PATIENCE_S):
            return False
        try:
            self.marks.append(self._marks.recv())
        except (EOFError, OSError, pickle.UnpicklingError):
            return False
        return True


def _rank_main(plan: Plan, rank: int, scratch: str, sender: Connection) -> None:
    """A rank, as a process that does not wait for others when it ends."""
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{scratch}/rendezvous", plan.num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=plan.num_ranks)
        _save_all(plan, rank, sender)
        sender.send(Mark(DONE, rank))
    except BaseException as error:
        # A peer that was killed ends this one too.
        text = f"{'named' if isinstance(error, CheckpointError) else type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            sender.send(Mark(text, rank))
    finally:
        os._exit(0)


def _save_all(plan: Plan, rank: int, sender: Connection) -> None:
    snapshot = build_snapshot(torch.device("cpu"))
    state = {name: torch.empty_like(tensor) for name, tensor in state_of(0, 0).items()}

    def mark(phase: str, step: int) -> None:
        if rank == 0:
            sender.send(Mark(phase, step))

    for step in range(plan.first, plan.last + 1):
        for name, tensor in state_of(plan.salt, step).items():
            state[name].copy_(tensor)
        if plan.most_bytes[0] == rank and plan.most_bytes[1] and step > plan.first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (plan.most_bytes[1],) * 2)
        mark("snapshot", step)
        manifest = Manifest(step=step, files={}, facts={}, num_updates=step)
        contents = Contents(manifest=manifest, texts={folders.CONFIG: CONFIG})
        pieces = list(_pieces(state, rank, plan.num_ranks))
        saving = Saving(plan.root, contents, snapshot, lambda pieces=pieces: pieces, NUM_WRITERS)
        mark("write", step)
        # Training goes on: what is saved must be what was there before.
        snapshot.wait_to_update()
        for tensor in state.values():
            tensor.fill_(-1)
        saving.wait()
        assert saving.advance() is None
        mark("commit", step)
        saving.wait()
        assert saving.advance() is not None
        mark("saved", step)
        mark("prune", step)
        on_first_rank(lambda step=step: _tidy(plan, step))


def _tidy(plan: Plan, step: int) -> None:
    """What a run does when a step was taken from the newest."""
    folders.mark_proven(plan.root, step)
    folders.prune(plan.root, plan.keep, plan.keep_every)


def _pieces(state: dict[str, Tensor], rank: int, num_ranks: int) -> Iterator[Any]:
    """This rank's share of each tensor."""
    for name, tensor in state.items():
        numel = tensor.numel()
        start, stop = rank * numel // num_ranks, (rank + 1) * numel // num_ranks
        part = Part(name, tensor.dtype, tuple(tensor.shape), start, stop)
        yield SimpleNamespace(part=part, tensor=tensor.view(-1)[start:stop], is_buffer="bias" in name)
