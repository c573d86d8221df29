"""Checkpoint folders as a run leaves them, made without a run: files of a few bytes instead of tensors."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from k25_train.checkpoint import folders
from k25_train.checkpoint.integrity import BACKEND, METADATA, entry_of
from k25_train.checkpoint.manifest import Manifest
from k25_train.checkpoint.publish import publish
from k25_train.checkpoint.storage.kinds import Place

CONFIG_YAML = "train:\n  seed: 7\n"
RANK_FILES = ("__0_0.distcp", "__1_0.distcp")
FACTS: Mapping[str, str] = MappingProxyType({"data.train.text": "7 samples"})


def fill_partial(root: Place, step: int) -> Place:
    """What the ranks write: two files, the list of tensors, and what wrote them."""
    partial = folders.prepare_partial(root, step)
    for name in RANK_FILES:
        (partial / name).write_bytes(name.encode() * step)
    (partial / METADATA).write_bytes(b"metadata" * step)
    (partial / BACKEND).write_text("{}")
    return partial


def write_checkpoint(
    root: Place,
    step: int,
    why_unsound: str = "",
    losses: Sequence[float] = (),
    texts: Mapping[str, str] = MappingProxyType({}),
) -> Place:
    """What the ranks and then rank 0 do; `texts` are small files of other contents than those here."""
    partial = fill_partial(root, step)
    manifest = Manifest(
        step=step,
        files={name: entry_of(partial / name) for name in (*RANK_FILES, METADATA, BACKEND)},
        facts=FACTS,
        losses=losses,
        why_unsound=why_unsound,
    )
    return publish(root, partial, manifest, {folders.CONFIG: CONFIG_YAML, **texts})


class RunsCode:
    """A pickle of it creates a file where it is read, as any command could be run."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.witness,)


def malicious_pickle(witness: Path) -> bytes:
    """Bytes that create the file `witness` when they are unpickled without care."""
    return pickle.dumps(RunsCode(witness))
