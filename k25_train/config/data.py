"""The data's configuration: shard set, tokenizer and mixture."""

from dataclasses import dataclass
from enum import Enum
from math import inf

from k25_train.config.basics import not_from_home, not_negative
from parallel.config import Problem, not_positive

SAMPLE_KINDS = ("text", "caption", "ocr", "video")
"""The kinds of sample that a shard set holds and `data.blend` gives shares to."""


RESCALE = "rescale the shares, or give all of them: data.blend={text: 0.5, caption: 0.5}"


class ReadIn(Enum):
    """Where batches are planned, read and decoded."""

    process = "process"
    """In a process of each rank's own, next to the one that trains. Needs Linux."""
    thread = "thread"
    """In a thread of the process that trains, which it delays while kernels are launched."""


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Shard set, tokenizer, mixture and order of samples."""

    dir: str
    """Folder of the shard set (`dataset.json`, shards, indices)."""
    tokenizer: str | None
    """Path of a `tokenizer.json` or of a Kimi `tiktoken.model`; null is the shard set's own."""
    blend: dict[str, float]
    """Share of the sequences by sample kind (text, caption, ocr, video); kinds left out are not read. Source:
    held constant through training, ratio not disclosed (K2.5, section 4.1)."""
    shuffle: bool
    """Whether samples are drawn in an order that depends on the seed."""
    max_skipped_samples: int
    """Undecodable samples that a run tolerates; one more stops it."""
    prefetch_steps: int
    """Steps whose batches are prepared ahead of use; 0 prepares each when it is needed."""
    read_in: ReadIn
    """Where that is done (`process` or `thread`); batches are the same. Our choice."""
    limit_samples: int | None
    """Number of samples of each kind that are used, the first ones; null is all of them."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_negative(self, ("max_skipped_samples", "prefetch_steps"))
        found += not_from_home(self, ("dir", "tokenizer"))
        if "\0" in self.dir or not self.dir.strip():
            found.append(
                Problem("dir", self.dir, "must name a folder", "build one: python -m k25_train.data build")
            )
        if self.limit_samples is not None:
            found += not_positive(self, ("limit_samples",))
        for kind, share in self.blend.items():
            if kind not in SAMPLE_KINDS:
                rule = f"is not a kind of sample; known kinds: {', '.join(SAMPLE_KINDS)}"
                found.append(Problem(f"blend.{kind}", share, rule, "correct or remove it"))
            if not 0 < share < inf:
                remedy = "leave out a kind that is not wanted: ~data.blend." + kind
                found.append(Problem(f"blend.{kind}", share, "must be positive", remedy))
        total = sum(self.blend.values())
        if abs(total - 1) > 1e-6:
            found.append(Problem("blend", self.blend, f"shares must sum to 1, not {total:g}", RESCALE))
        return found
