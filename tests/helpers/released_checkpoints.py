"""Checkpoints of weights that hold a released state dict, in files as different layouts leave them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from k25_train.config.model import ModelConfig


def stacked(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A released state dict in the names and shapes of training, experts stacked."""
    from k25_train.export.released import to_ours

    ours: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for name, tensor in to_ours(state).items():
        stem, found, rest = name.partition(".mlp.experts.")
        if found:
            # The state dict has them in order.
            experts.setdefault(f"{stem}{found}{rest.partition('.')[2]}", []).append(tensor)
        else:
            ours[name] = tensor
    return ours | {name: torch.stack(parts) for name, parts in experts.items()}


def write_weights(
    folder: Path,
    model: ModelConfig,
    tensors: Mapping[str, Tensor],
    cuts: Sequence[float] = (1.0,),
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint of these tensors in our names.

    Args:
        cuts: shares of every tensor, one file each, adding up to 1.
        facts: of the data, in the manifest.
    """
    from k25_train.checkpoint.files.parts import Part
    from k25_train.checkpoint.files.writer import write_parts
    from k25_train.checkpoint.manifest import MANIFEST, Kind, Manifest
    from k25_train.compose.yaml_files import dump
    from k25_train.config.leaves import plain_values

    folder.mkdir(parents=True)
    files = {}
    before = 0.0
    for rank, cut in enumerate(cuts):
        name = f"rank_{rank:05d}_0.safetensors"
        parts = []
        for key, tensor in tensors.items():
            start, stop = (round(part * tensor.numel()) for part in (before, min(1.0, before + cut)))
            if start < stop:
                flat = tensor.contiguous().view(-1)[start:stop]
                parts.append((Part(key, tensor.dtype, tuple(tensor.shape), start, stop), flat))
        files[name] = write_parts(folder / name, parts)
        before += cut
    (folder / "model.yaml").write_text(dump(plain_values(model)))
    manifest = Manifest(step=0, files=files, facts=facts or {}, kind=Kind.WEIGHTS, num_updates=0)
    (folder / MANIFEST).write_text(manifest.to_text())
    return folder


def released_state(model: ModelConfig) -> dict[str, Tensor]:
    """Random weights in the release's names and number formats."""
    from tests.helpers.hf_reference import random_checkpoint

    return {
        name: tensor if "score_correction" in name else tensor.to(torch.bfloat16)
        for name, tensor in random_checkpoint(model).items()
    }
