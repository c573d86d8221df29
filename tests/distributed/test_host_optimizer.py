"""What state in host memory costs: bytes held and bytes moved, counted, and no wait for the device.

On fake CUDA tensors (tests/helpers/fake_cuda.py) with collectives over gloo.
"""

import mmap
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from k25_train.compose.resolve import compose
from k25_train.plan.optimizer import stage_state
from k25_train.plan.pipeline import plan_pipeline
from tests.helpers.fake_cuda import DEVICE, fake_cuda
from tests.helpers.fake_cuda_seen import Seen
from tests.helpers.optimizer_on_host import ON_DEVICE, ON_HOST
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed


class HostAllocations(TorchDispatchMode):
    """Within: sizes of results in pageable host memory, but for single numbers."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, list | tuple) else [result]:
            is_in_host = isinstance(each, torch.Tensor) and not each.is_cuda and each.numel() > 1
            if is_in_host and not self._seen.pinned.has(each):
                self.sizes.append(each.numel())
        return result


def observe_step(context: RankContext, arguments: Sequence[str]) -> dict[str, Any]:
    """An optimizer step on fake CUDA tensors: what blocks, which regions are locked, what is copied."""
    with fake_cuda() as seen:
        with seen.paused():
            run = start_on_gpu(context, arguments)
            for part in run.optimizer.chained_optimizers:
                for shard in part.shards().values():
                    shard.gradient.normal_()
        regions = list(seen.pinned._ranges)
        seen.copied_bytes.clear()
        with HostAllocations(seen) as made:
            updated = [part.step_with_ready_grads() for part in run.optimizer.chained_optimizers]
        found = {
            "updated": all(updated),
            "made in the host": made.sizes,
            "blocking": seen.lines(),
            "copied": dict(seen.copied_bytes),
            "locked": regions,
            "locked in the step": seen.pinned.num_made - len(regions),
            "optimizers": len(run.optimizer.chained_optimizers),
            "elements": elements_by_rule(run),
            "pinned": all(seen.pinned.has(tensor) for tensor in state_tensors(run)),
        }
        with seen.paused():
            found["rounding"] = max(
                float((shard.master - shard.weights.cpu()).abs().max())
                for part in run.optimizer.chained_optimizers
                for shard in part.shards().values()
            )
    return found


def observe_copy(context: RankContext, arguments: Sequence[str]) -> dict[str, Any]:
    """The second copy that a save is written from, on fake CUDA tensors: what blocks, what is copied."""
    with fake_cuda() as seen:
        with seen.paused():
            run = start_on_gpu(context, arguments)
            from k25_train.checkpoint.pieces import pieces
            from k25_train.checkpoint.snapshot import build_snapshot

            snapshot = build_snapshot(run.topology.device)
            own = pieces(run.modules, run.optimizer)
            snapshot.take(own).wait()
            snapshot.wait_to_update()
        seen.copied_bytes.clear()
        copied = snapshot.take(own)
        snapshot.wait_to_update()
        found = {"blocking": seen.lines(), "copied": dict(seen.copied_bytes)}
        with seen.paused():
            copied.wait()
            equal = [
                bool((copy == each.tensor.cpu()).all())
                for (_, copy), each in zip(copied.parts, own, strict=True)
            ]
        return found | {
            "equal": all(equal),
            "on device": sum(each.part.num_bytes for each in own if each.tensor.is_cuda),
            "own": copied.num_bytes,
            "arena": snapshot.num_bytes,
            "pinned": all(seen.pinned.has(tensor) for _, tensor in copied.parts),
        }


def start_on_gpu(context: RankContext, arguments: Sequence[str]) -> Any:
    """Build the run of these overrides on the fake GPU."""
    os.environ.update(context.environment())
    from parallel.megatron.platform import use_platform

    config = compose(arguments)
    from k25_train.data.start import start_source

    data = start_source(config)
    use_platform("cpu")
    from k25_train.training.run import build_run

    return build_run(config, DEVICE, data)


def elements_by_rule(run: Any) -> dict[str, int]:
    """Update rule -> elements of this rank's shards."""
    found: dict[str, int] = {}
    for part in run.optimizer.chained_optimizers:
        name = type(part.optimizer).__name__
        number = sum(shard.end - shard.start for shard in part.shards().values())
        found[name] = found.get(name, 0) + number
    return found


def state_tensors(run: Any) -> list[torch.Tensor]:
    """Masters and moments of this rank."""
    return [
        tensor
        for part in run.optimizer.chained_optimizers
        for master, state in part.optimizer.state.items()
        for tensor in (master, *state.values())
        if tensor.dim()
    ]


@pytest.fixture(scope="module")
def seen(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = overrides(data, tmp_path_factory.mktemp("run"), *layout(), ON_HOST, "train.dtype=bfloat16")
    return run_ranks(observe_step, 1, command)[0]


def test_a_step_makes_the_host_wait_for_nothing(seen: dict[str, Any]) -> None:
    """Every copy of the step is asynchronous, and all of its host memory was locked before."""
    assert seen["updated"]
    assert seen["blocking"] == []
    assert seen["pinned"]
    assert seen["locked in the step"] == 0
    assert seen["made in the host"] == []
    # Weights were written, from masters that are back: bfloat16 of them.
    assert 0 < seen["rounding"] < 0.01


def test_state_crosses_the_bus_once_each_way(seen: dict[str, Any]) -> None:
    elements = seen["elements"]
    expected = 8 * elements["Muon"] + 12 * elements["StreamedAdamW"]
    assert min(elements.values()) > 0
    assert seen["copied"] == {"host to device": expected, "device to host": expected}


def test_locked_regions_share_no_page(seen: dict[str, Any]) -> None:
    """One region for each optimizer: CUDA refuses to lock a page twice (error 712)."""
    pages = sorted((low // mmap.PAGESIZE, -(-high // mmap.PAGESIZE)) for low, high in seen["locked"])
    assert len(pages) == seen["optimizers"]
    assert all(low % mmap.PAGESIZE == 0 for low, _ in seen["locked"])
    assert all(one[1] <= other[0] for one, other in pairwise(pages))


def held_bytes(context: RankContext, arguments: Sequence[str]) -> int:
    """Host memory that this rank's optimizers lock; all of their state is in it."""
    run = start_run(context, arguments)
    parts = run.optimizer.chained_optimizers
    regions = [(part.arena.data_ptr(), part.arena.data_ptr() + part.arena.nbytes) for part in parts]
    for tensor in state_tensors(run):
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        assert any(low <= start and end <= high for low, high in regions)
    held = sum(high - low for low, high in regions)
    assert held == sum(tensor.nbytes for tensor in state_tensors(run)), "a region has room for nothing else"
    return held


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_plan_counts_the_bytes_that_are_held(dtype: str, data: Path, tmp_path: Path) -> None:
    command = overrides(data, tmp_path, *layout(pp=2, ep=2, dp=2), ON_HOST, f"train.dtype={dtype}")
    held = run_ranks(held_bytes, 4, command)
    pipeline = plan_pipeline(compose(command))
    planned = [stage_state(stage).host_bytes for stage in pipeline.stages]
    # Buffers are padded at their end: one rank of a group has a little less than the others.
    assert sum(held) == 2 * sum(planned)
    for stage in range(2):
        for rank in range(2):
            assert held[2 * stage + rank] == pytest.approx(planned[stage], rel=0.05)


@pytest.mark.parametrize("offload", [ON_HOST, ON_DEVICE])
def test_a_save_copies_what_the_rank_has_once_and_nobody_waits(
    offload: str, data: Path, tmp_path: Path
) -> None:
    command = overrides(data, tmp_path / "run", *layout(), offload, "train.dtype=bfloat16")
    (seen,) = run_ranks(observe_copy, 1, command)
    assert seen["blocking"] == []
    assert seen["copied"] == {"device to host": seen["on device"]}
    assert (seen["on device"] == seen["own"]) == (offload == ON_DEVICE)
    assert seen["own"] <= seen["arena"] <= 1.1 * seen["own"]
    assert seen["pinned"] and seen["equal"]
