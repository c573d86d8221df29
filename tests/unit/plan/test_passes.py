"""Passes alone and overlapped: what bounds them, what adds up, and the sign of every choice."""

from functools import cache

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.plan.assumptions import AS_CONFIGURED, Assumptions, OtherCode
from k25_train.plan.cause import Cause
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.lanes import Resource
from k25_train.plan.time.nodes import copy_node
from k25_train.plan.time.passes import PassTime, PassTimes, pass_times
from k25_train.plan.time.step import chunk_seconds
from parallel.config import ContextExchange

K25 = "experiment=k25_pretrain_4k"
STAGE = 16 + 3
"""A chunk of two layers with experts, one of 16 stages."""
SERIAL = ("parallelism.overlap_expert_comm=false", "parallelism.delay_wgrad=false")


@cache
def composed(*overrides: str) -> Config:
    return compose([K25, *overrides])


@cache
def times(*overrides: str, assumptions: Assumptions = AS_CONFIGURED) -> PassTimes:
    return pass_times(plan_pipeline(composed(*overrides), assumptions=assumptions))


def pair(*overrides: str, assumptions: Assumptions = AS_CONFIGURED) -> PassTime:
    return times(*overrides, assumptions=assumptions).pair(STAGE, STAGE)


def alone(*overrides: str, assumptions: Assumptions = AS_CONFIGURED) -> tuple[PassTime, PassTime]:
    found = times(*overrides, assumptions=assumptions)
    return found.alone(STAGE, is_forward=True), found.alone(STAGE, is_forward=False)


def all_passes(found: PassTimes) -> list[PassTime]:
    """Every pass and pair that its schedules have."""
    pp, vpp = found.pipeline.layout.pp, found.pipeline.layout.vpp
    passes = [found.alone(chunk, is_forward=way) for chunk in range(pp * vpp) for way in (True, False)]
    for stage in range(pp):
        chunks = [vp_stage * pp + stage for vp_stage in range(vpp)]
        passes += [found.pair(first, second) for first in chunks for second in chunks]
    return passes


@pytest.mark.parametrize("overrides", [(), SERIAL, ("activation=keep", "parallelism.dispatcher=hybridep")])
def test_parts_add_up_and_no_resource_is_busier_than_the_pass(overrides: tuple[str, ...]) -> None:
    for each in all_passes(times(*overrides)):
        assert sum(each.parts.values()) == pytest.approx(each.seconds)
        assert all(value >= 0 for value in each.parts.values())
        assert all(busy_s <= each.seconds + each.message_s + 1e-9 for busy_s in each.busy_s.values())


def test_on_a_cpu_passes_take_their_flops() -> None:
    for overrides in (["experiment=smoke"], ["experiment=smoke", "parallelism=pp2_vpp2_ep2_overlapped"]):
        pipeline = plan_pipeline(compose(overrides))
        found, expected = pass_times(pipeline), chunk_seconds(pipeline)
        for chunk in range(found.num_chunks):
            forward, backward = (found.alone(chunk, is_forward=way) for way in (True, False))
            assert forward.seconds == pytest.approx(expected.forward_s[chunk], rel=1e-12)
            assert backward.seconds == pytest.approx(expected.backward_s[chunk], rel=1e-12)
            # Overlapped too: nothing is sent that could be hidden.
            both = found.pair(chunk, chunk).seconds
            assert both == pytest.approx(forward.seconds + backward.seconds, rel=1e-12)


def test_a_calibration_adds_to_passes_of_a_cpu() -> None:
    plain, later, slower, sent = (
        pass_times(plan_pipeline(compose(["experiment=smoke", *more])))
        for more in (
            (),
            ("cluster.rates.calibration.pass_ms=3",),
            ("cluster.rates.calibration.kernels=2",),
            ("cluster.rates.calibration.exchange=1.5",),
        )
    )
    before = plain.alone_s(1, is_forward=True)
    assert later.alone_s(1, is_forward=True) == pytest.approx(before + 3e-3)
    assert later.pair_s(1, 1) == pytest.approx(plain.pair_s(1, 1) + 6e-3)
    assert slower.alone_s(1, is_forward=True) == pytest.approx(2 * before)
    assert sent.alone_s(1, is_forward=True) > before


def test_overlap_is_never_slower_than_one_after_the_other_nor_faster_than_what_it_needs() -> None:
    for dispatcher in ("alltoall", "deepep"):
        overlapped = pair(f"parallelism.dispatcher={dispatcher}")
        forward, backward = alone(*SERIAL, f"parallelism.dispatcher={dispatcher}")
        assert overlapped.seconds < forward.seconds + backward.seconds
        computing = [
            each.parts.get(cause, 0.0)
            for each in (forward, backward)
            for cause in (Cause.compute, Cause.memory_bound, Cause.recompute, Cause.storage)
        ]
        # What computation adds up on the stream of exchanges may hide, as exchanges may.
        on_exchanges = 0.05
        assert overlapped.seconds >= (1 - on_exchanges) * sum(computing)
        assert overlapped.seconds >= overlapped.busy_s["network"] - overlapped.message_s


def test_exchanges_are_exposed_in_passes_alone_and_hidden_in_pairs() -> None:
    forward, backward = alone("activation=keep")
    shown = forward.parts[Cause.experts] + backward.parts[Cause.experts]
    overlapped = pair("activation=keep").parts[Cause.experts]
    assert overlapped < shown / 2
    # What is left is the SMs that they take, above all.
    assert overlapped > 0


def test_delayed_weight_gradients_hide_exchanges_and_messages() -> None:
    delayed, at_once = pair(), pair("parallelism.delay_wgrad=false")
    assert delayed.seconds < at_once.seconds
    _, backward = alone("activation=keep")
    _, without = alone("activation=keep", "parallelism.delay_wgrad=false")
    assert backward.seconds < without.seconds
    assert delayed.message_s < at_once.message_s


def test_what_is_made_again_or_stored_in_fp8_takes_time() -> None:
    kept, again, stored = pair("activation=keep"), pair("activation=selective"), pair("activation=k2")
    assert Cause.recompute in again.parts
    assert kept.seconds < again.seconds < stored.seconds
    assert Cause.storage in stored.parts
    assert Cause.storage not in again.parts
    whole = Assumptions(code=OtherCode(recomputes_layers=True))
    layers = pair("activation=keep", assumptions=whole)
    assert layers.seconds > again.seconds
    assert layers.parts[Cause.recompute] > 0.2 * layers.parts[Cause.compute]


def test_offloading_costs_nothing_on_a_fast_bus_and_is_exposed_on_a_slow_one() -> None:
    fast, slow = pair("activation=k2"), pair("activation=k2", "cluster.host_copy_gb_per_s=3")
    assert slow.parts[Cause.offload] > 0.3 * slow.seconds
    assert fast.parts.get(Cause.offload, 0.0) < 0.02 * fast.seconds
    copied = slow.busy_s["to the host"] - slow.busy_s["network"]
    assert slow.seconds > 0
    assert copied < slow.seconds


def test_copies_of_passes_that_take_turns_go_on_through_both() -> None:
    """A bus that needs two thirds of their time is hidden, though that is longer than a forward pass."""
    plain = sum(each.seconds for each in alone("activation=keep", *SERIAL))
    of_layers = times("activation=k2", *SERIAL)._device.moe.to_host.seconds
    # At 20 GB/s; two layers.
    rate = 20 * 2 * of_layers / (plain * 2 / 3)
    forward, backward = alone("activation=k2", *SERIAL, f"cluster.host_copy_gb_per_s={rate}")
    assert 2 * of_layers * 20 / rate > forward.seconds
    assert forward.parts.get(Cause.offload, 0.0) == pytest.approx(0.0, abs=1e-6)
    assert backward.parts.get(Cause.offload, 0.0) == pytest.approx(0.0, abs=1e-6)


def test_an_exchange_keeps_its_sms_from_products() -> None:
    few, many = (
        pair("activation=keep", "parallelism.dispatcher=deepep", f"parallelism.dispatcher_sms={sms}")
        for sms in (8, 48)
    )
    assert few.seconds < many.seconds
    assert few.parts[Cause.experts] < many.parts[Cause.experts]


def test_a_copy_takes_its_share_of_the_devices_link() -> None:
    setting = times()._device.setting
    copied = copy_node(setting, 20e9, Resource.to_host)
    assert copied.seconds == pytest.approx(1.0)
    assert copied.shares[Resource.to_host] == pytest.approx(20 / 55)


def test_network_and_copies_share_a_link_where_there_is_one() -> None:
    shared, apart = (
        pair("cluster.host_copy_gb_per_s=40", f"cluster.rates.pcie_gb_per_s={link}") for link in (44, "null")
    )
    assert shared.seconds > apart.seconds


def test_assumptions_make_passes_longer_or_shorter() -> None:
    plain = pair("activation=keep")
    busiest = pair("activation=keep", assumptions=Assumptions(expert_imbalance=1.5))
    assert busiest.seconds > plain.seconds
    # Experts are half of a layer, and exchanges hidden as before.
    assert busiest.seconds < 1.5 * plain.seconds
    short = pair("activation=keep", assumptions=Assumptions(document_tokens=256))
    assert short.seconds < plain.seconds
    graphs = pair("activation=keep", assumptions=Assumptions(code=OtherCode(cuda_graphs=True)))
    # But for the order in which little things happen to run.
    assert graphs.seconds < 1.001 * plain.seconds
    assert Cause.host not in graphs.parts
    of_attention = Assumptions(code=OtherCode(cuda_graphs=True, graphs_experts=False))
    launched = "cluster.rates.launch_us=60"
    times_s = [
        pair("activation=keep", launched, assumptions=each).seconds
        for each in (Assumptions(code=OtherCode(cuda_graphs=True)), of_attention, AS_CONFIGURED)
    ]
    assert times_s == sorted(times_s)
    assert times_s[0] < times_s[-1]
    slow_host = pair("activation=keep", "cluster.rates.launch_us=200")
    assert slow_host.parts[Cause.host] > 0.3 * slow_host.seconds
    fast_code = Assumptions(code=OtherCode(fused_elementwise=True))
    assert pair("activation=keep", assumptions=fast_code).seconds < plain.seconds
    fp8 = Assumptions(code=OtherCode(dispatch_bytes=1))
    assert pair("activation=keep", assumptions=fp8).busy_s["network"] < plain.busy_s["network"]


def test_ranks_that_share_a_sequence_compute_less_each_and_exchange_latents() -> None:
    stretched = "model.rope.scaling_factor=8"
    long = (stretched, "train.seq_len=32768", "train.global_batch_size=2048", "activation=keep")
    one = pair(*long)
    for exchange in ContextExchange:
        two = pair(*long, "parallelism.cp=2", f"parallelism.cp_exchange={exchange.value}")
        # Keys and values are made by both, and again backward; and FlashAttention 2 is slower than cuDNN.
        assert 0.5 * one.seconds < two.seconds < 0.85 * one.seconds
    assert two.busy_s["nvlink"] > 0.5 * one.busy_s["nvlink"]


def test_the_last_chunk_has_head_and_multi_token_prediction() -> None:
    found = times()
    last = found.num_chunks - 1
    head = found.alone(last, is_forward=True)
    # 2 x 4,096 x 7,168 x 163,840 FLOPs.
    assert head.parts[Cause.compute] > 9.6e12 / 989e12
    mtp = times(assumptions=Assumptions(code=OtherCode(mtp_layers=1)))
    assert mtp.alone_s(last, is_forward=True) > 2 * head.seconds


def test_messages_leave_after_the_end_of_passes_alone() -> None:
    forward, backward = alone("activation=keep")
    message_s = 4096 * 7168 * 2 / 50e9
    assert forward.message_s == pytest.approx(message_s)
    # The first layer's weights' gradients are computed meanwhile.
    assert backward.message_s == pytest.approx(0.0, abs=1e-9)
