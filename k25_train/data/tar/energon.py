"""Folders that megatron-energon has prepared: shards of each split, and what a sample's members are.

Source: megatron-energon 7.4.1, `flavors/webdataset`: `metadata.py`, `structs.py`, `itar_reader.py`,
`default_generic_webdataset.py`. Of `.nv-meta` are read `.info.json` (or `.info.yaml` of older versions),
`split.yaml` (or `split.json`) and `dataset.yaml`; the indexes `index.sqlite` and `*.tar.idx` are not needed.
Python that such a folder may name (`sample_loader`, `part_filter`) is not run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from k25_train.data.folder import DataFolder, MissingFileError
from k25_train.data.formats.braces import expand_braces
from k25_train.data.tar.fields import FieldLayout
from k25_train.data.tar.layouts import Layout, StemLayout
from k25_train.errors import DataError

META = ".nv-meta"
SPLITS = {"train": "train", "val": "heldout"}
"""Energon's name of a split -> ours. Others, such as `test`, are left alone."""
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError)


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergonShard:
    """A tar file of such a folder."""

    name: str
    split: str
    num_samples: int
    """As energon counted them."""
    excluded: frozenset[str]
    """Stems of samples that the split leaves out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergonFolder:
    """What `.nv-meta` says."""

    shards: tuple[EnergonShard, ...]
    """Those of `SPLITS`, split after split."""
    layout: Layout
    meta: tuple[str, ...]
    """The files that say so: what changes them makes an index stale."""


def load_energon(folder: DataFolder) -> EnergonFolder:
    """Read `.nv-meta`.

    Raises DataError, naming file and remedy, where it is missing, malformed, or asks for what is not read.
    """
    info_name, info = _read(folder, (".info.json", ".info.yaml"))
    split_name, split = _read(folder, ("split.yaml", "split.json"))
    dataset_name, dataset = _read(folder, ("dataset.yaml",))
    try:
        shards = _shards(folder, info["shard_counts"], split["split_parts"], split.get("exclude") or [])
    except _MALFORMED as error:
        raise DataError(
            f"{folder.path(META)}: its shard counts or splits are malformed ({error!r}). Run `energon "
            "prepare` again."
        ) from error
    return EnergonFolder(
        shards=shards,
        layout=layout_of(folder.path(dataset_name), dataset),
        meta=(info_name, split_name, dataset_name),
    )


def _read(folder: DataFolder, names: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """The first file that there is, and what it holds."""
    for name in (f"{META}/{each}" for each in names):
        path = folder.path(name)
        try:
            data = folder.read(folder.check_name(name))
        except MissingFileError:
            continue
        try:
            content = json.loads(data) if name.endswith(".json") else yaml.safe_load(data)
        except _MALFORMED as error:
            raise DataError(f"{path}: malformed ({error}). Run `energon prepare` again.") from error
        if not isinstance(content, dict):
            raise DataError(f"{path}: is no mapping. Run `energon prepare` again.")
        return name, content
    raise MissingFileError(
        f"{folder.path(META)}/{' or '.join(names)}: no such file, so this folder is not prepared. Run "
        f"`energon prepare {folder.directory}`, or read its shards with format=webdataset."
    )


def _shards(
    folder: DataFolder, counts: Mapping[str, int], parts: Mapping[str, list[str]], exclude: list[str]
) -> tuple[EnergonShard, ...]:
    left_out = {name for pattern in exclude for name in expand_braces(pattern)}
    split_of: dict[str, str] = {}
    for part, split in SPLITS.items():
        for name in (each for pattern in parts.get(part) or [] for each in expand_braces(pattern)):
            if name in left_out:
                continue
            if name in split_of:
                raise DataError(
                    f"{folder.path(META)}/split.yaml: {name} is named twice, in {split_of[name]} and "
                    f"{split}; samples held out must not be trained on. Correct its split_parts."
                )
            if name not in counts:
                raise DataError(
                    f"{folder.path(META)}/split.yaml: names {name}, which .info.json does not have. Run "
                    "`energon prepare` again."
                )
            split_of[folder.check_name(name)] = split
    if not split_of:
        raise DataError(
            f"{folder.path(META)}/split.yaml: has no shard in {' or '.join(SPLITS)}. Run `energon prepare` "
            "again with --split-parts or --split-ratio."
        )
    return tuple(
        EnergonShard(
            name=name,
            split=split,
            num_samples=int(counts[name]),
            excluded=frozenset(each[len(name) + 1 :] for each in left_out if each.startswith(f"{name}/")),
        )
        for name, split in split_of.items()
    )


def layout_of(path: str, dataset: Mapping[str, Any]) -> Layout:
    """What `dataset.yaml` says of a sample's members. Raises DataError for types that are not read."""
    stated = dataset.get("sample_type", dataset)
    name = stated.get("__class__") if isinstance(stated, dict) else None
    if "sample_loader" in dataset or "part_filter" in dataset:
        raise DataError(
            f"{path}: names a Python function (sample_loader), and code of a data set is not run. State a "
            "field_map, such as {image: jpg, caption: txt}, or read the shards with format=webdataset."
        )
    if name in ("CrudeWebdataset", "CrudeSample"):
        return StemLayout()
    field_map = dataset.get("field_map")
    if not isinstance(field_map, dict) or not all(isinstance(each, str) for each in field_map.values()):
        raise DataError(
            f"{path}: has no field_map from fields to members. Run `energon prepare` with --field-map."
        )
    return FieldLayout.of(path, str(name).replace("Webdataset", "Sample"), field_map)
