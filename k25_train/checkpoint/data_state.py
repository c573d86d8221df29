"""`data_state.json` of a checkpoint: how far the data have been read, and the mixtures they were read in.

A few KB, written by the first rank. With it a run goes on at once, whatever the step; without it the plans of
all steps before have to be made again. Needs no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import yaml

from k25_train.checkpoint import folders
from k25_train.checkpoint.continuity import saved_config
from k25_train.checkpoint.manifest import read_manifest
from k25_train.checkpoint.storage.kinds import Place
from k25_train.checkpoint.storage.places import storage_of
from k25_train.compose.resolve import to_yaml
from k25_train.config.schema import Config
from k25_train.errors import CheckpointError

FORMAT_VERSION = 1
MOST_MIXTURES = 64
"""Mixtures that are remembered, the latest ones. Our choice."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """How sources are mixed from a step on, as the configuration says it."""

    from_step: int
    """First step, counted from 1, that was drawn so."""
    sources: Mapping[str, Mapping[str, float | None]]
    """Source -> its `weight` and its limit of `epochs`."""
    vision_ratio: float | None
    """`data.vision_ratio`."""
    schedule: Mapping[str, Any]
    """`data.schedule`."""


@dataclass(frozen=True, slots=True)
class DataState:
    """What a checkpoint knows of its data."""

    loader: Mapping[str, Any]
    """Where the loader is, as it says it itself (`HostInputs.state_after`); empty if that is not known."""
    mixtures: Sequence[Mixture]
    """Of the run up to here, the current one last."""

    def to_text(self) -> str:
        """As it is written."""
        mixtures = [asdict(each) for each in self.mixtures[-MOST_MIXTURES:]]
        return json.dumps({"format_version": FORMAT_VERSION, "loader": self.loader, "mixtures": mixtures})

    def with_mixture(self, mixture: Mixture) -> "DataState":
        """The same with another mixture, unless it is the current one."""
        if self.mixtures and not changes(self.mixtures[-1], mixture):
            return self
        return DataState(self.loader, [*self.mixtures, mixture])


def mixture_of(config: Config, from_step: int) -> Mixture:
    """The mixture that a configuration asks for."""
    return _mixture_in(yaml.safe_load(to_yaml(config)), from_step)


def read_data_state(folder: Place) -> DataState:
    """What a checkpoint says of its data, with the mixture of its configuration if it has no file of them.

    Raises `CheckpointError` if the file is not what a run writes, or of a later format.
    """
    path = folder / folders.DATA_STATE
    if folders.DATA_STATE not in read_manifest(folder).files:
        return DataState({}, [_mixture_in(saved_config(folder / folders.CONFIG), 1)])
    try:
        values = json.loads(storage_of(path).read(path))
        if values["format_version"] > FORMAT_VERSION:
            raise CheckpointError(
                f"{path}: has format {values['format_version']}, but this version reads 1 to "
                f"{FORMAT_VERSION}: go on with the code that wrote it, or a later one"
            )
        return DataState(dict(values["loader"]), [Mixture(**each) for each in values["mixtures"]])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: unreadable ({type(error).__name__}: {error})") from error


def changes(before: Mixture, now: Mixture) -> list[str]:
    """A line for each difference between two mixtures, old -> new; none if they mix alike."""
    names = sorted({*before.sources, *now.sources})
    lines = [_change_of(name, before.sources.get(name), now.sources.get(name)) for name in names]
    if before.vision_ratio != now.vision_ratio:
        lines.append(f"vision_ratio {before.vision_ratio} -> {now.vision_ratio}")
    if before.schedule != now.schedule:
        lines.append(f"schedule {dict(before.schedule)} -> {dict(now.schedule)}")
    return [line for line in lines if line]


def _change_of(
    name: str, before: Mapping[str, float | None] | None, now: Mapping[str, float | None] | None
) -> str:
    if before == now:
        return ""
    if before is None or now is None:
        was, is_now = ("no source", _told(now)) if before is None else (_told(before), "left out")
        return f"{name}: {was} -> {is_now}"
    return f"{name}: {_told(before)} -> {_told(now)}"


def _told(source: Mapping[str, float | None] | None) -> str:
    """Weight, and limit of epochs if there is one."""
    values = source or {}
    limit = f", at most {values['epochs']:g} epochs" if values.get("epochs") is not None else ""
    return f"weight {values.get('weight'):g}{limit}"


def _mixture_in(values: Mapping[str, Any], from_step: int) -> Mixture:
    """The mixture in the plain values of a configuration."""
    data = values["data"]
    sources = {
        name: {"weight": float(source.get("weight", 1.0)), "epochs": source.get("epochs")}
        for name, source in data["sources"].items()
    }
    return Mixture(from_step, sources, data.get("vision_ratio"), data.get("schedule") or {})
