"""What a checkpoint says of itself, apart from its tensors."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from k25_train.checkpoint import folders
from k25_train.checkpoint.continuity import saved_config
from k25_train.checkpoint.data_state import read_data_state
from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.checkpoint.manifest import Kind, Manifest
from k25_train.checkpoint.storage.kinds import MANIFEST, Place


@dataclass(frozen=True, slots=True)
class Facts:
    """Of one checkpoint."""

    folder: str
    manifest: Manifest
    is_proven: bool
    """Whether a sound step was taken from its weights."""
    saved_at_s: float
    """When its manifest was written, by the clock of its storage."""
    num_updates: int | None
    """Steps that the optimizers counted; None for an import."""
    layout: Mapping[str, Any]
    """What wrote it, by its manifest or, in older formats, by its configuration."""
    model: str
    """Name of the model in its configuration; empty for an import without one."""
    data: Mapping[str, Mapping[str, Any]]
    """Source -> what the loader says of it; empty where that is not known."""
    mixtures: Sequence[str]
    """How sources were mixed, a line for each change."""

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(file.num_bytes for file in self.manifest.files.values())

    def as_json(self) -> dict[str, Any]:
        """Under the names of `--json`."""
        manifest = self.manifest
        return {
            "folder": self.folder,
            "format": manifest.version,
            "kind": str(manifest.kind),
            "step": manifest.step,
            "sound": manifest.is_sound,
            "why_unsound": manifest.why_unsound,
            "proven": self.is_proven,
            "saved_at": datetime.fromtimestamp(self.saved_at_s, UTC).isoformat(timespec="seconds"),
            "num_updates": self.num_updates,
            "layout": dict(self.layout),
            "model": self.model,
            "has_checksums": manifest.has_checksums,
            "num_files": len(manifest.files),
            "num_bytes": self.num_bytes,
            "losses": list(manifest.losses),
            "facts": dict(manifest.facts),
            "data": {name: dict(values) for name, values in self.data.items()},
        }


def facts_of(stored: StoredCheckpoint) -> Facts:
    """Read them. Raises `CheckpointError`, and `ConfigError` for a configuration that cannot be read."""
    folder, manifest = stored.folder, stored.manifest
    config = saved_config(folder / folders.CONFIG) if folders.CONFIG in manifest.files else {}
    loader: Mapping[str, Any] = {}
    mixtures: list[str] = []
    if folders.DATA_STATE in manifest.files:
        state = read_data_state(folder)
        loader = state.loader
        mixtures = [f"from step {each.from_step:,}: {_shares(each.sources)}" for each in state.mixtures]
    sources = loader.get("sources", {})
    return Facts(
        folder=str(folder),
        manifest=manifest,
        is_proven=(folder / folders.PROVEN).exists(),
        saved_at_s=written_at_s(folder),
        num_updates=stored.num_updates if manifest.kind is Kind.RUN else None,
        layout=manifest.layout or _layout(config),
        model=str(config.get("model", {}).get("name", "")),
        data=sources if isinstance(sources, Mapping) else {},
        mixtures=mixtures,
    )


def written_at_s(folder: Place) -> float:
    """When the manifest of a checkpoint was written, in seconds since 1970; now where that is not known."""
    try:
        return float((folder / MANIFEST).stat().st_mtime)
    except (OSError, AttributeError, TypeError, ValueError):
        return time.time()


def _layout(config: Mapping[str, Any]) -> dict[str, Any]:
    parallelism, dep = config.get("parallelism", {}), config.get("dep", {})
    cluster = config.get("cluster", {})
    found = {key: parallelism[key] for key in ("pp", "vpp", "ep", "cp") if key in parallelism}
    if "nodes" in cluster and "gpus_per_node" in cluster:
        found["world_size"] = cluster["nodes"] * cluster["gpus_per_node"]
    return found | ({"dep": dep["mode"]} if "mode" in dep else {})


def _shares(sources: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{name} {values.get('weight')}" for name, values in sources.items())
