"""How tokens get to the ranks of their experts: the choices, and what each needs; only the standard library.

The kernels behind the last three are called through megatron-core's flex dispatcher
(`transformer/moe/token_dispatcher.py`, 0.19.2). What each needs was read there and in DeepEP 1.2.1 and 2.1.0,
in its branch hybrid-ep of July 2026, and in Transformer Engine 2.20.
"""

from enum import Enum

DEEPEP_RANKS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
"""Sizes of expert groups that DeepEP has settings for (`deep_ep/buffer.py`, `get_dispatch_config`)."""
DEEPEP_GPUS = 8
"""GPUs of a node that DeepEP's kernels between nodes are written for (`NUM_MAX_NVL_PEERS`)."""
TOKEN_CHUNK = 64
"""HybridEP moves tokens in chunks of so many (megatron-core, `HYBRIDEP_TOKEN_ALIGNMENT`)."""


class Dispatcher(Enum):
    """How tokens get to the ranks of their experts and back."""

    alltoall = "alltoall"
    """torch's all-to-all: a copy for each expert of a token. Bitwise the same in every run, on any device."""
    deepep = "deepep"
    """DeepEP over NVSHMEM: a copy for each node, which its ranks share over NVLink."""
    hybridep = "hybridep"
    """HybridEP, in the branch hybrid-ep of DeepEP: the same, with fewer SMs."""
    ncclep = "ncclep"
    """NCCL EP, in Transformer Engine: the same over NCCL alone."""

    @property
    def sends_once_per_node(self) -> bool:
        """Whether a token is sent once to each node that has some of its experts, not to each expert."""
        return self is not Dispatcher.alltoall
