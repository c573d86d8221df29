"""Where the training stream is: what a checkpoint keeps of it, a few KB of JSON for a hundred sources."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from k25_train.errors import DataError

STATE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePosition:
    """The next sequence of a source, and what came before."""

    epoch: int = 0
    """Passes over all items that are done."""
    window: int = 0
    """Windows of the epoch that are done."""
    sequence: int = 0
    """Sequences of the window that are done."""
    num_items: int = 0
    """Items that an epoch has: windows of another number are other ones."""
    carried: tuple[int, ...] = ()
    """Items that the window before this one left to it (`stream.Window.left`)."""
    seq_len: int = 0
    """Tokens of a sequence: windows are packed in another way for another length."""
    epochs_used: float = 0.0
    """Passes over all items, with the part of the one that has begun."""
    num_sequences: int = 0
    """Sequences served."""
    num_tokens: int = 0
    """Tokens served, without padding."""
    tokens_of_mix: int = 0
    """Of them those served since the mixture last changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """The mixture that holds in a step."""

    weights: Mapping[str, float]
    """Source -> its weight, of all with a positive one."""
    vision_ratio: float | None
    """Share of the tokens in sequences of sources with media; None leaves it to the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderState:
    """What the plan of the next step follows from, with the configuration."""

    step: int = 0
    """The next step, counted from 0."""
    mix: Mix = field(default_factory=lambda: Mix(weights={}, vision_ratio=None))
    """The mixture of the step before."""
    sources: Mapping[str, SourcePosition] = field(default_factory=dict)
    """Every source that has served anything, also those that are no longer in the mixture."""

    def to_json(self) -> dict[str, Any]:
        """As `from_json` reads it."""
        return {
            "version": STATE_VERSION,
            "step": self.step,
            "mix": asdict(self.mix),
            "sources": {name: asdict(position) for name, position in self.sources.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LoaderState":
        """Raises DataError for what this version cannot read."""
        version = content.get("version")
        if version != STATE_VERSION:
            raise DataError(
                f"the state of the data in the checkpoint is of version {version}, this code reads "
                f"{STATE_VERSION}: resume with the version of the code that wrote it"
            )
        try:
            sources = {name: _position_of(fields) for name, fields in content["sources"].items()}
            return cls(step=int(content["step"]), mix=Mix(**content["mix"]), sources=sources)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"the state of the data in the checkpoint is malformed: {error!r}") from error

    def with_mix(self, mix: Mix) -> "LoaderState":
        """The same, with the clocks of the mixture at 0 if it is another one."""
        if mix == self.mix:
            return self
        sources = {name: replace(position, tokens_of_mix=0) for name, position in self.sources.items()}
        return replace(self, mix=mix, sources=sources)


def _position_of(fields: Mapping[str, Any]) -> SourcePosition:
    return SourcePosition(**{**fields, "carried": tuple(map(int, fields.get("carried", ())))})
