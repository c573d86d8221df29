"""Build the part of the model that is on one rank.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.model.backbone import build_language_model
from k25_train.model.megatron_config import TORCH_DTYPE, BackboneConfig
from k25_train.model.moonvit import MoonViT3D
from k25_train.model.multimodal import MultimodalModel, VisionEncoder
from k25_train.model.projector import PatchMergerProjector
from k25_train.model.weights import ChunkPlace, initialize
from k25_train.plan.context import exchange_of
from k25_train.plan.memory.kernels import configured_kernels
from parallel.config import ContextExchange
from parallel.context.exchange import LatentExchange, build_exchange
from parallel.topology import Topology

WHOLE = ChunkPlace(first_layer=0, first_expert=0)
"""The place of a module that every rank has a replica of: its names are those of the whole model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What one rank holds of the model."""

    chunks: Sequence[MultimodalModel]
    """One chunk per virtual stage."""
    encoders: Sequence[VisionEncoder]
    """This rank's replica of the decoupled encoder; empty if the tower is coupled."""
    places: Mapping[nn.Module, ChunkPlace]
    """Each of these modules -> where its layers and experts are in the whole model."""

    @property
    def modules(self) -> list[nn.Module]:
        """Chunks, then encoders."""
        return [*self.chunks, *self.encoders]

    def parameter_names(self) -> Iterator[tuple[nn.Parameter, str]]:
        """Every parameter with its name in the whole model."""
        for module, place in self.places.items():
            for name, parameter in module.named_parameters():
                yield parameter, place.global_name(name)

    def initialize(self, seed: int, std: float) -> None:
        """Give all weights their initial values, in place; these depend on seed and global names alone."""
        for module, place in self.places.items():
            initialize(module, place, seed, std)


def build_model(config: Config, backbone: BackboneConfig, topology: Topology) -> Model:
    """Build this rank's chunks and its replica of the encoder; weights are as allocated.

    A coupled tower and its projector are in the chunk that embeds tokens; so is the projector alone if it is
    trained behind a frozen, decoupled tower.
    """
    vp_stages = range(topology.vpp_size)
    # One rank by itself has no exchange.
    exchange = build_exchange(exchange_of(config) or ContextExchange.ring, topology.groups.cp)
    chunks = [
        _build_chunk(config, backbone, topology, vp_stage, exchange).to(topology.device)
        for vp_stage in vp_stages
    ]
    encoders = [encoder.to(topology.device) for encoder in _build_encoders(config, backbone)]
    places = {chunk: chunk_place(config, topology, vp_stage) for vp_stage, chunk in enumerate(chunks)}
    return Model(chunks=chunks, encoders=encoders, places=places | dict.fromkeys(encoders, WHOLE))


def chunk_place(config: Config, topology: Topology, vp_stage: int) -> ChunkPlace:
    """Where the layers and experts of one of this rank's chunks are in the whole model."""
    return ChunkPlace(
        first_layer=topology.layout.layer_ids(topology.pp_rank, vp_stage).start,
        first_expert=topology.ep_rank * (config.model.num_experts // topology.ep_size),
    )


def _build_encoders(config: Config, backbone: BackboneConfig) -> list[VisionEncoder]:
    parts = config.vision_placement.encoder_parts
    if not parts:
        return []
    projector = _build_projector(config) if VisionPart.projector in parts else None
    return [VisionEncoder(backbone, _build_tower(config), projector)]


def _build_chunk(
    config: Config, backbone: BackboneConfig, topology: Topology, vp_stage: int, exchange: LatentExchange
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
        attention=configured_kernels(config).attention,
        exchange=exchange,
    )
    dtype = TORCH_DTYPE[config.train.dtype]
    parts = config.vision_placement.first_stage_parts if is_first else frozenset[VisionPart]()
    tower = _build_tower(config) if VisionPart.tower in parts else None
    projector = _build_projector(config) if VisionPart.projector in parts else None
    # torch's norms are built in float32 whatever the configuration says. Buffers stay as they are: bfloat16
    # cannot count tokens beyond 256, nor hold the small steps of the expert biases.
    for parameter in language_model.parameters():
        parameter.data = parameter.data.to(dtype)
    return MultimodalModel(backbone, language_model, tower, projector)


def _build_tower(config: Config) -> MoonViT3D:
    """The tower; building it draws nothing from torch's generator."""
    with torch.random.fork_rng(devices=[]):
        kernel = configured_kernels(config).vision_attention
        return MoonViT3D(config.model.vision, kernel).to(TORCH_DTYPE[config.train.dtype])


def _build_projector(config: Config) -> PatchMergerProjector:
    """The projector; building it draws nothing from torch's generator."""
    with torch.random.fork_rng(devices=[]):
        projector = PatchMergerProjector(config.model.vision, config.model.hidden_size)
        return projector.to(TORCH_DTYPE[config.train.dtype])
