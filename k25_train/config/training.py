"""The run's configuration: length, batch sizes, number format and folder."""

from dataclasses import dataclass

from k25_train.config.basics import DType, is_url, not_from_home, not_negative
from parallel.config import Problem, not_positive

COLLECTIVE_MARGIN_S = 600.0
"""How much later than `train.stall_timeout_s` collectives time out: the stall watchdog, which can say where a
job is stuck, reports first. This is the only limit for start-up and checkpoints, which it leaves alone."""


@dataclass(slots=True, kw_only=True)
class TrainConfig:
    """Length, batch sizes and number format of the run."""

    steps: int
    """Optimizer steps of the whole run."""
    seq_len: int
    """Tokens of a packed sequence, media tokens included. Source: 4096 in K2.5, table 3."""
    global_batch_size: int
    """Sequences of one optimizer step over all ranks. Source: 67M tokens in K2, section 2.5."""
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
        if self.eval_sequences % 2:
            rule = "must be even: half of them are text, half have media"
            found.append(
                Problem("eval_sequences", self.eval_sequences, rule, f"use {self.eval_sequences + 1}")
            )
        if self.trace_step is not None and not 1 <= self.trace_step <= self.steps:
            rule = f"must be a step of the run, 1 to steps ({self.steps})"
            found.append(Problem("trace_step", self.trace_step, rule, "name one, or null for no timeline"))
        return found


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
