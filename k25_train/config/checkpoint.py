"""When the state of a run is saved, where, what stays of it, and which weights a run starts from."""

import re
from dataclasses import dataclass
from enum import Enum

from k25_train.config.basics import FILL_IN, not_from_home, not_negative
from k25_train.config.parts import ModelPart
from parallel.config import Problem, not_positive

MAX_UNSOUND = 2
"""Unsound checkpoints that stay on disk, the newest ones: the state that a run stopped in, and the checkpoint
before it, whose weights turned out to be ruined."""
EXTRA_CHECKPOINTS = 1 + MAX_UNSOUND
"""Checkpoints on disk, at most, in addition to `checkpoint.keep`: one is new and not proven yet."""
INIT_PARTS = tuple(part.value for part in ModelPart)
"""Parts of the model that can start from weights of their own: the first words of their tensors' names."""
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?) ?(s|min|h)")


class Verify(Enum):
    """What is compared with the checksums when a checkpoint is loaded."""

    full = "full"
    """Every byte that is read, and the sizes of all files."""
    sizes = "sizes"
    """The sizes of all files, and the content of the small ones."""


@dataclass(slots=True, kw_only=True)
class CheckpointConfig:
    """When the state of the run is saved, and how many checkpoints are kept."""

    interval: int | str
    """Steps between checkpoints, or time between them with its unit, as `30min`, `2h` or `90s`; the last step
    and SIGTERM save as well."""
    keep: int
    """Number of sound checkpoints that stay on disk, the newest ones. There is one more until a step proves
    the newest good, and up to two that were set aside as unsound."""
    keep_every: int
    """Every so-many-th checkpoint of the run stays for ever, in addition to the newest; 0 for none."""
    dir: str | None
    """Folder of the checkpoints, which all nodes share, or its URL in an object store (`s3://…`); null for
    `checkpoints` in the run folder."""
    local_dir: str | None
    """Folder on a disk of each node for checkpoints that survive the job but not the node; null for none."""
    local_interval: int | str
    """Steps or time between checkpoints on the nodes' own disks."""
    asynchronous: bool
    """Whether files are written while training goes on; the step waits for the copy of the state alone."""
    writers: int
    """Files that a rank writes, and reads, at a time."""
    verify: Verify
    """What is compared with the checksums when a checkpoint is loaded."""
    resume: bool
    """Whether a run whose folder holds checkpoints resumes from the newest sound one."""
    accept_changed_data: bool
    """Whether a run resumes although its shard set or tokenizer is not what it was: the next step is then not
    the one that an uninterrupted run would take."""
    accept_unsound: bool
    """Whether a run resumes from its newest checkpoint even if that one was set aside as unsound."""
    init_from: str | None
    """Checkpoint or import whose weights a new run starts from; null for random ones. Its step is not taken
    over, its optimizer state with `init_optimizer` alone. A run that has a checkpoint of its own resumes from
    that."""
    init_optimizer: bool
    """Whether the moments of the checkpoint `init_from` come along with its weights, for all that both runs
    train; what starts fresh, from `init_parts` or `init_fresh`, has none yet. Source: not disclosed, our
    choice."""
    init_parts: dict[str, str]
    """Part of the model (`language_model`, `vision_tower`, `mm_projector`) -> checkpoint or import that it
    starts from instead of `init_from`."""
    init_fresh: list[str]
    """Names of the model's tensors that start from random weights though a source is given, since it lacks
    them: patterns as of a shell (`mm_projector.*`). Others must all be found."""
    init_leave_out: list[str]
    """Names of tensors that a source holds and the model has no place for: patterns as of a shell. Others are
    an error."""

    @property
    def interval_steps(self) -> int | None:
        """Steps between checkpoints; None if time counts."""
        return steps_of(self.interval)

    @property
    def interval_s(self) -> float | None:
        """Seconds between checkpoints; None if steps count."""
        return seconds_of(self.interval)

    @property
    def has_initial_weights(self) -> bool:
        """Whether a new run starts from weights of a file, in part at least."""
        return self.init_from is not None or bool(self.init_parts)

    def open_sources(self) -> dict[str, str]:
        """Key -> what a template says in the place of weights that the user has to name."""
        places = {"checkpoint.init_from": self.init_from or ""}
        places |= {f"checkpoint.init_parts.{part}": path for part, path in self.init_parts.items()}
        return {key: path for key, path in places.items() if path.startswith(FILL_IN)}

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_positive(self, ("keep", "writers")) + not_negative(self, ("keep_every",))
        for key in ("interval", "local_interval"):
            value = getattr(self, key)
            if not (steps_of(value) or seconds_of(value) or 0) > 0:
                rule = "must be a number of steps of at least 1, or a time with its unit"
                found.append(Problem(key, value, rule, "use 500, 90s, 30min or 2h"))
        if not self.has_initial_weights and (self.init_fresh or self.init_leave_out):
            key = "init_fresh" if self.init_fresh else "init_leave_out"
            rule = "says how weights of a file are taken, but no file is named"
            found.append(Problem(key, getattr(self, key), rule, "name one: checkpoint.init_from=DIR"))
        if self.init_optimizer and self.init_from is None:
            rule = "takes the optimizer state of a checkpoint, but none is named"
            found.append(Problem("init_optimizer", True, rule, "name one: checkpoint.init_from=DIR"))
        for part in self.init_parts:
            if part not in INIT_PARTS:
                rule = "is not a part of the model that can start from weights of its own"
                found.append(
                    Problem(
                        f"init_parts.{part}",
                        self.init_parts[part],
                        rule,
                        f"use one of {', '.join(INIT_PARTS)}",
                    )
                )
        return found + not_from_home(self, ("dir", "local_dir", "init_from"))


def steps_of(interval: int | str) -> int | None:
    """Steps of an interval; None if it is a time, or nothing that is understood."""
    text = str(interval)
    return int(text) if text.isascii() and text.isdigit() else None


def seconds_of(interval: int | str) -> float | None:
    """Seconds of an interval; None if it counts steps, or is nothing that is understood."""
    match = _TIME.fullmatch(str(interval))
    return float(match[1]) * _SECONDS[match[2]] if match else None
