"""Build model chunks on a test rank."""

import os
from typing import Any

import torch

from k25_train.config.basics import DType
from k25_train.config.batches import BatchRampConfig
from k25_train.config.model import ModelConfig
from k25_train.config.training import TrainConfig
from k25_train.model.backbone import build_language_model
from k25_train.model.megatron_config import backbone_config
from k25_train.model.moonvit import MoonViT3D
from k25_train.model.multimodal import MultimodalModel
from k25_train.model.projector import PatchMergerProjector
from k25_train.model.weights import ChunkPlace
from parallel.config import ParallelismConfig
from parallel.context.exchange import NOT_SHARED, LatentExchange
from parallel.megatron.platform import use_platform
from parallel.topology import Topology, build_topology, start_process_group
from tests.helpers.parallel_sizes import even_layout, parallel_sizes
from tests.helpers.ranks import RankContext

WHOLE_MODEL = ChunkPlace(first_layer=0, first_expert=0)


def train_config(**overrides: Any) -> TrainConfig:
    """A short run of short sequences."""
    values: dict[str, Any] = {
        "steps": 10, "seq_len": 64, "global_batch_size": 8, "micro_batch_size": 1, "seed": 7,
        "dtype": DType.float32, "eval_interval": 10, "eval_sequences": 2, "transformer_engine": False,
        "deterministic": False, "stall_timeout_s": 60.0, "trace_step": None, "tokens": None,
        "batch_ramp": BatchRampConfig(start=None, increment=1, length="0"),
    }  # fmt: skip
    return TrainConfig(**values | overrides)


def start(context: RankContext, sizes: ParallelismConfig, num_layers: int) -> Topology:
    """Join the process group of a test's ranks and build the topology."""
    os.environ.update(context.environment())
    device = use_platform("cpu")
    start_process_group(device, timeout_s=60.0)
    return build_topology(sizes, even_layout(num_layers, sizes.pp, sizes.vpp), device)


def build_whole_model(
    model: ModelConfig, train: TrainConfig, topology: Topology, exchange: LatentExchange = NOT_SHARED
) -> MultimodalModel:
    """The whole model on one rank, weights as allocated; `exchange` is among the ranks that share tokens."""
    sizes = parallel_sizes(ep=topology.ep_size, cp=topology.cp_size)
    backbone = backbone_config(model, train, sizes, topology.layout)
    language_model = build_language_model(
        model,
        backbone,
        topology.groups,
        range(model.num_layers),
        pre_process=True,
        post_process=True,
        vp_stage=None,
        exchange=exchange,
    )
    tower, projector = MoonViT3D(model.vision), PatchMergerProjector(model.vision, model.hidden_size)
    with torch.no_grad():
        for parameter in language_model.parameters():
            parameter.zero_()
    return MultimodalModel(backbone, language_model, tower, projector)


def build_shared_model(
    model: ModelConfig, sizes: ParallelismConfig, topology: Topology, train: TrainConfig | None = None
) -> MultimodalModel:
    """The same on each of the ranks that share micro-batches."""
    from parallel.context.exchange import build_exchange

    backbone = backbone_config(model, train or train_config(), sizes, topology.layout)
    assert sizes.cp_exchange is not None, "tests say how latents are exchanged"
    language_model = build_language_model(
        model,
        backbone,
        topology.groups,
        range(model.num_layers),
        pre_process=True,
        post_process=True,
        vp_stage=None,
        exchange=build_exchange(sizes.cp_exchange, topology.groups.cp),
    )
    tower, projector = MoonViT3D(model.vision), PatchMergerProjector(model.vision, model.hidden_size)
    return MultimodalModel(backbone, language_model, tower, projector)


SERIAL = parallel_sizes()
