"""The whole model's gradients and their norm, put together apart from the optimizer."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

CLASSES: dict[str, Callable[[str], bool]] = {
    "vision": lambda name: name.startswith(("vision_tower.", "mm_projector.")),
    "routed experts": lambda name: ".mlp.experts." in name,
    "shared experts": lambda name: ".shared_experts." in name,
    "routers": lambda name: ".mlp.router." in name,
    "embedding": lambda name: ".embedding." in name,
    "output head": lambda name: ".output_layer." in name,
    "norms": lambda name: "norm" in name.rsplit(".", 2)[-2],
}
"""Parameters that the norm counts in one way each, by global name."""


def modules_and_places(run: Any) -> Iterator[tuple[Any, Any]]:
    """This rank's model chunks and its replica of a decoupled encoder, and their places in the model."""
    from k25_train.model.build import WHOLE, chunk_place

    for vp_stage, chunk in enumerate(run.chunks):
        yield chunk, chunk_place(run.config, run.topology, vp_stage)
    for encoder in run.tower.replicas:
        yield encoder, WHOLE


def gathered_gradients(run: Any) -> dict[str, Tensor]:
    """Global name -> reduced gradient in float64 of every parameter of this rank.

    After the reduction a rank's gradient buffers hold right values only in its own shard of each bucket: the
    others' are fetched from them, over the group that replicates the bucket.
    """
    import torch.distributed as dist

    gradients: dict[str, Tensor] = {}
    for chunk, place in modules_and_places(run):
        whole: dict[Tensor, Tensor] = {}
        for buffer in chunk.buffers + chunk.expert_parallel_buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                own = bucket.grad_data.chunk(group.size())[group.rank()].contiguous()
                parts = [torch.empty_like(own) for _ in range(group.size())]
                dist.all_gather(parts, own, group=group)
                gathered = torch.cat(parts)
                for parameter, (start, end) in bucket.param_to_index.items():
                    whole[parameter] = gathered[start:end].view(parameter.shape)
        for name, parameter in chunk.module.named_parameters():
            gradients |= {key: part.double() for key, part in place.global_tensors(name, whole[parameter])}
    return gradients


def scale_gradients(run: Any, chosen: Callable[[str], bool], factor: float) -> None:
    """Multiply the gradients of the parameters that `chosen` picks by global name."""
    for chunk, place in modules_and_places(run):
        for name, parameter in chunk.module.named_parameters():
            for key, part in place.global_tensors(name, parameter.main_grad):
                if chosen(key):
                    part *= factor


def square_sums(gradients: dict[str, Tensor]) -> dict[str, float]:
    """Global name -> sum of the squares."""
    return {name: float(gradient.square().sum()) for name, gradient in gradients.items()}


def named_once(by_rank: list[dict[str, float]]) -> dict[str, float]:
    """Merge what ranks say of parameters; all ranks that hold one must say the same of it."""
    merged: dict[str, float] = {}
    for said in by_rank:
        for name, value in said.items():
            assert merged.setdefault(name, value) == value, f"ranks disagree about {name}"
    return merged
