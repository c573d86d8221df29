"""Device memory that is no tensor's: CUDA, NCCL by number of communicators, and gaps; torch-free.

These are estimates from others' measurements, since nothing here was measured on a GPU. Together they come to
the 9 to 14 GB between tensors and device that Megatron-LM's pull request 6429 reports on H100.
"""

from collections.abc import Mapping

from k25_train.config.cluster import Device
from k25_train.config.schema import Config
from k25_train.plan.assumptions import OURS, OtherCode
from parallel.communicators import Operation, Sends, communicators_of

MB = 10**6
CONTEXT_BYTES = 650 * MB
"""CUDA's context with the kernels of torch, and two workspaces of cuBLAS, 32 MiB for each stream that
multiplies. Source: about 0.5 GB is what tools show of an H100 whose process has one tensor."""
CHANNEL_BYTES = 43 * MB
"""NCCL's buffers of one channel of a communicator. Source: 688 MB for 4 A100 (nccl issue 964), of 16 channels
or more; they grow with channels, not with ranks beyond two nodes (nccl issue 986)."""
PAIR_BYTES = 545 * MB
"""Buffers of a communicator of two ranks (nccl issue 964)."""
ALL_TO_ALL_BYTES = 103 * MB
"""What a channel takes where every rank of a node sends to every other. Source: 3.3 GB for 8 H100 with 32
channels for each pair (nccl issue 1685)."""
GAPS = 0.03
"""Share of tensors' memory that the allocator holds in gaps between them, with segments that grow
(`PYTORCH_CUDA_ALLOC_CONF`). Source: not disclosed, our choice. What each stream's pool has at its own peak is
counted with the passes: tokens on their way to experts."""
GAPS_OF_SEGMENTS = 0.04
"""The same with segments that do not grow. Source: 62,570 of 60,154 MB (Megatron-LM pull request 6429)."""
GAPS_OF_STREAMS = 0.13
"""The same where a second stream runs other passes' exchanges, whose pool the first one cannot use. Source:
68,392 of 60,378 MB, there too; 69.3 of 59.0 GiB is reported of Nemotron-3-Super."""
OTHERS_CHANNELS = 16
"""Channels of a communicator with NCCL's own choice. Source: 688 MB (nccl issue 964)."""


def gaps_share(config: Config, code: OtherCode) -> float:
    """Share of tensors' memory in gaps; nothing where the device is the CPU."""
    if config.cluster.device is not Device.cuda:
        return 0.0
    if code.grows_segments:
        return GAPS
    return GAPS_OF_STREAMS if config.parallelism.overlap_expert_comm else GAPS_OF_SEGMENTS


def communicators_in(config: Config, code: OtherCode = OURS) -> Mapping[str, int]:
    """Communicator -> its bytes, of a rank in the middle of a pipeline; those of pairs apart. Others leave
    their channels to NCCL."""
    found: dict[str, int] = {}
    for each in communicators_of(config.parallelism, config.dep, config.world_size):
        channels = each.max_ctas if code.limits_channels else OTHERS_CHANNELS
        if each.operations == (Operation.all_to_all,):
            found[each.name] = channels * ALL_TO_ALL_BYTES
            continue
        sends_all = code.limits_channels and Operation.all_to_all in each.operations
        found[each.name] = channels * (CHANNEL_BYTES + ALL_TO_ALL_BYTES * sends_all)
        if each.sends is Sends.unbatched:
            for neighbour in ("previous stage", "next stage")[: config.parallelism.pp - 1]:
                found[neighbour] = PAIR_BYTES
    return found


def nccl_bytes(config: Config, code: OtherCode = OURS) -> int:
    """Of all communicators of a rank; 0 where the device is the CPU."""
    if config.cluster.device is not Device.cuda:
        return 0
    return sum(communicators_in(config, code).values())


def context_bytes(config: Config) -> int:
    """CUDA's own; 0 where the device is the CPU."""
    return CONTEXT_BYTES if config.cluster.device is Device.cuda else 0
