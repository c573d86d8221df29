"""What autograd saves of the tiny model, as a pass by policy stores it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from k25_train.compose.resolve import compose
from parallel.activations.manager import ActivationManager, build_engine
from parallel.activations.order import OffloadOrder
from parallel.activations.policy import Policy
from parallel.activations.saving_pass import SaveRecord
from parallel.config import ContextExchange
from parallel.context.plan import plan_context
from parallel.pipeline.schedule import PassKey
from tests.helpers.ranks import RankContext
from tests.helpers.tiny_model import build_random_model, documents, random_tokens

Record = tuple[str, tuple[int, ...], Policy, int, int]
"""Name, shape, what was done with it, bytes on the device, bytes in the host."""
NO_OFFLOAD_ORDER = OffloadOrder(stay=frozenset(), prefetch={})
"""Everything is offloaded, and nothing prefetched."""


class Case(NamedTuple):
    """One forward pass."""

    policies: Mapping[str, Policy]
    dtype: torch.dtype
    lengths: tuple[int, ...]
    stays: bool = False
    """Whether nothing of it is offloaded."""
    padding: tuple[int, ...] = ()
    """Positions of padding among the documents."""

    @property
    def num_padding(self) -> int:
        """Tokens that are padding."""
        return sum(self.lengths[position] for position in self.padding)


def records_of_cases(
    context: RankContext, cases: Sequence[Case], model_overrides: Mapping[str, Any]
) -> list[Counter[Record]]:
    """What one pass through the whole tiny model stores in each case; backward passes are run too."""
    model = build_random_model(context, **model_overrides)
    return _stored_in_passes(
        model, cases, lambda case: (random_tokens(sum(case.lengths)), documents(case.lengths, case.padding))
    )


def records_of_shared_cases(
    context: RankContext, cases: Sequence[Case], exchange: ContextExchange
) -> list[Counter[Record]]:
    """The same on a rank that shares micro-batches with the other ranks of the test."""
    from k25_train.model.packed_documents import PackedDocuments
    from k25_train.model.weights import initialize
    from tests.helpers.hf_reference import tiny_model_config
    from tests.helpers.model_chunks import WHOLE_MODEL, build_shared_model, start
    from tests.helpers.parallel_sizes import parallel_sizes

    config, sizes = tiny_model_config(), parallel_sizes(cp=context.world_size, cp_exchange=exchange)
    topology = start(context, sizes, config.num_layers)
    model = build_shared_model(config, sizes, topology)
    initialize(model, WHOLE_MODEL, seed=5, std=0.1)

    def inputs(case: Case) -> tuple[torch.Tensor, Any]:
        plan = plan_context(case.lengths, case.padding, context.world_size)
        places = torch.from_numpy(plan.positions(topology.cp_rank))
        of_shard = PackedDocuments.of_shard(plan, topology.cp_rank, torch.device("cpu"))
        return random_tokens(sum(case.lengths))[places], of_shard

    return _stored_in_passes(model, cases, inputs)


def _stored_in_passes(
    model: Any, cases: Sequence[Case], inputs: Callable[[Case], tuple[torch.Tensor, Any]]
) -> list[Counter[Record]]:
    engine = build_engine(torch.device("cpu"), 16 << 20, 4 << 20)
    found = []
    for case in cases:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(case.dtype)
        stored: list[SaveRecord] = []
        key = PassKey(0, 0)
        order = OffloadOrder(frozenset([key]), {}) if case.stays else NO_OFFLOAD_ORDER
        manager = ActivationManager(case.policies, [model], order, engine, stored.append)
        tokens, of_case = inputs(case)
        saving = manager.forward_pass(key)
        with saving.active():
            losses = model(
                tokens=tokens,
                documents=of_case,
                labels=tokens.roll(-1),
                media_positions=torch.empty(0, dtype=torch.long),
            )
        del saving
        losses.sum().backward()
        del losses
        manager.finish_step()
        found.append(Counter(map(record_of, stored)))
    engine.close()
    return found


def vision_bytes(
    context: RankContext, grids: Sequence[Sequence[tuple[int, int, int]]], dtype: torch.dtype
) -> list[int]:
    """What a coupled tower and its projector keep of these items on the device, for each list of items."""
    model = build_random_model(context)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    policies = compose(["experiment=smoke"]).activation.policies()
    found = []
    for grid_thw in grids:
        stored: list[SaveRecord] = []
        manager = ActivationManager(policies, [model], NO_OFFLOAD_ORDER, None, stored.append)
        num_patches = sum(t * h * w for t, h, w in grid_thw)
        num_tokens = sum(h * w // 4 for _, h, w in grid_thw)
        with manager.forward_pass(PassKey(0, 0)).active():
            model(
                tokens=random_tokens(128),
                documents=documents((128,)),
                labels=random_tokens(128),
                media_positions=torch.arange(num_tokens),
                pixels=torch.randn(num_patches, 588),
                grid_thw=grid_thw,
            )
        found.append(sum(each.device_bytes for each in stored if each.name == "vision.encoder"))
    return found


class EngineWithoutMemory:
    """Takes meta tensors, of which there is nothing to copy."""

    device = torch.device("meta")

    def save(self, tensor: torch.Tensor, key: PassKey) -> object:
        return key


class FusedNorm(torch.autograd.Function):
    """The shape of `_fused_rms_norm`, which torch has for CUDA alone: saves its input and a float32 a row."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, rows.new_empty((*rows.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(rows)


def records_without_memory(
    context: RankContext, cases: Sequence[Case], overrides: Sequence[str]
) -> list[Counter[Record]]:
    """What one pass stores of the model of these overrides, on tensors that have shapes and no data.

    Kernels that need CUDA are stood in for by what autograd saves of them; tokens arrive at the experts as
    they are, since nobody knows where they are sent.
    """
    import torch.nn.functional as F

    from k25_train.model.build import build_model
    from k25_train.model.megatron_config import backbone_config
    from k25_train.model.packed_documents import PackedDocuments
    from k25_train.plan.pipeline import layout_of
    from parallel.activations import fp8
    from parallel.activations.saving_pass import SavingPass
    from parallel.activations.storage import weights_of
    from parallel.fake_group import fake_rank
    from parallel.megatron.platform import use_platform
    from parallel.topology import build_topology

    use_platform("meta")
    F.rms_norm = lambda rows, _shape, weight, _eps: FusedNorm.apply(rows, weight)
    F.scaled_dot_product_attention = attention_of_unequal_widths
    fp8._on_cuda = lambda tensor: False
    config, meta = compose(overrides), torch.device("meta")
    layout, found = layout_of(config), []
    with fake_rank(0, 1):
        topology = build_topology(config.parallelism, layout, meta)
        backbone = backbone_config(config.model, config.train, config.parallelism, layout)
        with meta:
            chunks = build_model(config, backbone, topology).chunks
        for case in cases:
            stored: list[SaveRecord] = []
            engine: Any = None if case.stays else EngineWithoutMemory()
            saving = SavingPass(case.policies, PassKey(0, 0), weights_of(chunks), engine, stored.append)
            tokens = torch.empty(sum(case.lengths), dtype=torch.long, device=meta)
            with saving.active():
                chunks[0](
                    tokens=tokens,
                    documents=PackedDocuments.of(case.lengths, meta, case.padding),
                    labels=tokens.clone(),
                    media_positions=tokens[:0],
                )
            found.append(Counter(map(record_of, stored)))
    return found


def attention_of_unequal_widths(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, is_causal: bool, scale: float
) -> torch.Tensor:
    """The kernel that CUDA has for values narrower than keys; autograd knows it on all devices."""
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(query, key, value, None, True, 0.0, is_causal, scale=scale)[0]


def record_of(stored: SaveRecord) -> Record:
    return (stored.name, stored.shape, stored.policy, stored.device_bytes, stored.host_bytes)
