"""Named sources of samples, and how the mixture of them changes. Torch-free, like all of `config`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from k25_train.config.basics import is_url, not_from_home
from parallel.config import Problem

SAMPLE_KINDS = ("text", "caption", "ocr", "video")
"""The kinds of sample that a shard set distinguishes."""
GLOB = re.compile(r"[*?\[{]")
"""Where a pattern begins in a path."""


class SourceFormat(Enum):
    """How the samples of a source are stored."""

    shards = "shards"
    """What `k25-data build` writes: tar shards with `dataset.json`."""
    indexed = "indexed"
    """megatron-core's tokens: PREFIX.bin with PREFIX.idx."""
    webdataset = "webdataset"
    """Tar shards whose members with the same stem are a sample."""
    energon = "energon"
    """Tar shards that megatron-energon has prepared (`.nv-meta`)."""
    chat = "chat"
    """JSON lines of conversations."""


@dataclass(slots=True, kw_only=True)
class SourceConfig:
    """One source. Only `format` and `path` have to be given."""

    format: SourceFormat
    """How it is stored."""
    path: str
    """Folder, prefix or glob, with `{a,b}` and `{000..999}` for many, below `data.dir` unless it is absolute;
    or a URL."""
    index: str | None = None
    """File with its index; null is next to the data."""
    kinds: list[str] = field(default_factory=list)
    """Of a shard set, the kinds of sample that are read; none named is all."""
    weight: float = 1.0
    """Its tokens in relation to those of the other sources."""
    epochs: float | None = None
    """How often its samples may be read; null is as often as the run wants."""
    heldout: int = 0
    """Samples that are held out of training for evaluations, evenly spread. Shard sets and energon's folders
    have splits of their own, and so have conversations of which some are in a file or folder `heldout`."""
    licence: str = ""
    """A note on what its licence allows."""

    @property
    def is_folder(self) -> bool:
        """Whether its path names a folder, not files in one."""
        names_files = self.format in (SourceFormat.indexed, SourceFormat.chat) or self.path.endswith(".tar")
        return not names_files and not GLOB.search(self.path)

    @property
    def may_have_media(self) -> bool:
        """Whether its samples may have images or video, as far as the configuration tells."""
        return self.format is not SourceFormat.indexed and self.kinds != ["text"]

    @property
    def has_own_splits(self) -> bool:
        """Whether the data themselves say what is held out."""
        return self.format in (SourceFormat.shards, SourceFormat.energon)


@dataclass(slots=True, kw_only=True)
class MixFrom:
    """The mixture from a step on, until another of the schedule begins."""

    from_step: int
    """First step, counted from 1, that is drawn so."""
    weights: dict[str, float] = field(default_factory=dict)
    """Source -> its weight from there on; those not named keep theirs."""
    vision_ratio: float | None = None
    """`data.vision_ratio` from there on; null keeps it."""


def source_path(folder: str, path: str) -> str:
    """Where a source is: its path below `data.dir`, or itself if it is absolute or a URL."""
    if path.startswith("/") or is_url(path):
        return path
    return folder if path == "." else f"{folder.rstrip('/')}/{path}"


def folder_of(path: str) -> str:
    """The folder that holds all files of a prefix or glob."""
    before = GLOB.split(path, maxsplit=1)[0]
    return before.rpartition("/")[0] or ("/" if before.startswith("/") else ".")


def sources_problems(
    sources: Mapping[str, SourceConfig], vision_ratio: float | None, schedule: Mapping[str, MixFrom]
) -> list[Problem]:
    """Every rule of the sources and their mixture that is broken; keys are relative to `data`."""
    found = [each for name, source in sources.items() for each in _source_problems(name, source)]
    weights = {name: source.weight for name, source in sources.items()}
    found += _weights_problems("sources", weights) + _ratio_problems("vision_ratio", vision_ratio)
    first_steps: dict[int, str] = {}
    for name, mix in schedule.items():
        key = f"schedule.{name}"
        found += _unknown_sources(f"{key}.weights", mix.weights, sources)
        found += _weights_problems(f"{key}.weights", weights | mix.weights)
        found += _ratio_problems(f"{key}.vision_ratio", mix.vision_ratio)
        if mix.from_step < 1:
            found.append(Problem(f"{key}.from_step", mix.from_step, "must be positive", "count steps from 1"))
        if mix.from_step in first_steps:
            rule = f"is the first step of {first_steps[mix.from_step]}, too"
            found.append(Problem(f"{key}.from_step", mix.from_step, rule, "leave one of them out"))
        first_steps.setdefault(mix.from_step, name)
    return found


def _source_problems(name: str, source: SourceConfig) -> list[Problem]:
    found = not_from_home(source, ("path", "index"))
    if "\0" in source.path or not source.path.strip():
        found.append(Problem("path", source.path, "must name files or a folder", "use . for data.dir itself"))
    if not 0 <= source.weight < inf:
        remedy = f"leave a source out that is not wanted: ~data.sources.{name}"
        found.append(Problem("weight", source.weight, "must not be negative", remedy))
    if source.epochs is not None and source.epochs <= 0:
        found.append(Problem("epochs", source.epochs, "must be positive", "use null for no limit"))
    if source.heldout < 0:
        found.append(Problem("heldout", source.heldout, "must not be negative", "use 0 or more"))
    if source.heldout and source.has_own_splits:
        rule = f"is not for format={source.format.value}, whose files say what is held out"
        found.append(Problem("heldout", source.heldout, rule, "leave it out"))
    if source.kinds and source.format is not SourceFormat.shards:
        found.append(Problem("kinds", source.kinds, "are only for format=shards", "leave them out"))
    for kind in source.kinds:
        if kind not in SAMPLE_KINDS:
            rule = f"is not a kind of sample; known kinds: {', '.join(SAMPLE_KINDS)}"
            found.append(Problem("kinds", kind, rule, "correct or remove it"))
    return [each._replace(key=f"sources.{name}.{each.key}") for each in found]


def _weights_problems(key: str, weights: Mapping[str, float]) -> list[Problem]:
    if any(weight > 0 for weight in weights.values()):
        return []
    rule = "need at least one with a positive weight"
    return [Problem(key, list(weights), rule, "name one: data.sources.NAME={format: indexed, path: PREFIX}")]


def _unknown_sources(key: str, names: Iterable[str], sources: Mapping[str, SourceConfig]) -> list[Problem]:
    rule = f"is none of data.sources: {', '.join(sources)}"
    return [
        Problem(f"{key}.{name}", None, rule, "correct or remove it") for name in names if name not in sources
    ]


def _ratio_problems(key: str, ratio: float | None) -> list[Problem]:
    if ratio is None or 0 < ratio < 1:
        return []
    remedy = "use null, and only sources of the kind that is wanted"
    return [Problem(key, ratio, "must be between 0 and 1", remedy)]
