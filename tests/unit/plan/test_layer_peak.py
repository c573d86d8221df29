"""What is alive on the device while a layer of the real model goes forward and backward, against the plan."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from k25_train.compose.resolve import compose
from k25_train.plan.memory.expert_exchange import exchange_bytes, row_bytes
from k25_train.plan.memory.pipeline_peak import saved_bytes, working_bytes
from k25_train.plan.pipeline import plan_pipeline
from parallel.pipeline.schedule import PassKey
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.ranks import RankContext, run_ranks

REAL = [
    "experiment=k25_pretrain_4k", "parallelism=serial", "cluster.nodes=1", "cluster.gpus_per_node=1",
    "train.transformer_engine=false", "activation=keep", "model.num_layers=1", "model.vocab_size=1024",
    "model.num_experts=24",
]  # fmt: skip
"""One layer at the width, and with the rows and weights per rank, of 16 expert-parallel ranks."""
BY_PIECES = "activation.head.logits=recompute"
KINDS = {
    "MoE": ["model.num_dense_layers=0"],
    "dense": ["model.num_dense_layers=1"],
}
HEADS = {
    "whole logits": ["model.num_dense_layers=1", "model.dense_ffn_hidden_size=64", "model.vocab_size=163840"],
    "pieces": [
        BY_PIECES,
        "model.num_dense_layers=1",
        "model.dense_ffn_hidden_size=64",
        "model.vocab_size=163840",
    ],
}
"""The whole vocabulary behind a small layer: the head takes more than that."""


class FusedNorm(torch.autograd.Function):
    """What `_fused_rms_norm` saves and returns, which torch has for CUDA alone."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, weight, rows.new_empty((*rows.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, weight, _ = ctx.saved_tensors
        return torch.empty_like(rows), torch.empty_like(weight)


def peaks(context: RankContext, configurations: Sequence[Sequence[str]]) -> list[int]:
    """The most bytes of tensors that are no weights in a pass through each model, which takes no memory."""
    import torch.nn.functional as F

    from k25_train.model.build import build_model
    from k25_train.model.dispatcher import AlltoAllDispatcher
    from k25_train.model.grouped_gemm import RowGroups
    from k25_train.model.megatron_config import backbone_config
    from k25_train.model.packed_documents import PackedDocuments
    from k25_train.plan.pipeline import layout_of
    from parallel.activations.saving_pass import SavingPass
    from parallel.activations.storage import weights_of
    from parallel.fake_group import fake_rank
    from parallel.megatron.platform import use_platform
    from parallel.topology import build_topology

    use_platform("meta")
    F.rms_norm = lambda rows, _shape, weight, _eps: FusedNorm.apply(rows, weight)
    AlltoAllDispatcher.sorts_rows = True
    # How many rows an expert has, no meta tensor knows.
    RowGroups.split = lambda self, rows: [*rows.tensor_split(len(self.counts))]  # type: ignore[method-assign]
    meta, found = torch.device("meta"), []
    with fake_rank(0, 1):
        for overrides in configurations:
            config = compose(overrides)
            layout = layout_of(config)
            topology = build_topology(config.parallelism, layout, meta)
            backbone = backbone_config(config.model, config.train, config.parallelism, layout)
            with meta:
                [chunk] = build_model(config, backbone, topology).chunks
            for parameter in chunk.parameters():
                # As data parallelism does, which adds gradients to its own.
                parameter.main_grad = torch.empty_like(parameter, dtype=torch.float32)
                parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
            tokens = torch.empty(config.train.seq_len, dtype=torch.long, device=meta)
            policies = config.activation.policies()
            saving = SavingPass(policies, PassKey(0, 0), weights_of([chunk]), None)
            with LiveBytes([*chunk.parameters(), *(each.main_grad for each in chunk.parameters())]) as live:
                with saving.active():
                    losses = chunk(
                        tokens=tokens,
                        documents=PackedDocuments.of((config.train.seq_len,), meta),
                        labels=tokens.clone(),
                        media_positions=tokens[:0],
                    )
                del saving
                losses.sum().backward()
            found.append(live.peak)
            from megatron.core import parallel_state

            parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def measured() -> dict[str, int]:
    configurations = [[*REAL, *more] for more in (KINDS | HEADS).values()]
    return dict(zip(KINDS | HEADS, run_ranks(peaks, 1, configurations)[0], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_takes_what_is_planned(measured: dict[str, int], kind: str) -> None:
    [stage] = plan_pipeline(compose([*REAL, *KINDS[kind]])).stages
    sizes = stage.balanced_sizes
    planned = working_bytes(stage, sizes) + exchange_bytes(stage, sizes)
    assert measured[kind] <= 1.01 * planned, f"{measured[kind] / 1e9:.3f} GB, planned {planned / 1e9:.3f}"
    # Rows are sorted without one of the copies that the plan has room for.
    spare = row_bytes(stage.config, sizes) if kind == "MoE" else 0
    least = 0.99 * (planned - spare)
    assert measured[kind] >= least, f"{measured[kind] / 1e9:.3f} GB, planned {planned / 1e9:.3f}"


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_takes_what_is_planned(measured: dict[str, int], kind: str) -> None:
    """On top of what waits, its own logits among it."""
    [stage] = plan_pipeline(compose([*REAL, *HEADS[kind]])).stages
    sizes = stage.balanced_sizes
    planned = saved_bytes(stage, sizes) + working_bytes(stage, sizes)
    if kind == "whole logits":
        # The logits wait until they are at work, so they are counted twice.
        planned -= 2 * sizes.tokens * stage.config.model.vocab_size
    assert 0.97 * planned <= measured[kind] <= 1.01 * planned, (
        f"{measured[kind]:,} bytes, planned {planned:,}"
    )
