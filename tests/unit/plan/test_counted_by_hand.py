"""Bytes and seconds of the real job's kernels and messages, counted by hand."""

from functools import cache

import pytest

from k25_train.compose.resolve import compose
from k25_train.plan.assumptions import AS_CONFIGURED, Assumptions
from k25_train.plan.kernels.kernel import Attention, Moved, Precision, Product
from k25_train.plan.kernels.layer import layer_kernels
from k25_train.plan.kernels.work import Phase, Setting
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.time.chunk_nodes import ChunkKind, Device
from k25_train.plan.time.data_parallel import chunk_exchange
from k25_train.plan.time.nodes import latents_node
from k25_train.plan.time.optimizer import optimizer_part, optimizer_times, slowest_optimizer
from k25_train.plan.time.pass_program import COMPUTE, FROM_HOST, LATENTS, TO_HOST, PassProgram
from k25_train.plan.time.sequence_exchange import HOP_S
from parallel.config import ContextExchange

TOKENS, HIDDEN, CHOSEN, INNER = 4096, 7168, 8, 2048
TWO_LAYERS = ChunkKind(0, 2, False, False)


@cache
def planned(*overrides: str, assumed: Assumptions = AS_CONFIGURED) -> PipelinePlan:
    return plan_pipeline(compose(["experiment=k25_pretrain_4k", *overrides]), assumptions=assumed)


def test_a_product_reads_its_factors_and_writes_or_adds_its_result() -> None:
    plain, added = (Product("p", 3, 5, 7, count=2, accumulates=is_added) for is_added in (False, True))
    assert plain.num_bytes(Precision.bfloat16) == 2 * (2 * (3 + 5) * 7 + 2 * 3 * 5)
    # A float32 sum is read and written.
    assert added.num_bytes(Precision.bfloat16) == 2 * (2 * (3 + 5) * 7 + 8 * 3 * 5)
    assert plain.num_bytes(Precision.fp8) == 2 * ((3 + 5) * 7 + 2 * 3 * 5)


def test_attention_moves_its_four_tensors_and_backward_their_gradients() -> None:
    forward, backward = (Attention("a", 50, 10, 4, 192, 128, is_backward=back) for back in (False, True))
    assert forward.num_bytes(Precision.bfloat16) == 10 * 4 * 2 * (192 + 192 + 128 + 128)
    assert backward.num_bytes(Precision.bfloat16) == 2 * forward.num_bytes(Precision.bfloat16)
    assert forward.computed_flops == forward.flops == 2 * 50 * 4 * (192 + 128)
    assert backward.computed_flops == 2 * 50 * 4 * (3 * 192 + 2 * 128)


def test_kernels_of_experts_move_rows_as_often_as_they_touch_them() -> None:
    works = layer_kernels(planned("activation=keep").stages[1], 5).experts.works
    moved = {
        (each.kernel.name, each.phase): each.kernel.total_bytes
        for each in works
        if isinstance(each.kernel, Moved)
    }
    # Silu 2 and times values 3, times the router's weight 2; backward 18, as the module counts them.
    each = 2 * TOKENS * CHOSEN * INNER
    assert moved["experts: SwiGLU", Phase.forward] == 7 * each
    assert moved["experts: SwiGLU, backward", Phase.backward] == 18 * each
    # Every row is read and written, both ways.
    rows = 2 * 2 * TOKENS * CHOSEN * HIDDEN
    for name in ("rows by expert", "rows as received"):
        assert moved[name, Phase.forward] == moved[f"{name}, backward", Phase.backward] == rows


@pytest.mark.parametrize("exchange", [each.value for each in ContextExchange])
def test_ranks_of_a_sequence_get_each_others_latents_and_once_more_backward(exchange: str) -> None:
    """512 numbers and a rotary key of 64 for each of the 3,072 tokens that the other three have; backward
    their gradients as well, in float32."""
    setting = Setting.of(planned("parallelism.cp=4", f"parallelism.cp_exchange={exchange}").stages[1])
    num_waits = 3 if exchange == "ring" else 1
    for forward, backward, each_bytes in ((TWO_LAYERS, None, 2), (None, TWO_LAYERS, 6)):
        seconds = 3 * 1024 * (512 + 64) * each_bytes / 150e9 + num_waits * HOP_S
        assert latents_node(setting, is_forward=backward is None).seconds == pytest.approx(seconds)
        program = PassProgram(Device(setting))
        program.run(forward, backward)
        sent_s = sum(task.seconds for task in program.tasks if task.stream == LATENTS)
        # Forward, counts of the router are added up in each of two layers.
        assert sent_s == pytest.approx(2 * seconds + 2 * HOP_S * (backward is None))


def test_a_ring_sends_while_it_attends_and_a_gathering_before() -> None:
    for exchange, waits in (("ring", False), ("all_gather", True)):
        setting = Setting.of(planned("parallelism.cp=4", f"parallelism.cp_exchange={exchange}").stages[1])
        program = PassProgram(Device(setting))
        program.run(TWO_LAYERS, None)
        latents = next(at for at, task in enumerate(program.tasks) if task.stream == LATENTS)
        attention = next(task for task in program.tasks if task.stream == COMPUTE)
        assert (latents in attention.after) is waits
        # What follows waits for both.
        counts = [task for task in program.tasks if task.stream == LATENTS][1]
        assert latents in counts.after or waits


def test_overlapped_passes_copy_what_one_saves_and_the_other_needs() -> None:
    setting = Setting.of(planned().stages[1])
    program = PassProgram(Device(setting))
    program.run(TWO_LAYERS, TWO_LAYERS)
    copied = sum(layer_kernels(planned().stages[1], layer).host_bytes for layer in (2, 3))
    for stream in (TO_HOST, FROM_HOST):
        copied_s = sum(task.seconds for task in program.tasks if task.stream == stream)
        assert copied_s == pytest.approx(copied / 20e9)


def test_gradients_of_a_chunk_by_ring() -> None:
    """512 ranks: 32 replicas of a stage, 8 of them on a node, of which each card carries an eighth; and two
    replicas of each rank's experts, 16 ranks apart."""
    pipeline = planned("cluster.nodes=64")
    found = chunk_exchange(pipeline, 1, 4)
    # Chunk 1 has two layers with experts: attention, norms, router, shared expert.
    experts = 2 * 384 * 3 * HIDDEN * INNER
    held = sum(each.size for each in pipeline.stages[1].text_parameters) / 2
    dense_bytes, expert_bytes = 4 * (held - experts) * 31 / 32, 4 * experts / 16 / 2
    card = 0.85 * 50e9
    assert found.network_s == pytest.approx(dense_bytes / 8 / card + expert_bytes / card)
    assert found.nvlink_s == pytest.approx(dense_bytes / 150e9)
    # Each on both links concurrently, one after the other.
    assert found.seconds == pytest.approx(
        max(dense_bytes / 8 / card, dense_bytes / 150e9) + expert_bytes / card
    )


def test_an_update_reads_and_writes_each_weights_state() -> None:
    """Gradients are cleared whole on each rank, most of them on the first stage's, with the embedding; of 68
    billion weights, which the second stage has the most of, 16 ranks update their shares, 32 bytes each."""
    pipeline = planned()
    first, second = (sum(each.size for each in stage.text_parameters) for stage in pipeline.stages[:2])
    held, updated = first - 3 * 384 * 3 * HIDDEN * INNER * 15 / 16, second / 16
    assert updated == pytest.approx(4.26e9, rel=0.01)
    elementwise_s = optimizer_part(pipeline).seconds - slowest_optimizer(pipeline).total_s
    assert elementwise_s == pytest.approx((4 * held + 32 * updated) / (0.72 * 3350e9), rel=0.01)


def test_the_longest_of_what_the_optimizer_does_counts() -> None:
    """On the device, its exchange is: each rank's 4.26 billion weights go to owners and back in bfloat16. On
    16,384 ranks an owner has less to orthogonalise than one of the largest matrices, which takes its time."""
    roomy = ("optim.offload=none", "cluster.rates.memory_gb=1000")
    times = slowest_optimizer(planned(*roomy))
    assert times.exchange_s == pytest.approx(2 * 2 * 4.26e9 / (0.85 * 50e9), rel=0.01)
    assert times.total_s == times.exchange_s > times.newton_schulz_s
    many = planned(*roomy, "cluster.nodes=2048", "train.eval_sequences=16384")
    last = optimizer_times(many.stages[-1])
    assert last.newton_schulz_s == last.largest_matrix_s > 0
    assert last.total_s == last.largest_matrix_s


@pytest.mark.parametrize(("dispatcher", "expected_s"), [("alltoall", 250e-6), ("ncclep", 0.0)])
def test_the_host_waits_for_numbers_of_tokens_where_it_needs_them(dispatcher: str, expected_s: float) -> None:
    """Ten launches of 25 microseconds until the device has work again; buffers of a fixed size need none."""
    more = () if dispatcher == "alltoall" else ("parallelism.dispatcher_capacity=2",)
    setting = Setting.of(planned(f"parallelism.dispatcher={dispatcher}", *more).stages[1])
    assert Device(setting).moe.wait_s == pytest.approx(expected_s)
    assert Device(setting).dense.wait_s == 0.0
