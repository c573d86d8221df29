"""Build the model chunks that live on one rank."""

from collections.abc import Sequence

import torch

from k25_train.config.schema import Config
from k25_train.model.backbone import build_language_model
from k25_train.model.megatron_config import TORCH_DTYPE, BackboneConfig
from k25_train.model.moonvit import MoonViT3D
from k25_train.model.multimodal import MultimodalModel, VisionEncoder
from k25_train.model.projector import PatchMergerProjector
from k25_train.model.weights import ChunkPlace, initialize
from parallel.config import DepMode
from parallel.topology import Topology


def chunk_place(config: Config, topology: Topology, vp_stage: int) -> ChunkPlace:
    """Where one of this rank's chunks stands in the whole model."""
    return ChunkPlace(
        first_layer=topology.layout.layer_ids(topology.pp_rank, vp_stage).start,
        first_expert=topology.ep_rank * (config.model.num_experts // topology.ep_size),
    )


def build_chunks(config: Config, backbone: BackboneConfig, topology: Topology) -> list[MultimodalModel]:
    """Build every chunk of this rank, one per virtual stage, on its device; weights are as allocated.

    A coupled tower sits with its projector in the chunk that embeds tokens; so does the projector alone where
    it is trained behind a frozen, decoupled tower.
    """
    stages = range(topology.vpp_size)
    return [_build_chunk(config, backbone, topology, stage).to(topology.device) for stage in stages]


def build_vision_encoder(
    config: Config, backbone: BackboneConfig, device: torch.device
) -> VisionEncoder | None:
    """Build this rank's replica of the decoupled encoder; None if the tower is coupled."""
    if config.dep.mode is DepMode.coupled:
        return None
    projector = None if config.has_projector_in_first_stage else _build_projector(config)
    return VisionEncoder(backbone, _build_tower(config), projector).to(device)


def initialize_vision_encoder(encoder: VisionEncoder, config: Config) -> None:
    """Give its weights their initial values, in place: those that a coupled tower has."""
    initialize(encoder, ChunkPlace(first_layer=0, first_expert=0), config.train.seed, config.model.init_std)


def initialize_chunks(chunks: Sequence[MultimodalModel], config: Config, topology: Topology) -> None:
    """Give all weights of this rank's chunks their initial values, in place."""
    for vp_stage, chunk in enumerate(chunks):
        initialize(chunk, chunk_place(config, topology, vp_stage), config.train.seed, config.model.init_std)


def _build_chunk(
    config: Config, backbone: BackboneConfig, topology: Topology, vp_stage: int
) -> MultimodalModel:
    layout, pp_rank = topology.layout, topology.pp_rank
    is_first = layout.is_first(pp_rank, vp_stage)
    language_model = build_language_model(
        config.model,
        backbone,
        topology.groups,
        layout.layer_ids(pp_rank, vp_stage),
        pre_process=is_first,
        post_process=layout.is_last(pp_rank, vp_stage),
        vp_stage=vp_stage if topology.vpp_size > 1 else None,
        transformer_engine=config.train.transformer_engine,
    )
    dtype = TORCH_DTYPE[config.train.dtype]
    tower = _build_tower(config) if is_first and config.dep.mode is DepMode.coupled else None
    projector = _build_projector(config) if is_first and config.has_projector_in_first_stage else None
    # torch's norms are built in float32 whatever the configuration says. Buffers stay as they are: bfloat16
    # cannot count tokens beyond 256, nor hold the small steps of the expert biases.
    for parameter in language_model.parameters():
        parameter.data = parameter.data.to(dtype)
    return MultimodalModel(backbone, language_model, tower, projector)


def _build_tower(config: Config) -> MoonViT3D:
    """The tower; building it draws nothing from torch's generator."""
    with torch.random.fork_rng(devices=[]):
        return MoonViT3D(config.model.vision).to(TORCH_DTYPE[config.train.dtype])


def _build_projector(config: Config) -> PatchMergerProjector:
    """The projector; building it draws nothing from torch's generator."""
    with torch.random.fork_rng(devices=[]):
        projector = PatchMergerProjector(config.model.vision, config.model.hidden_size)
        return projector.to(TORCH_DTYPE[config.train.dtype])
