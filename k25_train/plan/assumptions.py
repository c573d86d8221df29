"""What a plan assumes that no configuration says: what data bring, what may go wrong, how others' code works.

`AS_CONFIGURED` is what this project's own code does on a healthy cluster. What-ifs change what data and
cluster do, plans of published runs what other code does.
"""

from dataclasses import dataclass, replace
from enum import Enum

from k25_train.config.schema import Config
from k25_train.config.sources import SourceFormat

VISION_SHARE = 0.1
"""Share of tokens that count as images' tokens where the configuration does not say. Source: our choice."""
ITEM_TOKENS = 640
"""Vision tokens of an image of half a megapixel, at 784 pixels each. Source: not disclosed, our choice."""
MEDIA_DENSITY = 0.8
"""Share of vision tokens in a sequence that has any: images of that size, each with 150 tokens of text.
Source: not disclosed, our choice."""


TARS = (SourceFormat.webdataset, SourceFormat.energon)
"""Formats of samples with images or video."""


class Compute(Enum):
    """Number format in which products are computed."""

    as_trained = "as trained"
    """In `train.dtype`."""
    fp8 = "fp8"
    """Products of layers in FP8, attention in bfloat16, as others train on GPUs that have it."""


class Sharding(Enum):
    """How weights and gradients are held by data-parallel ranks."""

    optimizer = "optimizer"
    """Whole on each rank; only masters and moments are cut (ZeRO-1)."""
    weights = "weights"
    """Cut as well, and gathered for a step's passes (FSDP2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherCode:
    """What the code of others does where this project's has no key for it. Defaults are what ours does."""

    compute: Compute = Compute.as_trained
    """Number format of products."""
    sharding: Sharding = Sharding.optimizer
    """What data-parallel ranks share."""
    cuda_graphs: bool = False
    """Whether passes are launched as graphs, so that the host's launches take no time."""
    graphs_experts: bool = True
    """With graphs, whether they hold all of a layer; otherwise its experts, and what sends tokens to them,
    are launched kernel by kernel, as rows of unknown number are."""
    attention_in_fp8: bool = False
    """Whether attention is in FP8 as well, where products are."""
    scales_per_tensor: bool = False
    """Whether FP8 has one scale for a tensor, of whose elements the largest is looked for first; otherwise
    blocks have their own, which one kernel finds and uses. Each expert's rows are a tensor."""
    fuses_experts: bool = False
    """Whether SwiGLU and rounding to FP8 are a part of experts' products, and no kernels that move data."""
    recomputes_layers: bool = False
    """Whether the backward pass runs each layer's forward pass again, of which the input alone is kept."""
    gradient_bytes: int = 4
    """Bytes of a gradient."""
    moment_bytes: int = 4
    """Bytes of each moment of the optimizer."""
    dispatch_bytes: int = 2
    """Bytes of an element of a token, or of an output's gradient, on its way to experts; 1 is FP8. The way
    back is in bfloat16."""
    most_nodes: int | None = None
    """Nodes at most that a token's experts are on, by the router's choice; None if they are on any."""
    mtp_layers: int = 0
    """Layers of multi-token prediction, each a MoE layer with a head, in the last chunk."""
    fused_swiglu: bool = False
    """Whether experts' SwiGLU is one kernel forward and one backward, whatever `fused_elementwise` says."""
    fused_elementwise: bool = False
    """Whether SwiGLU, rotary embedding, router and loss are a kernel each, forward and backward, instead of
    torch's operations one after the other."""
    grows_segments: bool = True
    """Whether segments of torch's allocator grow (`expandable_segments`), which leaves fewer gaps."""
    limits_channels: bool = True
    """Whether each communicator of NCCL has the channels of `parallel/communicators.py`, instead of NCCL's
    own choice."""
    waits_for_messages: bool = False
    """Whether a stage computes nothing until the messages of its last pass are there, as in torch's pipelines
    (2.13, `PipelineScheduleMulti`)."""
    routes_in_turn: bool = False
    """Whether a token's experts are neighbours, as benchmarks choose them that take all experts in turn: they
    are on one node and few ranks."""


OURS = OtherCode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What a plan assumes next to a configuration."""

    vision_share: float = VISION_SHARE
    """Share of all tokens that are images', 0 to 1."""
    item_tokens: int = ITEM_TOKENS
    """Vision tokens of an image, all alike."""
    media_density: float = MEDIA_DENSITY
    """Share of vision tokens in sequences that have any; the others are text alone."""
    expert_imbalance: float = 1.0
    """Load of the busiest rank's experts over their even share, in every layer and micro-batch."""
    slow_node: float = 1.0
    """How many times longer the kernels of one node take; 1 if none is slow."""
    document_tokens: int | None = None
    """Tokens of a document; None if each sequence is one."""
    code: OtherCode = OURS
    """How the code works."""


AS_CONFIGURED = Assumptions()
"""A healthy cluster, balanced experts, this project's code."""


def as_configured(config: Config) -> Assumptions:
    """The same with the share of vision tokens that the data have: `data.vision_ratio`, the largest that the
    schedule comes to; none where no source can have images, and where all are of tars, as captions are, as
    many as such sequences have."""
    sources = config.data.sources.values()
    if not config.data.with_media:
        return replace(AS_CONFIGURED, vision_share=0.0)
    if all(source.format in TARS and source.may_have_media for source in sources):
        return replace(AS_CONFIGURED, vision_share=MEDIA_DENSITY)
    ratios = [config.data.vision_ratio, *(mix.vision_ratio for mix in config.data.schedule.values())]
    given = [ratio for ratio in ratios if ratio is not None]
    return replace(AS_CONFIGURED, vision_share=max(given)) if given else AS_CONFIGURED
