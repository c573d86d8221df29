"""Which tensors of a new run come from which source, and which may: by names and configuration alone."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from k25_train.checkpoint import folders
from k25_train.checkpoint.continuity import saved_config
from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.checkpoint.initial_models import differences
from k25_train.checkpoint.pieces import MASTER, OPTIMIZER_STATE
from k25_train.checkpoint.storage.kinds import Place
from k25_train.config.checkpoint import INIT_PARTS, CheckpointConfig
from k25_train.config.model import ModelConfig
from k25_train.errors import CheckpointError

MASTERS = f"{OPTIMIZER_STATE}.{MASTER}."
_MOST_TOLD = 8


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the parts of the model that come from it."""

    folder: Place
    """Where it is."""
    parts: tuple[str, ...]
    """First words of the names of tensors."""
    stored: StoredCheckpoint
    """What it holds."""
    gives_state: bool = False
    """Whether moments come along with the weights."""

    @cached_property
    def moments(self) -> dict[str, set[str]]:
        """Weight that comes from it with moments -> the keys of these."""
        found: dict[str, set[str]] = {}
        for name in self.stored.tensors if self.gives_state else ():
            if name.startswith(f"{OPTIMIZER_STATE}.") and not name.startswith(MASTERS):
                _, _, key, weight = name.split(".", 3)
                if self.takes(weight):
                    found.setdefault(weight, set()).add(key)
        return found

    def takes(self, name: str) -> bool:
        """Whether a tensor of this name comes from it."""
        return name.split(".", 1)[0] in self.parts

    def weights(self) -> list[str]:
        """Weights and buffers that it has of these parts."""
        return [name for name in self.stored.tensors if self.takes(name)]

    def name_of(self, name: str) -> str:
        """The tensor to read for one of the model: its float32 master if there is one, else itself."""
        return f"{MASTERS}{name}" if f"{MASTERS}{name}" in self.stored.tensors else name


def sources_of(settings: CheckpointConfig) -> dict[str, tuple[str, ...]]:
    """Folder -> the parts of the model that come from it."""
    chosen = {part: settings.init_parts.get(part, settings.init_from) for part in INIT_PARTS}
    folders_in_order = dict.fromkeys(folder for folder in chosen.values() if folder is not None)
    return {
        folder: tuple(part for part, source in chosen.items() if source == folder)
        for folder in folders_in_order
    }


@dataclass(frozen=True, slots=True)
class InitPlan:
    """Which tensors come from where."""

    fresh: frozenset[str]
    """Those of the model that keep their random values."""
    lines: tuple[str, ...]
    """For people."""


def plan_of(sources: Sequence[Source], names: Iterable[str], settings: CheckpointConfig) -> InitPlan:
    """Compare what the model has with what the sources have.

    Args:
        sources: each part in one of them at most.
        names: of the model's weights and buffers.
        settings: patterns of what may be fresh and left out.

    Raises CheckpointError that lists what is neither found nor named, what is left over, and unused patterns.
    """
    model = list(names)
    fresh = {name for name in model if _is_named(name, settings.init_fresh)}
    wanted = set(model) - fresh
    lacking = [line for name in model if name in wanted for line in _lacking(name, sources)]
    left: list[str] = []
    lines = []
    for source in sources:
        rest = [name for name in source.weights() if name not in wanted]
        left += [
            f"{name}: in {source.folder}, not in the model"
            for name in rest
            if name not in fresh and not _is_named(name, settings.init_leave_out)
        ]
        lines.append(_line(source, [name for name in model if name in wanted and source.takes(name)], rest))
    stored = [name for source in sources for name in source.weights()]
    unused = [each for each in settings.init_fresh if not _means_any(each, model)]
    unused += [each for each in settings.init_leave_out if not _means_any(each, stored)]
    problems = _listed("have no source", lacking, "checkpoint.init_fresh=[PATTERN]")
    problems += _listed("have no place", left, "checkpoint.init_leave_out=[PATTERN]")
    if unused:
        problems.append(f"checkpoint.init_fresh and init_leave_out: {', '.join(unused)} means no tensor")
    if problems:
        raise CheckpointError("\n".join(["the weights to start from do not fit the model:", *problems]))
    if fresh:
        some = [name for name in model if name in fresh]
        more = f" and {len(some) - 3:,} more" if len(some) > 3 else ""
        lines.append(f"{len(some):,} tensors start from random values: {', '.join(some[:3])}{more}")
    return InitPlan(frozenset(fresh), tuple(lines))


def check_model(folder: Place, model: ModelConfig, parts: Sequence[str]) -> list[str]:
    """Compare the model that a source's weights were trained in; returns a note for each allowed difference.

    Keys of the vision section count where a part of vision is taken, the others where the language model is.

    Raises CheckpointError naming each key that must not differ.
    """
    section = saved_config(folder / folders.CONFIG).get("model")
    if not isinstance(section, dict):
        raise CheckpointError(f"{folder / folders.CONFIG}: has no model section")
    wrong, allowed = differences(section, model, parts, str(folder))
    if wrong:
        raise CheckpointError(
            "\n  ".join([f"{folder} holds weights of another model:", *wrong])
            + "\n  -> choose its model, or another source"
        )
    return allowed


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _means_any(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _lacking(name: str, sources: Sequence[Source]) -> Iterator[str]:
    """A line if nothing gives a tensor of the model."""
    source = next((each for each in sources if each.takes(name)), None)
    if source is None:
        yield f"{name}: no source is named for its part"
    elif source.name_of(name) not in source.stored.tensors:
        yield f"{name}: not in {source.folder}"


def _line(source: Source, taken: Sequence[str], rest: Sequence[str]) -> str:
    num_masters = sum(source.name_of(name) != name for name in taken)
    masters = f", {num_masters:,} of them as float32 masters" if num_masters else ""
    left = f"; {len(rest):,} left out" if rest else ""
    return f"{', '.join(source.parts)}: {len(taken):,} tensors from {source.folder}{masters}{left}"


def _listed(what: str, lines: Sequence[str], remedy: str) -> list[str]:
    if not lines:
        return []
    shown = "\n  ".join(lines[:_MOST_TOLD])
    rest = f"\n  and {len(lines) - _MOST_TOLD:,} more" if len(lines) > _MOST_TOLD else ""
    return [f"{len(lines):,} tensors {what}:\n  {shown}{rest}\n  -> name those that may: {remedy}"]
