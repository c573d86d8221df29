"""Which kernels run, and what they keep for their backward pass, where that differs; torch-free."""

from dataclasses import dataclass, replace
from enum import Enum

from k25_train.config.basics import DType
from k25_train.config.cluster import Device
from k25_train.config.schema import Config
from k25_train.plan.assumptions import OURS, OtherCode


class AttentionKernel(Enum):
    """The implementations of attention, of which a run has one (`k25_train/model/attention_kernels.py`)."""

    cpu = "torch's flash attention for the CPU, document by document"
    """Takes queries, keys and values of one width."""
    float32 = "torch's memory-efficient attention, document by document"
    """CUDA in float32, for comparisons with the CPU: no kernel for packed documents computes in float32."""
    varlen = "torch's varlen_attn (FlashAttention 2), one call for all documents"
    """CUDA without Transformer Engine. Takes queries, keys and values of one width."""
    transformer_engine = "Transformer Engine's DotProductAttention (cuDNN), one call for all documents"
    """CUDA with Transformer Engine."""

    @property
    def pads_values(self) -> bool:
        """Whether it takes queries, keys and values of one width only."""
        return self in (AttentionKernel.cpu, AttentionKernel.varlen)


def attention_kernel(device: Device, dtype: DType, *, transformer_engine: bool) -> AttentionKernel:
    """Which attention the language model is built with, by what the configuration says and nothing else."""
    if device is Device.cpu:
        return AttentionKernel.cpu
    if dtype is DType.float32:
        return AttentionKernel.float32
    return AttentionKernel.transformer_engine if transformer_engine else AttentionKernel.varlen


def block_kernel(kernel: AttentionKernel) -> AttentionKernel:
    """What attends to the keys of one rank after another where ranks share sequences: cuDNN's plans are made
    for numbers of queries and keys, which differ from block to block."""
    return AttentionKernel.varlen if kernel is AttentionKernel.transformer_engine else kernel


def vision_attention_kernel(device: Device, dtype: DType) -> AttentionKernel:
    """Which attention the tower is built with, where heads of queries, keys and values are of one width."""
    return attention_kernel(device, dtype, transformer_engine=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What operations keep for their backward pass, where that differs."""

    norm_is_fused: bool
    """Whether RMSNorm is one kernel, which keeps its input. Otherwise it is made of operations on float32,
    which keep that input in float32 and what it is normalised to. Both keep a float32 a row."""
    norm_statistics_in_float32: bool
    """Whether LayerNorm keeps means and deviations in float32; otherwise in the format of what it reads."""
    swiglu_is_fused: bool
    """Whether SwiGLU, with the router's weights, is one kernel, which keeps its inputs alone. Otherwise SiLU
    of gates, and its product with values, are kept as well. Ours is not, megatron-core's may be."""
    permutation_is_fused: bool
    """Whether rows are sorted by expert with Transformer Engine's kernels, which keep a map of all pairs of a
    token and an expert. Otherwise those that are sent are kept, as indices of torch."""
    attention: AttentionKernel
    """The language model's attention."""
    vision_attention: AttentionKernel
    """The tower's attention."""


def kernels_of(device: Device, dtype: DType, *, transformer_engine: bool) -> Kernels:
    """The kernels of a run.

    What CUDA's keep is from reading torch 2.13 (`_fused_rms_norm`, `torch.nn.attention.varlen`) and
    Transformer Engine 2.20 (`FusedAttnFunc`; its norm keeps what torch's does), and has not been measured on
    a GPU.
    """
    return Kernels(
        norm_is_fused=device is Device.cuda,
        norm_statistics_in_float32=device is Device.cuda,
        swiglu_is_fused=False,
        permutation_is_fused=transformer_engine,
        attention=attention_kernel(device, dtype, transformer_engine=transformer_engine),
        vision_attention=vision_attention_kernel(device, dtype),
    )


def configured_kernels(config: Config, code: OtherCode = OURS) -> Kernels:
    """The kernels of a run with this configuration, of ours or of others' code."""
    train, device = config.train, config.cluster.device
    kernels = kernels_of(device, train.dtype, transformer_engine=train.transformer_engine)
    return replace(kernels, swiglu_is_fused=code.fused_elementwise)


def kernel_line(config: Config) -> str:
    """Which attention runs, as a line of text."""
    kernels = configured_kernels(config)
    tower = kernels.vision_attention.value
    if config.parallelism.cp > 1:
        text = block_kernel(kernels.attention).value
        return f"attention to latents of {config.parallelism.cp} ranks: {text}; the tower's: {tower}"
    return f"attention: {kernels.attention.value}; the tower's: {tower}"
