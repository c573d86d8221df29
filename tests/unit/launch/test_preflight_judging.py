"""Verdicts between nodes, who is to blame when measuring breaks off, and what is printed and written."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from launch.preflight.__main__ import check_world_size, main
from launch.preflight.cross_node import Offset, judge_clocks, judge_versions
from launch.preflight.findings import Finding, Verdict, failed, passed, skipped, warned
from launch.preflight.measurements import culprits, judge_measurements
from launch.preflight.rank import Fault, RankMeasurements
from launch.preflight.rates import Link
from launch.preflight.report import print_report, summary, write_report

GOOD = {"card firmware": "28.39.1002", "GPU driver": "580.95.05", "kernel": "6.8.0-60"}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({"GPU driver": "570.12"}, Verdict.failed),
        ({"kernel": "6.8.0-55"}, Verdict.warned),
        ({}, Verdict.passed),
    ],
)
def test_a_node_with_another_version_is_named(changed: dict[str, str], verdict: Verdict) -> None:
    findings = judge_versions({"a": GOOD, "b": GOOD | changed, "c": GOOD})
    assert [findings[node].verdict for node in "abc"] == [Verdict.passed, verdict, Verdict.passed]
    for name, value in changed.items():
        assert f"{name} {value}" in findings["b"].found
        assert f"{name} {GOOD[name]}" in findings["b"].rule


def test_a_clock_that_is_off_beyond_doubt() -> None:
    offsets = {
        "b": Offset(seconds=0.002, uncertainty_s=0.001),
        "c": Offset(seconds=-3.0, uncertainty_s=0.001),
        "d": Offset(seconds=3.0, uncertainty_s=4.0),
        "e": None,
    }
    findings = judge_clocks(offsets, "a")
    assert [findings[node].verdict for node in "abcde"] == [
        Verdict.passed,
        Verdict.passed,
        Verdict.warned,
        Verdict.passed,
        Verdict.skipped,
    ]
    assert findings["c"].found == "-3000.0 ms (± 1.0 ms) against a"


def stuck(peer: int | None, exchange: int | None) -> RankMeasurements:
    return RankMeasurements(fault=Fault(text="exchange with rank", peer=peer, exchange=exchange))


@pytest.mark.parametrize(
    ("measured", "guilty"),
    [
        ({0: RankMeasurements(), 1: RankMeasurements(), 2: RankMeasurements(), 3: RankMeasurements()}, set()),
        # Rank 2 is gone; the others are not to blame.
        ({0: stuck(2, 1), 1: stuck(0, 2), 3: stuck(1, 3)}, {2}),
        # Rank 2 hangs but reports it; rank 1 waits for rank 0 as a consequence.
        ({0: stuck(2, 1), 1: stuck(0, 2), 2: stuck(0, 1), 3: stuck(1, 3)}, {0, 2}),
        # No rank knows which one it waits for.
        ({0: stuck(None, None), 1: RankMeasurements(), 2: RankMeasurements(), 3: RankMeasurements()}, {0}),
    ],
)
def test_who_is_to_blame(measured: dict[int, RankMeasurements], guilty: set[int]) -> None:
    assert culprits(measured, range(4)) == guilty


def test_nodes_that_only_wait_do_not_fail(config: Config) -> None:
    measured = {0: stuck(2, 1), 1: stuck(0, 2), 3: stuck(1, 3)}
    nodes = {0: "a", 1: "a", 2: "b", 3: "b"}
    findings = judge_measurements(measured, nodes, config)
    assert findings["b"][0].verdict is Verdict.failed
    assert "ranks [2] did not continue" in findings["b"][0].found
    assert findings["a"][0].verdict is Verdict.skipped


def test_rates_below_those_of_the_plan(config: Config) -> None:
    """cluster.rates expects 656 of products, cluster.host_copy_gb_per_s 20."""
    measured = {rank: RankMeasurements(gemm_tflops=300.0, host_copy_gb_per_s=40.0) for rank in range(8)}
    findings = judge_measurements(measured, dict.fromkeys(range(8), "a"), config)["a"]
    (plan,) = [one for one in findings if one.check == "rates of the plan"]
    assert plan.verdict is Verdict.warned
    assert plan.found == "cluster.rates.bf16_tflops x gemm_efficiency needs 655.707, measured 300"


def test_a_network_below_that_of_the_plan(config: Config) -> None:
    """cluster.network_gb_per_s is 50, of which 80% are enough; the slower end of a connection counts."""
    fast, slow = (Link(pair=(0, 1), gb_per_s=rate) for rate in (45.0, 30.0))
    for links, verdict in (((fast, fast), Verdict.passed), ((fast, slow), Verdict.warned)):
        measured = {rank: RankMeasurements(links=[link]) for rank, link in enumerate(links)}
        (plan,) = judge_measurements(measured, {0: "a", 1: "b"}, config)["b"][-1:]
        assert (plan.check, plan.verdict) == ("rates of the plan", verdict)
    assert plan.found == "cluster.network_gb_per_s needs 40, measured 30"


def test_nothing_is_reached_that_was_not_measured(config: Config) -> None:
    """A preflight that measured no rate at all used to say "reached"."""
    for measured, verdict, found in (
        (RankMeasurements(), Verdict.skipped, "none of them was measured"),
        (
            RankMeasurements(gemm_tflops=700.0),
            Verdict.passed,
            "reached by cluster.rates.bf16_tflops x gemm_efficiency: 700; not measured: "
            "cluster.host_copy_gb_per_s, cluster.network_gb_per_s",
        ),
    ):
        (plan,) = judge_measurements({0: measured}, {0: "a"}, config)["a"][-1:]
        assert (plan.check, plan.verdict, plan.found) == ("rates of the plan", verdict, found)


def test_whoever_is_stopped_by_others_completed_nothing(config: Config) -> None:
    """A device that fails stops all, before nodes try each other; so does a node that nobody reaches."""
    broken = RankMeasurements(gemm_tflops=500.0, fault=Fault(text="computing: CUDA error"))
    computed = RankMeasurements(gemm_tflops=500.0, host_copy_gb_per_s=40.0)
    names = {0: "a", 1: "b", 2: "c"}
    findings = judge_measurements({0: computed, 1: broken, 2: computed}, names, config)
    for node in "ac":
        measurement, reach = findings[node][:2]
        assert (measurement.verdict, measurement.found) == (Verdict.skipped, "broken off because of b")
        assert (reach.check, reach.verdict) == ("reachable", Verdict.skipped)
    tried = {rank: RankMeasurements(refused={1: "refused"} if rank != 1 else {}) for rank in names}
    assert [judge_measurements(tried, names, config)[node][0].verdict for node in "abc"] == [
        Verdict.skipped
    ] * 3


NODES = {
    "node-1": [passed("GPU count", "8 x NVIDIA H800"), skipped("clock", "no answer")],
    "node-2": [passed("GPU count", "8 x NVIDIA H800"), warned("clock", "late", "be on time", "chronyd")],
    "node-3": [failed("GPU count", "7 x NVIDIA H800", "8 are expected", "drain it"), passed("clock", "0 ms")],
}


def test_report_names_nodes_and_remedies() -> None:
    output = io.StringIO()
    print_report(Console(file=output, width=140), NODES)
    lines = [" ".join(line.split()) for line in output.getvalue().splitlines()]
    assert "GPU count FAIL node-3 7 x NVIDIA H800; 8 are expected; drain it" in lines
    assert "GPU count pass node-1, node-2 8 x NVIDIA H800" in lines
    assert "node-3 FAIL GPU count - 1 0" in lines
    assert "node-2 warn - clock 1 0" in lines
    assert summary(NODES) == "preflight FAILED on 1 of 3 node(s): node-3"
    sound: dict[str, list[Finding]] = {name: NODES[name] for name in ("node-1", "node-2")}
    assert summary(sound) == "preflight passed on 2 node(s), 1 with warnings"


def test_the_worst_comes_first() -> None:
    output = io.StringIO()
    nodes = {
        "a": [passed("clock", "0 ms")],
        "b": [warned("clock", "late", "rule", "remedy")],
        "c": [failed("clock", "stopped", "rule", "remedy")],
    }
    print_report(Console(file=output, width=140), nodes)
    words = [line.split()[1] for line in output.getvalue().splitlines() if line.startswith("clock")]
    assert words == ["FAIL", "warn", "pass"]


def test_json_has_every_finding(tmp_path: Path) -> None:
    report = json.loads(write_report(tmp_path / "run", NODES, {"node-1": {"read": 1}}).read_text())
    assert report["verdict"] == "failed"
    assert report["nodes"]["node-1"]["verdict"] == "passed"
    assert report["nodes"]["node-1"]["facts"] == {"read": 1}
    (count, _) = report["nodes"]["node-3"]["findings"]
    assert count == {
        "check": "GPU count",
        "verdict": "failed",
        "found": "7 x NVIDIA H800",
        "rule": "8 are expected",
        "remedy": "drain it",
    }


def test_other_ranks_than_configured_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["k25-preflight", "experiment=smoke"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "2 ranks started, 2 per node, but cluster.nodes=1 x cluster.gpus_per_node=4" in error
    assert "torchrun --nnodes 1 --nproc-per-node 4" in error
    check_world_size(compose(["experiment=smoke", "cluster.gpus_per_node=2", "parallelism.ep=1"]))


def test_options_may_be_between_overrides(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["k25-preflight", "experiment=smoke", "--report", "x", "train.steps=0"])
    with pytest.raises(SystemExit):
        main()
    assert "train.steps=0" in capsys.readouterr().err


def printed(nodes: dict[str, list[Finding]]) -> list[str]:
    """The report's lines, with single spaces."""
    output = io.StringIO()
    print_report(Console(file=output, width=200), nodes)
    return [" ".join(line.split()) for line in output.getvalue().splitlines()]


def test_hundreds_of_nodes_with_one_fault_in_other_numbers_are_few_lines() -> None:
    nodes = {f"n{i}": [warned("errors", f"{i} errors", "none", "reset")] for i in range(512)}
    lines = [line for line in printed(nodes) if line.startswith("errors")]
    assert lines[0] == "errors warn n0 0 errors; none; reset"
    assert lines[4:] == [
        "errors warn n4, n5, n6 and 505 more 4 errors, and similar on the others; none; reset"
    ]
    same = {f"n{i}": [warned("errors", "3 errors", "none", "reset")] for i in range(512)}
    assert printed(same)[1] == "errors warn all 512 3 errors; none; reset"


def test_checks_skipped_for_one_reason_share_a_line() -> None:
    found = [skipped(name, "no GPU") for name in ("a", "b", "c")]
    lines = printed({"n": [*found, passed("d", "yes"), skipped("e", "no GPU"), skipped("f", "no GPU")]})
    assert lines[1:5] == [
        "a and 2 more, to c skipped n no GPU",
        "d pass n yes",
        "e skipped n no GPU",
        "f skipped n no GPU",
    ]
