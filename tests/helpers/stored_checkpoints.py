"""Checkpoints of a few tensors in today's format, as some layout would have written them, without a run."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from k25_train.checkpoint.files.parts import Part
from k25_train.checkpoint.files.writer import write_parts
from k25_train.checkpoint.integrity import entry_of
from k25_train.checkpoint.manifest import Kind, Manifest
from k25_train.checkpoint.storage.kinds import MANIFEST
from k25_train.compose.resolve import compose, to_yaml

EXPERTS = "language_model.decoder.layers.{}.mlp.experts.gate_up_proj"
NORM = "language_model.decoder.layers.{}.input_layernorm.weight"
STATES = ("param", "exp_avg", "exp_avg_sq")
FACTS: Mapping[str, str] = MappingProxyType({"data.train.text": "7 samples"})


def tiny_tensors(seed: int = 1, num_layers: int = 3, *, with_state: bool = True) -> dict[str, Tensor]:
    """A few weights of every part of the model, and the optimizer's state of each."""
    made = torch.Generator().manual_seed(seed)
    shapes = {
        "language_model.embedding.word_embeddings.weight": (40, 8),
        **{NORM.format(layer): (8,) for layer in range(num_layers)},
        **{EXPERTS.format(layer): (4, 6, 8) for layer in range(1, num_layers)},
        "vision_tower.patch_embed.proj.weight": (8, 12),
        "mm_projector.proj.0.bias": (8,),
    }
    masters = {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}
    found = {name: tensor.bfloat16() for name, tensor in masters.items()}
    if with_state:
        for state in STATES:
            for name, tensor in masters.items():
                value = tensor if state == "param" else torch.randn(tensor.shape, generator=made)
                found[f"optimizer.state.{state}.{name}"] = value.square() if state == "exp_avg_sq" else value
    return found


def write_stored(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    num_ranks: int = 2,
    step: int = 5,
    kind: Kind = Kind.RUN,
    why_unsound: str = "",
    settings: Sequence[str] = (),
    layout: Mapping[str, int | str] = MappingProxyType({"pp": 1, "vpp": 1, "ep": 1, "dp": 2}),
    only_rank: int | None = None,
) -> Path:
    """Write tensors, each cut evenly over the ranks, as a checkpoint in `folder`; returns it."""
    folder.mkdir(parents=True)
    files = {}
    for rank in range(num_ranks) if only_rank is None else (only_rank,):
        name = f"rank_{rank:05d}_0.safetensors"
        files[name] = write_parts(folder / name, list(share(tensors, rank, num_ranks)))
    (folder / "config.yaml").write_text(to_yaml(compose(["experiment=smoke", *settings])), encoding="utf-8")
    files["config.yaml"] = entry_of(folder / "config.yaml")
    manifest = Manifest(
        step=step,
        files=files,
        facts=FACTS,
        losses=(4.0, 3.0),
        kind=kind,
        layout={**layout, "world_size": num_ranks},
        num_updates=step,
        why_unsound=why_unsound,
    )
    (folder / MANIFEST).write_text(manifest.to_text(), encoding="utf-8")
    return folder


def share(tensors: Mapping[str, Tensor], rank: int, num_ranks: int) -> list[tuple[Part, Tensor]]:
    """What a rank has of each tensor."""
    found = []
    for name, tensor in tensors.items():
        cuts = [tensor.numel() * number // num_ranks for number in range(num_ranks + 1)]
        start, stop = list(pairwise(cuts))[rank]
        part = Part(name, tensor.dtype, tuple(tensor.shape), start, stop)
        found.append((part, tensor.reshape(-1)[start:stop].contiguous()))
    return found
