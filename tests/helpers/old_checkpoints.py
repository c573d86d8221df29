"""Checkpoints in formats 1 and 2, written as they once were: by megatron-core, in torch's files."""

import hashlib
import json
import queue
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from tests.helpers.ranks import RankContext
from tests.helpers.runs import fit

OLD = "old"
"""Folder in a run's folder, with a checkpoint in format 2 for each that the run saved."""
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def fit_with_old_files(context: RankContext, arguments: Sequence[str]) -> None:
    """Train on one rank; whatever is saved is also written in format 2."""
    from k25_train.training.keeper import CheckpointKeeper

    begin = CheckpointKeeper.begin

    def begin_both(self: CheckpointKeeper, step: int, verdict: Any, **named: Any) -> None:
        write_old(self, step)
        begin(self, step, verdict, **named)

    with mock.patch.object(CheckpointKeeper, "begin", begin_both):
        fit(context, arguments)


def write_old(keeper: Any, step: int) -> Path:
    """Write the state of a run of one rank in format 2."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from k25_train.compose.resolve import to_yaml
    from parallel.megatron.replicas import complete_parameters

    # Even a synchronous save would start a process for it, which imports the main program again.
    filesystem_async._results_queue = queue.Queue()
    run = keeper.run
    folder: Path = run.folder / OLD / f"step_{step}"
    folder.mkdir(parents=True)
    complete_parameters(run.modules)
    state: dict[str, Any] = {
        f"model{index}": {
            name: value
            for name, value in module.module.sharded_state_dict(metadata=dict(_METADATA)).items()
            if not name.endswith("_extra_state")
        }
        for index, module in enumerate(run.modules)
    }
    state["optimizer"] = run.optimizer.sharded_state_dict(
        dict(state), is_loading=False, metadata=dict(_METADATA)
    )
    dist_checkpointing.save(state, str(folder), validate_access_integrity=False)
    (folder / "config.yaml").write_text(to_yaml(run.config))
    (folder / "data_state.json").write_text(keeper.data.to_text())
    write_old_manifest(folder, step, keeper.soundness.losses, run.data.facts())
    return folder


def write_old_manifest(
    folder: Path, step: int, losses: Sequence[float] = (), facts: Mapping[str, str] | None = None
) -> None:
    """List the files of a folder in a manifest of format 2, as they are now."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    values = {
        "format_version": 2,
        "step": step,
        "sound": True,
        "why_unsound": "",
        "facts": dict(facts or {}),
        "losses": list(losses),
        "files": files,
    }
    checksum = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(values | {"sha256_of_the_rest": checksum}))


def write_oldest_manifest(folder: Path, step: int) -> None:
    """List the files of a folder in a manifest of format 1: sizes alone."""
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json"}
    text = json.dumps({"format_version": 1, "step": step, "file_bytes": sizes})
    (folder / "manifest.json").write_text(text)
