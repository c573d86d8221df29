"""ZeRO-1: overlap changes no number, the norm counts every parameter once, optimizer bytes fall with dp."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.buckets import OVERLAP, start_in_buckets
from tests.helpers.gradients import CLASSES, gathered_gradients, named_once, scale_gradients, square_sums
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed

SHORT = "train.steps=3 train.global_batch_size=4 optim.warmup=0 optim.decay=0".split()
UNCLIPPED = "optim.grad_clip=1e9"
"""Otherwise the clipping factor carries the summation order of the norm into every parameter."""

SMOKE = {"pp": 2, "vpp": 2, "ep": 2, "dp": 2}


def num_ranks(sizes: dict[str, int]) -> int:
    return sizes.get("pp", 1) * sizes.get("dp", 1)


# Overlap ---------------------------------------------------------------------------------------------------


def train_in_buckets(context: RankContext, arguments: Sequence[str]) -> dict[str, Any]:
    """Train with one parameter a bucket: losses, norms, and how many reductions began before the last step
    of the schedule asked for all that were missing."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup

    from k25_train.training.step import train_step

    run = start_in_buckets(context, arguments, bucket_parameters=1)
    groups = [
        group for chunk in run.chunks for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups
    ]
    finish = BucketGroup.finish_grad_sync
    in_flight = []

    def finish_and_note(self: Any, *args: Any, **kwargs: Any) -> None:
        in_flight.append(self.grad_reduce_handle is not None)
        finish(self, *args, **kwargs)

    BucketGroup.finish_grad_sync = finish_and_note
    with run.data:
        results = [train_step(run, step) for step in range(1, run.config.train.steps + 1)]
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "num_buckets": len(groups),
        "in flight": in_flight[-len(groups) :],
    }


def compare_overlap(data: Path, run: Path, sizes: dict[str, int], *more: str) -> tuple[list, list]:
    """What ranks report without and with overlap."""
    # With a coupled tower, the only one whose gradients are reduced bucket by bucket.
    command = overrides(data, run, *layout(**sizes), *SHORT, UNCLIPPED, "dep.mode=coupled", *more)
    plain, overlapped = (
        run_ranks(train_in_buckets, num_ranks(sizes), [*command, *flags], timeout_s=240.0)
        for flags in ([], OVERLAP)
    )
    # A chunk has one bucket for dense parameters and one for experts, the first one apart those that AdamW
    # updates; or there is one a parameter.
    assert all(rank["num_buckets"] == 2 * sizes.get("vpp", 1) + 1 for rank in plain)
    assert overlapped[0]["num_buckets"] > 40
    # From the second step on, when it is known which gradients complete a bucket.
    assert not any(any(rank["in flight"]) for rank in plain)
    assert all(all(rank["in flight"]) for rank in overlapped)
    return plain, overlapped


BITWISE = {
    "dp2, float32": ({"dp": 2}, "train.dtype=float32"),
    "as smoke, bfloat16": (SMOKE, "train.dtype=bfloat16"),
}
"""Sums over two ranks, whose order cannot differ."""


@pytest.mark.parametrize("name", BITWISE)
def test_overlap_changes_no_bit_of_two_replicas(name: str, data: Path, tmp_path: Path) -> None:
    sizes, dtype = BITWISE[name]
    plain, overlapped = compare_overlap(data, tmp_path, sizes, dtype)
    assert overlapped[0]["losses"] == plain[0]["losses"]
    assert overlapped[0]["norms"] == pytest.approx(plain[0]["norms"], rel=1e-6)


def test_a_bucket_is_gathered_although_a_rank_holds_nothing_but_its_padding(
    data: Path, tmp_path: Path
) -> None:
    """A norm of 64 numbers fills a bucket of 128: the second of two ranks has none of them to update."""
    command = overrides(data, tmp_path, *layout(dp=2), *SHORT, UNCLIPPED)
    plain, alone = (
        run_ranks(train_in_buckets, 2, [*command, *flags], timeout_s=60.0) for flags in ([], OVERLAP[:1])
    )
    assert alone[0]["num_buckets"] > 40
    assert alone[0]["losses"] == plain[0]["losses"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [{"dp": 4}, {"ep": 2, "dp": 4}, {"pp": 2, "dp": 2}, SMOKE], ids=str)
def test_overlap_changes_nothing_in_any_layout(
    sizes: dict[str, int], dtype: str, data: Path, tmp_path: Path
) -> None:
    plain, overlapped = compare_overlap(data, tmp_path, sizes, f"train.dtype={dtype}")
    # Gloo adds four ranks' values in an order that depends on their place in the bucket; of the update,
    # bfloat16 may round what differs in float32's last bit to another number.
    later = 1e-6 if dtype == "float32" else 1e-3
    for values in ("losses", "norms"):
        assert overlapped[0][values][0] == pytest.approx(plain[0][values][0], rel=1e-6)
        assert overlapped[0][values] == pytest.approx(plain[0][values], rel=later)


@pytest.mark.slow
def test_overlap_goes_together_with_expert_overlap(data: Path, tmp_path: Path) -> None:
    also = ["parallelism.overlap_expert_comm=true", "train.dtype=bfloat16"]
    plain, overlapped = compare_overlap(data, tmp_path, SMOKE, *also)
    assert overlapped[0]["losses"] == plain[0]["losses"]


def parameters_around_completion(context: RankContext, arguments: Sequence[str]) -> dict[str, Any]:
    """How many gathers are in flight after an update, and after what completes them or does not;
    sums of each parameter then, where they are complete."""
    from k25_train.metrics.report import Report
    from k25_train.training.evaluation import eval_losses
    from k25_train.training.keeper import CheckpointKeeper
    from k25_train.training.soundness import Soundness, Verdict
    from k25_train.training.step import train_step
    from parallel.megatron.replicas import complete_parameters

    run = start_in_buckets(context, arguments, bucket_parameters=1)
    groups = [
        group for chunk in run.chunks for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups
    ]
    completions = {
        "completed": lambda: complete_parameters(run.chunks),
        "evaluated": lambda: eval_losses(run, 2),
        "saved": lambda: keeper.save(3, Verdict()),
    }
    report = Report(run.config, is_main=run.is_main, device_name="CPU")
    keeper = CheckpointKeeper(run, report, Soundness(run.config.model.vocab_size))

    def in_flight() -> int:
        return sum(group.param_gather_handle is not None for group in groups)

    found: dict[str, Any] = {"num_buckets": len(groups)}
    with run.data:
        for step, (name, complete) in enumerate(completions.items(), start=1):
            train_step(run, step)
            before = in_flight()
            complete()
            sums = [float(each.double().sum()) for chunk in run.chunks for each in chunk.parameters()]
            found[name] = (before, in_flight(), [] if in_flight() else sums)
    return found


def test_gathers_start_with_the_update_and_evaluations_complete_them_but_saves_need_none(
    data: Path, tmp_path: Path
) -> None:
    command = overrides(data, tmp_path, *layout(dp=2), *SHORT, *OVERLAP)
    one, other = run_ranks(parameters_around_completion, 2, command)
    assert one == other
    for name in ("completed", "evaluated"):
        before, after, _ = one[name]
        assert (before, after) == (one["num_buckets"], 0)
    assert one["completed"] != one["evaluated"]
    assert one["saved"] == (one["num_buckets"], one["num_buckets"], [])


# The global norm -------------------------------------------------------------------------------------------


def norms_by_class(
    context: RankContext, arguments: Sequence[str]
) -> dict[str, tuple[float, dict[str, float]]]:
    """For each class of parameters, with its gradients enlarged so that they are nearly all of the norm: the
    optimizer's norm, and the square sum of every gradient that this rank holds, by global name."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    found = {}

    def measure() -> tuple[bool, float, None]:
        for name, chosen in CLASSES.items():
            scale_gradients(run, chosen, 1024.0)
            run.optimizer.prepare_grads()
            found[name] = (float(run.optimizer.get_grad_norm()), square_sums(gathered_gradients(run)))
            scale_gradients(run, chosen, 1 / 1024.0)
        return True, 1.0, None

    run.optimizer.step = measure
    with run.data:
        train_step(run, 1)
    return found


@pytest.fixture(scope="module")
def serial_squares(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    command = overrides(data, tmp_path_factory.mktemp("run"), *layout(), *SHORT)
    (by_class,) = run_ranks(norms_by_class, 1, command)
    return {name: squares for name, (_, squares) in by_class.items()}


NORM_LAYOUTS = {
    "dp2": {"dp": 2},
    "ep2": {"ep": 2, "dp": 2},
    "pp2": {"pp": 2},
    "pp2 x vpp2": {"pp": 2, "vpp": 2},
    "ep2 x dp4, two replicas of each expert": {"ep": 2, "dp": 4},
    "pp2 x vpp2 x ep2, as smoke": SMOKE,
}


SLOW_NORM_LAYOUTS = ("dp2", "ep2", "pp2")
"""Each is part of a larger layout that is always run: for `make test-slow`."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW_NORM_LAYOUTS else [])
        for name in NORM_LAYOUTS
    ],
)
def test_the_norm_counts_each_parameter_once(
    name: str, data: Path, serial_squares: dict[str, dict[str, float]], tmp_path: Path
) -> None:
    sizes = NORM_LAYOUTS[name]
    command = overrides(data, tmp_path, *layout(**sizes), *SHORT)
    by_rank = run_ranks(norms_by_class, num_ranks(sizes), command)

    for kind, chosen in CLASSES.items():
        reported = {rank[kind][0] for rank in by_rank}
        squares = named_once([rank[kind][1] for rank in by_rank])
        assert squares.keys() == serial_squares[kind].keys()
        whole = sum(squares.values())
        assert sum(square for key, square in squares.items() if chosen(key)) > 0.99 * whole, kind
        assert len(reported) == 1
        assert reported.pop() == pytest.approx(whole**0.5, rel=1e-6), kind
        assert whole == pytest.approx(sum(serial_squares[kind].values()), rel=1e-5), kind


# Bytes -----------------------------------------------------------------------------------------------------

BYTES_PER_PARAMETER = {
    "dense, AdamW": 12, "dense, Muon": 8, "experts, Muon": 8, "vision, AdamW": 12, "vision, Muon": 8,
}  # fmt: skip
"""Float32 master and two moments, or one; in the order of the optimizers."""


def optimizer_bytes(context: RankContext, arguments: Sequence[str]) -> dict[str, dict[str, int]]:
    """Bytes of masters and moments of dense parameters and of experts after a step, and sizes to hold them
    against: parameters, their number and ranks that share them."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    with run.data:
        train_step(run, 1)
    found = {}
    parts = zip(BYTES_PER_PARAMETER, run.optimizer.chained_optimizers, strict=True)
    for kind, part in parts:
        masters = [master for group in part.optimizer.param_groups for master in group["params"]]
        state = [
            value
            for master in masters
            for value in part.optimizer.state[master].values()
            if torch.is_tensor(value) and value.dim() > 0
        ]
        parameters = [parameter for buffer in part.buffers for parameter in buffer.params]
        found[kind] = {
            "bytes": sum(tensor.numel() * tensor.element_size() for tensor in masters + state),
            "elements": sum(parameter.numel() for parameter in parameters),
            "tensors": len(parameters),
            "buckets": sum(len(buffer.buckets) for buffer in part.buffers),
            "shards": part.data_parallel_group.size(),
        }
    return found


def most_padding(sizes: dict[str, int]) -> int:
    """Elements that megatron-core adds at most: parameters start at multiples of 64, and buckets end at
    multiples of lcm(shards, 128), which is 128 for up to 128 shards that are a power of two."""
    return 63 * sizes["tensors"] + 127 * sizes["buckets"]


@pytest.mark.parametrize(
    "sizes",
    [
        {"dp": 1},
        pytest.param({"dp": 2}, marks=pytest.mark.slow),
        {"dp": 4},
        pytest.param({"ep": 2, "dp": 2}, marks=pytest.mark.slow),
        {"ep": 2, "dp": 4},
    ],
    ids=str,
)
def test_optimizer_bytes_times_replicas_are_constant_within_padding(
    sizes: dict[str, int], data: Path, tmp_path: Path
) -> None:
    # In bfloat16 masters are tensors of their own, in float32 they are the parameters.
    command = overrides(data, tmp_path, *layout(**sizes), *SHORT, "train.dtype=bfloat16")
    by_rank = run_ranks(optimizer_bytes, num_ranks(sizes), command)

    dp, ep = sizes["dp"], sizes.get("ep", 1)
    for kind, bytes_each in BYTES_PER_PARAMETER.items():
        shards, copies = (dp // ep, ep) if kind.startswith("experts") else (dp, 1)
        ranks = [rank[kind] for rank in by_rank]
        assert all(rank["shards"] == shards for rank in ranks)
        most = [bytes_each * (rank["elements"] + most_padding(rank)) for rank in ranks]
        for rank, limit in zip(ranks, most, strict=True):
            assert rank["bytes"] * shards <= limit, kind
        # Padding has no state: all shards together hold each parameter exactly once.
        held = sum(rank["bytes"] for rank in ranks)
        assert held == copies * bytes_each * ranks[0]["elements"], kind


# Checkpoints -----------------------------------------------------------------------------------------------


def written_bytes(checkpoint: Path) -> dict[int, int]:
    """Rank -> bytes of the tensors' files that it wrote."""
    sizes: dict[int, int] = {}
    for file in checkpoint.glob("rank_*.safetensors"):
        rank = int(file.name.split("_")[1])
        sizes[rank] = sizes.get(rank, 0) + file.stat().st_size
    return sizes


def test_replicas_write_equal_shares_of_a_checkpoint(run_as_smoke: Path) -> None:
    sizes = written_bytes(run_as_smoke / "checkpoints/step_10")
    assert sizes.keys() == {0, 1, 2, 3}
    for stage in ((0, 1), (2, 3)):
        shares = [sizes[rank] for rank in stage]
        assert max(shares) / (sum(shares) / len(shares)) <= 1.1, sizes
