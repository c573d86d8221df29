"""How long passes take: a forward or backward pass of a chunk alone, or two overlapped; torch-free.

A pass is simulated with its kernels, exchanges, copies and messages on a device's streams (`lanes.py`), in
the order of the code that runs it (`pass_program.py`). The host runs ahead of the device, from pass to
pass too; where it waits for the device, or needs longer than the device does, the device waits for it. A
coupled tower and a slow node are not in it (`step_durations.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from k25_train.plan.cause import Cause
from k25_train.plan.kernels.work import Setting
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.time.chunk_nodes import ChunkKind, Device
from k25_train.plan.time.lanes import Resource, Run, run_tasks
from k25_train.plan.time.nodes import Node
from k25_train.plan.time.pass_program import (
    COMPUTE,
    EXCHANGES,
    FROM_HOST,
    HOST,
    LATENTS,
    MESSAGES,
    TO_HOST,
    PassProgram,
)

BUSY = {
    "nvlink": Resource.nvlink,
    "network": Resource.network,
    "to the host": Resource.to_host,
    "from the host": Resource.from_host,
}
"""Name in reports -> resource. The host's two are directions of the device's link, network traffic included
where it takes the same one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTime:
    """A pass, or two overlapped ones."""

    seconds: float
    """Until its rank can start another."""
    parts: Mapping[Cause, float]
    """Cause -> seconds; they add up."""
    busy_s: Mapping[str, float]
    """Resource -> seconds of these in which it is in use: compute and the names of `BUSY`."""
    message_s: float
    """From its end until the next stage has its output, or the one before its gradient; of two the longer."""


class PassTimes:
    """The passes of a pipeline; implements `parallel.pipeline.timeline.Durations`. Chunks are counted in
    pipeline order (chunk = vp_stage * pp + stage)."""

    def __init__(self, pipeline: PipelinePlan) -> None:
        self.pipeline = pipeline
        self._device = Device(Setting.of(pipeline.stages[0]))
        self._found: dict[tuple[ChunkKind | None, ChunkKind | None], PassTime] = {}

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole pipeline."""
        return self.pipeline.layout.pp * self.pipeline.layout.vpp

    def alone_s(self, chunk: int, *, is_forward: bool) -> float:
        """Seconds of a pass that runs by itself."""
        return self.alone(chunk, is_forward=is_forward).seconds

    def pair_s(self, forward_chunk: int, backward_chunk: int) -> float:
        """Seconds of two passes that run overlapped."""
        return self.pair(forward_chunk, backward_chunk).seconds

    def message_s(self, forward_chunk: int | None, backward_chunk: int | None) -> float:
        """Seconds from the end of a pass, or of two, until the other stage has what it gives."""
        if forward_chunk is not None and backward_chunk is not None:
            return self.pair(forward_chunk, backward_chunk).message_s
        chunk = forward_chunk if backward_chunk is None else backward_chunk
        assert chunk is not None, "a pass has a chunk"
        return self.alone(chunk, is_forward=backward_chunk is None).message_s

    def alone(self, chunk: int, is_forward: bool) -> PassTime:
        """A pass that runs by itself."""
        kind = self.kind(chunk)
        return self.of_kinds(kind, None) if is_forward else self.of_kinds(None, kind)

    def pair(self, forward_chunk: int, backward_chunk: int) -> PassTime:
        """A forward and a backward pass of one rank that run as one; without `overlap_expert_comm` one after
        the other."""
        if self.pipeline.config.parallelism.overlap_expert_comm:
            return self.of_kinds(self.kind(forward_chunk), self.kind(backward_chunk))
        return _after(
            self.alone(forward_chunk, is_forward=True), self.alone(backward_chunk, is_forward=False)
        )

    def kind(self, chunk: int) -> ChunkKind:
        """What a chunk's times depend on."""
        vp_stage, stage = divmod(chunk, self.pipeline.layout.pp)
        plan = self.pipeline.stages[stage].chunks[vp_stage]
        is_moe = [self.pipeline.config.model.is_moe(layer) for layer in plan.layers]
        return ChunkKind(len(is_moe) - sum(is_moe), sum(is_moe), plan.is_first, plan.is_last)

    def of_kinds(self, forward: ChunkKind | None, backward: ChunkKind | None) -> PassTime:
        """A pass of a chunk of some kind, or two that run overlapped, whatever chunks the pipeline has."""
        key = forward, backward
        if key not in self._found:
            kinds = [kind for kind in key if kind is not None]
            program = PassProgram(self._device)
            program.run(forward, backward)
            calibrated = len(kinds) * self.pipeline.config.cluster.rates.calibration.pass_ms / 1e3
            self._found[key] = _pass_time(program, calibrated)
        return self._found[key]


def pass_times(pipeline: PipelinePlan) -> PassTimes:
    """The passes of a pipeline, each simulated when it is first asked for."""
    return PassTimes(pipeline)


def _pass_time(program: PassProgram, calibrated_s: float) -> PassTime:
    """Where the time of a program goes, with what a calibration adds."""
    run = run_tasks(program.tasks)
    ends = [end for task, end in zip(run.tasks, run.ends_s, strict=True) if task.stream != MESSAGES]
    end_s = max(ends, default=0.0)
    parts: dict[Cause, float] = {}
    computed_s = 0.0
    for span in run.spans:
        seconds = min(span.seconds, end_s - span.start_s)
        if seconds <= 0:
            break
        computed_s += seconds * any(run.tasks[position].stream == COMPUTE for position, _ in span.running)
        for cause, share in _causes(run, program.nodes, span.running):
            parts[cause] = parts.get(cause, 0.0) + seconds * share
    if calibrated_s:
        parts[Cause.host] = parts.get(Cause.host, 0.0) + calibrated_s
    busy = {name: run.used_s(resource) for name, resource in BUSY.items()}
    return PassTime(
        seconds=end_s + calibrated_s,
        parts=parts,
        busy_s={"compute": computed_s, **busy},
        message_s=run.makespan_s - end_s,
    )


def _causes(run: Run, nodes: list[Node], running: tuple[tuple[int, float], ...]) -> list[tuple[Cause, float]]:
    """Cause -> share of a time: of the kernels that run, as far as they do; the rest of what slows them down
    or keeps them waiting: exchanges, then the host, then copies."""
    found: list[tuple[Cause, float]] = []
    computing = [(at, rate) for at, rate in running if run.tasks[at].stream == COMPUTE]
    others = [at for at, _ in running if run.tasks[at].stream != COMPUTE]
    rest = 1.0
    for position, rate in computing:
        rate = rate if others else 1.0
        found += _shares(nodes[position], rate)
        rest -= rate
    if rest > 0 and others:
        found += _shares(nodes[min(others, key=lambda at: _order(run.tasks[at].stream))], rest)
    return found


def _order(stream: str) -> int:
    """What passes wait for, if several run: copies only where nothing else is left; messages never, which can
    only slow others down."""
    return (EXCHANGES, LATENTS, HOST, TO_HOST, FROM_HOST, MESSAGES).index(stream)


def _shares(node: Node, share: float) -> list[tuple[Cause, float]]:
    return [(cause, share * seconds / node.seconds) for cause, seconds in node.causes.items()]


def _after(first: PassTime, second: PassTime) -> PassTime:
    """Two passes one after the other."""
    parts = {
        cause: first.parts.get(cause, 0.0) + second.parts.get(cause, 0.0)
        for cause in (*first.parts, *second.parts)
    }
    busy = {name: first.busy_s[name] + second.busy_s[name] for name in first.busy_s}
    return PassTime(
        seconds=first.seconds + second.seconds,
        parts=parts,
        busy_s=busy,
        message_s=max(first.message_s - second.seconds, second.message_s, 0.0),
    )
