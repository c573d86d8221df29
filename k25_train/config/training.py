"""The run's configuration: length, batch sizes, number format and folder."""

from dataclasses import dataclass

from k25_train.config.basics import DType, is_url, not_from_home, not_negative
from k25_train.config.batches import BatchRampConfig, BatchSchedule, batch_schedule
from k25_train.config.span import Span
from parallel.config import Problem, not_positive

COLLECTIVE_MARGIN_S = 600.0
"""How much later than `train.stall_timeout_s` collectives time out: the stall watchdog, which can say where a
job is stuck, reports first. This is the only limit for start-up and checkpoints, which it leaves alone."""


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """Length, batch sizes and number format of the run."""

    steps: int
    """Optimizer steps of the whole run; null where `tokens` says it."""
    seq_len: int
    """Tokens of a packed sequence, media tokens included. Source: 4096 in K2.5, table 3."""
    global_batch_size: int
    """Sequences of one optimizer step over all ranks, after the ramp if there is one. Source: 67M tokens in
    K2, section 2.5."""
    batch_ramp: BatchRampConfig
    """How the batch grows to `global_batch_size` at the start of the run."""
    tokens: str | None
    """Length of the whole run in tokens with a suffix, as `15.5T`, from which `steps` follows, rounded up;
    null where `steps` says it."""
    micro_batch_size: int
    """Sequences that one data-parallel rank computes at once. Source: not disclosed, our choice."""
    seed: int
    """Seed of initial weights and data order."""
    dtype: DType
    """Format of weights and activations; gradients are summed and masters kept in float32."""
    eval_interval: int
    """Steps between evaluations on held-out data."""
    eval_sequences: int
    """Held-out sequences of one evaluation: half text, half with media."""
    transformer_engine: bool
    """Whether layers of Transformer Engine replace megatron-core's own; CUDA only."""
    deterministic: bool
    """Whether CUDA computes with kernels that give the same bits in every run, which costs speed (README of
    `parallel/megatron`); the CPU does so anyway. Source: not disclosed, our choice."""
    stall_timeout_s: float
    """Seconds without progress after which a rank reports where it waits and for whom, and ends the job.
    Source: not disclosed, our choice."""
    trace_step: int | None
    """Step whose timeline over all ranks is written to the run folder, with a profile of the first rank of
    each stage; null for none."""

    @property
    def batches(self) -> BatchSchedule:
        """Sequences of each step."""
        return batch_schedule(
            self.global_batch_size,
            self.seq_len,
            self.batch_ramp.start,
            self.batch_ramp.increment,
            self.batch_ramp.length,
        )

    @property
    def collective_timeout_s(self) -> float:
        """Time limit of a collective, and of NCCL's own watchdog."""
        return self.stall_timeout_s + COLLECTIVE_MARGIN_S

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        sizes = (
            "steps",
            "seq_len",
            "global_batch_size",
            "micro_batch_size",
            "eval_interval",
            "eval_sequences",
        )
        found = not_positive(self, (*sizes, "stall_timeout_s")) + not_negative(self, ("seed",))
        found += [problem.under("batch_ramp") for problem in self.batch_ramp.problems()]
        if not found:
            found += self._length_problems()
        if self.eval_sequences % 2:
            rule = "must be even: half of them are text, half have media"
            found.append(
                Problem("eval_sequences", self.eval_sequences, rule, f"use {self.eval_sequences + 1}")
            )
        if self.trace_step is not None and not 1 <= self.trace_step <= self.steps:
            rule = f"must be a step of the run, 1 to steps ({self.steps})"
            found.append(Problem("trace_step", self.trace_step, rule, "name one, or null for no timeline"))
        return found

    def _length_problems(self) -> list[Problem]:
        """The ramp ends at the batch, and steps and tokens say the same."""
        ramp, found = self.batch_ramp, list[Problem]()
        if ramp.start is not None and ramp.start >= self.global_batch_size:
            rule = f"must be below train.global_batch_size ({self.global_batch_size}), where the ramp ends"
            found.append(Problem("batch_ramp.start", ramp.start, rule, "use less, or null for no ramp"))
        elif ramp.start is not None and (self.global_batch_size - ramp.start) % ramp.increment:
            rule = f"must divide what the batch grows by, {ramp.start} to {self.global_batch_size} sequences"
            growth = self.global_batch_size - ramp.start
            divisors = (size for size in range(1, growth + 1) if growth % size == 0)
            remedy = f"e.g. {min(divisors, key=lambda size: abs(size - ramp.increment))}"
            found.append(Problem("batch_ramp.increment", ramp.increment, rule, remedy))
        if self.tokens is None or found:
            return found
        length = Span.read(self.tokens)
        if length is None or not length.is_tokens or not length.number:
            rule = "must be a positive number of tokens with K, M, B or T"
            return [Problem("tokens", self.tokens, rule, "e.g. 67M or 15.5T, or null")]
        least = (ramp.start or self.global_batch_size) * self.seq_len
        if length.number < least:
            rule = f"must be at least the tokens of a step ({least:,})"
            return [Problem("tokens", self.tokens, rule, "train on more tokens, or use smaller batches")]
        steps = self.batches.steps_for(length.number)
        if steps != self.steps:
            rule = f"must be {steps}, which train.tokens={self.tokens} comes to"
            remedy = "use train.steps=null, or train.tokens=null to count steps"
            return [Problem("steps", self.steps, rule, remedy)]
        return []


@dataclass(slots=True, kw_only=True)
class RunConfig:
    """Where the run writes."""

    dir: str
    """Folder of config, metrics, checkpoints, logs and plots."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        if "\0" in self.dir or not self.dir.strip():
            return [Problem("dir", self.dir, "must name a folder", "e.g. run.dir=runs/smoke")]
        if is_url(self.dir):
            rule = "is a URL; a run writes to a local folder, or one that is mounted"
            return [Problem("dir", self.dir, rule, "e.g. run.dir=/shared/runs/smoke")]
        return not_from_home(self, ("dir",))
