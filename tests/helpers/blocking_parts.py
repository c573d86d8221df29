"""What makes the host wait in each part of a training step, seen on fake CUDA tensors (`fake_cuda`)."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from parallel.context.plan import plan_context
from tests.helpers.fake_cuda import fake_cuda
from tests.helpers.fake_cuda_seen import Blocking, Seen
from tests.helpers.ranks import RankContext

PASSES = "passes"
OPTIMIZER = "optimizer"
PARTS = ("inputs", "tower", PASSES, OPTIMIZER, "end of step")
"""Parts of `train_step`, in order; the tower's work in bubbles is among the passes."""
LAYERS = ("dense layer", "MoE layer", "encoder")
"""Modules that go forward and backward alone."""

DISPATCHER = (
    "megatron/core/transformer/moe/token_dispatcher.py",
    "megatron/core/transformer/moe/moe_utils.py",
)
"""Where megatron-core learns how many tokens it sends to each rank: the host has to wait for that."""
ONCE_A_STEP = {
    "inputs": (
        "k25_train/training/inputs.py",  # whether all ranks could read their share, and how many tokens
        "k25_train/training/staging.py",  # copies of the step before last, which are done
    ),
    OPTIMIZER: ("parallel/megatron/part_norms.py",),  # whether the gradient is finite, and how large
    # Figures of the step, once it is done.
    "end of step": (
        "k25_train/training/step_totals.py",
        "k25_train/optim/qk_clip.py",
        "parallel/dep/stats.py",
        "parallel/activations/manager.py",
        "k25_train/training/device_memory.py",
    ),
}
"""Part -> where the host reads a value once a step, one entry for each time."""

GPU = (
    "train.dtype=bfloat16",
    "activation=k2",
    "parallelism.overlap_expert_comm=true",
    "parallelism.delay_wgrad=true",
)
"""As `k25_pretrain_4k` runs: kernels of bfloat16, FP8 storage and offloading, overlapped experts."""

ByPart = dict[str, list[Blocking]]
"""Part of a step, or module alone -> what blocks."""


def not_allowed(found: ByPart) -> list[str]:
    """What blocks where it should not: all but the dispatcher in passes, and `ONCE_A_STEP`."""
    return [
        f"{part}: {each.what} ({each.why}) at {each.where}"
        for part, blocking in found.items()
        for each in blocking
        if not is_allowed(part, each)
    ]


def is_allowed(part: str, blocking: Blocking) -> bool:
    """Whether a call may block in this part."""
    allowed = DISPATCHER if part in (PASSES, "MoE layer") else ONCE_A_STEP.get(part, ())
    return blocking.where.startswith(tuple(allowed)) if allowed else False


def blocking_by_part(context: RankContext, arguments: Sequence[str], kernels: Sequence[str] = ()) -> ByPart:
    """Train two steps of a run with a faked GPU; what blocks in the second, and in modules alone.

    `kernels` are operators that must have run by then.
    """
    os.environ.update(context.environment() | {"LOCAL_RANK": "0"})
    from k25_train.compose.resolve import compose
    from k25_train.data.start import start_source

    # What reads ahead is a process of its own, without a GPU.
    config = compose(arguments)
    data = start_source(config)
    with fake_cuda() as seen:
        from k25_train.training.run import build_run
        from k25_train.training.step import train_step
        from parallel.megatron.platform import use_platform

        run = build_run(config, use_platform("cuda"), data)
        with run.data:
            with seen.paused():
                train_step(run, 1)
            found = in_step(seen, run, train_step)
            found |= in_modules(seen, run)
            missing = [name for name in kernels if not seen.kernels[f"{name}.default"]]
            assert not missing, (missing, [name for name in seen.kernels if "att" in name])
            return found


def in_step(seen: Seen, run: Any, train_step: Callable[..., Any]) -> ByPart:
    """What blocks in the parts of step 2."""
    from k25_train.training import step

    found: ByPart = {part: [] for part in PARTS}

    def recorded(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with collected(seen, found[part]):
                return function(*args, **kwargs)

        return call

    watched = (
        (run.reader, "step", "inputs"),
        (run.tower, "start", "tower"),
        (run.tower, "finish", "tower"),
        (step, "run_schedule", PASSES),
        (run.optimizer, "step", OPTIMIZER),
        (run.qk_clip, "gather", OPTIMIZER),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(collected(seen, found["end of step"]))
        for owner, name, part in watched:
            function = recorded(part, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, function))
        train_step(run, 2)
    return found


def in_modules(seen: Seen, run: Any) -> ByPart:
    """What blocks in one layer of each kind and in the encoder, forward and backward."""
    from k25_train.model.packed_documents import PackedDocuments

    config, topology, device = run.config, run.topology, run.topology.device
    layers = [layer for chunk in run.chunks for layer in chunk.module.language_model.decoder.layers]
    moe = next(layer for layer in layers if hasattr(layer.mlp, "router"))
    dense = [layer for layer in layers if layer is not moe and not hasattr(layer.mlp, "router")]
    length = config.train.seq_len

    def through_layer(layer: Any) -> None:
        with seen.paused():
            dtype = next(layer.parameters()).dtype
            shape = length // topology.cp_size, 1, config.model.hidden_size
            hidden = torch.randn(shape, device=device, dtype=dtype)
        lengths, padding = (length - 40, 30, 10), (2,)
        if topology.cp_size > 1:
            plan = plan_context(lengths, padding, topology.cp_size)
            documents = PackedDocuments.of_shard(plan, topology.cp_rank, device)
        else:
            documents = PackedDocuments.of(lengths, device, padding)
        output = layer(hidden.requires_grad_(), attention_mask=None, packed_seq_params=documents)[0]
        output.backward(torch.ones_like(output))

    def through_encoder() -> None:
        decoupled = [replica.module for replica in run.tower.replicas]
        encoder = decoupled[0] if decoupled else run.chunks[0].module.encode
        with seen.paused():
            patches = torch.randn(4 * 6 + 4 * 4 + 8 * 8, 588, device=device)
        output = encoder(patches, [(1, 4, 6), (1, 4, 4), (1, 8, 8)])
        output.backward(torch.ones_like(output))

    calls = {"MoE layer": lambda: through_layer(moe), "encoder": through_encoder}
    if dense:
        calls["dense layer"] = lambda: through_layer(dense[0])
    found: ByPart = {}
    for name, call in calls.items():
        with collected(seen, found.setdefault(name, [])):
            call()
    return found


@contextlib.contextmanager
def collected(seen: Seen, blocking: list[Blocking]) -> Iterator[None]:
    """Within: what blocks goes to this list."""
    before, seen.blocking = seen.blocking, blocking
    try:
        yield
    finally:
        seen.blocking = before
