"""Device memory that is no tensor's: CUDA, NCCL by number of communicators, and gaps; torch-free.

These are estimates from others' measurements, since nothing here was measured on a GPU. Together they come to
the 9 to 14 GB between tensors and device that Megatron-LM's pull request 6429 reports on H100.
"""

from collections.abc import Iterator
from typing import NamedTuple

from k25_train.config.cluster import Device
from k25_train.config.schema import Config

MB = 10**6
CONTEXT_BYTES = 650 * MB
"""CUDA's context with the kernels of torch, and two workspaces of cuBLAS, 32 MiB for each stream that
multiplies. Source: about 0.5 GB is what tools show of an H100 whose process has one tensor."""
COMMUNICATOR_BYTES = 690 * MB
"""NCCL's buffers of one communicator. Source: 688 MB for 4 A100 (nccl issue 964); they grow with channels,
not with ranks beyond two nodes (nccl issue 986)."""
PAIR_BYTES = 545 * MB
"""The same of a communicator of two ranks (nccl issue 964)."""
ALL_TO_ALL_BYTES = 3300 * MB
"""The same where every rank of a node sends to every other. Source: 8 H100, 32 channels for each pair (nccl
issue 1685)."""
GAPS = 0.03
"""Share of tensors' memory that the allocator holds in gaps between them, with segments that grow
(`PYTORCH_CUDA_ALLOC_CONF`). Source: not disclosed, our choice; without them 4 to 20 GB are reported."""


class Communicator(NamedTuple):
    """A communicator of NCCL that a rank takes part in."""

    name: str
    num_bytes: int


def communicators(config: Config) -> Iterator[Communicator]:
    """Those of a rank in the middle of a pipeline; a group of one has none."""
    sizes = config.parallelism
    if config.world_size == 1:
        return
    yield Communicator("all ranks", COMMUNICATOR_BYTES)
    if sizes.ep > 1:
        yield Communicator("experts", ALL_TO_ALL_BYTES)
    if config.dp > 1:
        yield Communicator("data parallel", COMMUNICATOR_BYTES)
    if config.expert_dp > 1:
        yield Communicator("data parallel, experts", COMMUNICATOR_BYTES)
    # Messages between two stages have a communicator of their own.
    for neighbour in ("previous stage", "next stage")[: sizes.pp - 1]:
        yield Communicator(neighbour, PAIR_BYTES)
    if config.vision_placement.encoder_parts:
        yield Communicator("encoder", COMMUNICATOR_BYTES)
        yield Communicator("features", COMMUNICATOR_BYTES)
        if config.vision_placement.trained_encoder_parts:
            yield Communicator("gradients of features", COMMUNICATOR_BYTES)


def nccl_bytes(config: Config) -> int:
    """Of all communicators of a rank; 0 where the device is the CPU."""
    if config.cluster.device is not Device.cuda:
        return 0
    return sum(each.num_bytes for each in communicators(config))


def context_bytes(config: Config) -> int:
    """CUDA's own; 0 where the device is the CPU."""
    return CONTEXT_BYTES if config.cluster.device is Device.cuda else 0
