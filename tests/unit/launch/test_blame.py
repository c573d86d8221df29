"""Who is to blame for the end of an attempt, by recorded folders of every kind and of mixed ones."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.blame.evidence import Evidence, KernelMessage, RankEnd, RankError, Stall, StepFailure
from launch.blame.judge import RULES, SAME_MOMENT_S, judge
from launch.blame.verdict import STRENGTH, Confidence, Kind
from tests.helpers.recorded_attempt import RecordedAttempt as Recorded

Case = tuple[Callable[[Recorded], object], str | None, int | None, Kind]
OOM = "Memory cgroup out of memory: Killed process {pid} (python) total-vm:9GB, anon-rss:7GB"
XID_79 = "NVRM: Xid (PCI:0000:5d:00): 79, pid=1003, name=python, GPU has fallen off the bus."
XID_31 = "NVRM: Xid (PCI:0000:5d:00): 31, pid=1003, name=python, MMU Fault: ENGINE GRAPHICS"
RETRY = (
    "NET/IB: Got completion from peer {}<54862> with status=IBV_WC_RETRY_EXC_ERR(12) opcode=0 vendor_err=129"
)
FIRST_N1 = (
    "n1: task 0: Exited with exit code 1",
    "n3: task 2: Exited with exit code 1",
    "n2: task 1: Killed",
)
"""srun hears of an innocent node first."""


def stopped(job: Recorded) -> None:
    """SIGSTOP of rank 3: all others notice and end; srun kills what is left on n2."""
    job.stall(silent=(3,)).srun(*FIRST_N1)
    for rank in (0, 1, 4, 5):
        job.end(rank, 75, 0.1 * rank)
    job.end(2, 75, 0.4).closed(3, at_s=30.0, status=-9)


def hung_and_answers(job: Recorded) -> None:
    job.stall(culprits=(4,)).srun(*FIRST_N1)
    for rank in range(6):
        job.end(rank, 75, 0.1 * rank)


def killed(job: Recorded) -> None:
    job.end(3, -9).closed(2).victims(0, 1, 4, 5).srun(*FIRST_N1)


def killed_where_the_clock_is_ahead(job: Recorded) -> None:
    job.end(3, -9, 6.0).closed(2, at_s=6.5).victims(0, 1, 4, 5).srun(*FIRST_N1)


def killed_for_memory(job: Recorded) -> None:
    killed(job)
    job.kernel("n2", "usb 1-1: new device", OOM.format(pid=1003))


def another_process_was_killed_for_memory(job: Recorded) -> None:
    """On n1, which is innocent; rank 3 was killed by somebody."""
    killed(job)
    job.kernel("n1", OOM.format(pid=4242))


def killed_for_memory_by_slurm(job: Recorded) -> None:
    job.victims(0, 1, 4, 5).srun("n1: task 0: Exited with exit code 1", "n2: task 1: Out Of Memory")


def crashed(job: Recorded) -> None:
    job.end(3, -11).closed(2).end(0, -6, 0.4).victims(1, 4, 5).srun(*FIRST_N1)


def bus_error(job: Recorded) -> None:
    job.end(3, -7).closed(2).victims(0, 1, 4, 5)


def left_early(job: Recorded) -> None:
    job.end(3, 70, 0.1).closed(2).victims(0, 1, 4, 5, at_s=0.0).srun(*FIRST_N1)


def lost(job: Recorded) -> None:
    job.lost = {"n2": "down*"}
    job.victims(0, 1, 4, 5).srun("n1: task 0: Exited with exit code 1", "Node failure on n2")


def failure_of_a_node(job: Recorded) -> None:
    """It is back before SLURM is asked for its state."""
    job.victims(0, 1).srun("n1: task 0: Exited with exit code 1", "Node failure on n2")


def no_longer_the_jobs(job: Recorded) -> None:
    job.lost = {"n2": "no longer the job's"}


def gone_disk(job: Recorded) -> None:
    path = "/local/cache/shard_7.tar"
    job.end(3, 2, code="EIO", path=path, text=f"{path}: Input/output error [EIO]").closed(2)
    job.end(0, 2, text="rank 3 could not read its share of the data", of_ranks=[3])
    job.end(1, 2, text="rank 3 could not read its share of the data", of_ranks=[3]).srun(*FIRST_N1)


def read_only_for_one_rank(job: Recorded) -> None:
    """All ranks agree on what happened on rank 4."""
    text = "could not be written (rank 4: [Errno 30] Read-only file system)"
    for rank in range(6):
        job.end(rank, 2, kind="CheckpointError", text=text, code="EROFS", of_ranks=[4])


def read_only_for_all(job: Recorded) -> None:
    """Rank 0 makes the folder, before others write into it."""
    path = f"{job.run}/checkpoints/step_12.partial"
    for rank in range(6):
        job.end(rank, 2, kind="CheckpointError", code="EROFS", path=path, text="read-only", of_ranks=[0])


def full_local_disk(job: Recorded) -> None:
    job.end(3, 2, kind="MachineError", code="ENOSPC", path="/tmp/x", text="/tmp/x: No space left [ENOSPC]")
    job.closed(2).victims(0, 1, 4, 5)


def full_shared_folder(job: Recorded) -> None:
    path = f"{job.run}/checkpoints/step_10.partial"
    for rank in range(6):
        job.end(rank, 2, kind="CheckpointError", code="ENOSPC", path=path, text="full", of_ranks=[3])


def dead_device(job: Recorded) -> None:
    raw = "CUDA error: uncorrectable ECC error encountered"
    job.end(3, 1, kind="AcceleratorError", is_fault=True, text=raw, raw=raw).closed(2).victims(0, 1, 4, 5)


def xid(job: Recorded) -> None:
    job.stall(silent=(1,)).kernel("n2", XID_79)


def xid_of_a_program(job: Recorded) -> None:
    """13, 31, 43 and 45 are what programs cause, and what a kill leaves."""
    killed(job)
    job.kernel("n1", XID_31)


def machine_check(job: Recorded) -> None:
    job.victims(0, 1, 2, 3).kernel(
        "n3", "mce: [Hardware Error]: CPU 4: Machine Check: 0 Bank 7: be00000000800400"
    )


def kernels_of_one_machine(job: Recorded) -> None:
    """Test clusters: every node has the same kernel, so it speaks of none of them."""
    killed(job)
    for node in ("n1", "n2", "n3"):
        job.kernel(node, "Buffer I/O error, dev sda, sector 7", XID_79)


def wrong_settings(job: Recorded) -> None:
    for rank in range(6):
        job.end(rank, 2, kind="ConfigError", text="model.vocab_size=8: raise it", is_shared=True)
    job.srun(*FIRST_N1)


def wrong_settings_met_one_by_one(job: Recorded) -> None:
    """Some were ended before they could say so."""
    job.end(0, 2, kind="ConfigError", text="no such data").closed(1)
    job.end(4, 2, 0.7, kind="ConfigError", text="no such data").end(2, -15, 0.9).end(3, -15, 0.9)


def damaged_checkpoint(job: Recorded) -> None:
    facts = {"path": f"{job.run}/checkpoints/step_20", "instead": f"{job.run}/checkpoints/step_10"}
    for rank in range(6):
        job.end(rank, 2, kind="DamagedCheckpointError", text="__1_0.distcp has 7 bytes", **facts)
    job.end(5, -6, 0.5).srun(*FIRST_N1)


def data_of_one_rank(job: Recorded) -> None:
    job.end(3, 2, text="shard_7: damaged").closed(2)
    job.end(0, 2, text="rank 3 could not read its share", of_ranks=[3])


def missing_package(job: Recorded) -> None:
    job.end(3, 2, kind="MachineError", text="a package is missing: numpy").closed(2).victims(0, 1, 4, 5)


def sick_card(job: Recorded) -> None:
    """Every other node lost its connection to n3, and n3 its own to all."""
    job.victims(0, 1, peer="10.0.0.4").victims(2, 3, peer="10.0.0.4").victims(4, peer="10.0.0.2")
    job.victims(5, peer="10.0.0.3").srun(*FIRST_N1)


def sick_card_seen_by_nccl(job: Recorded) -> None:
    """NCCL prints it to the log, and its watchdog aborts the process."""
    for rank, peer in ((0, "10.0.0.3"), (4, "10.0.0.3"), (2, "10.0.0.2")):
        job.end(rank, -6, 0.1 * rank).rank_log(
            rank, f"n1:77 NCCL WARN {RETRY.format(peer)}\nterminate called\n"
        )


def one_connection(job: Recorded) -> None:
    job.victims(0, peer="10.0.0.3")


def sick_link(job: Recorded) -> None:
    job.victims(0, 1, 4, 5).kernel("n2", "mlx5_core 0000:5d:00.0 ens1f0np0: Link down")


def code_fault(job: Recorded) -> None:
    job.end(3, 1, kind="ValueError", text="oops", is_fault=True).closed(2).victims(0, 1, 4, 5)


def code_fault_everywhere(job: Recorded) -> None:
    for rank in range(6):
        job.end(rank, 1, kind="ValueError", text="oops", is_fault=True)


def torchrun_killed(job: Recorded) -> None:
    job.victims(0, 1, 4, 5).srun("n2: task 1: Killed", "n1: task 0: Exited with exit code 1")


def hung_before_the_watchdog(job: Recorded) -> None:
    """All others run into the time-out of their collective."""
    for rank in (0, 1, 4, 5):
        job.end(rank, 2, 0.1 * rank, kind="MachineError", text="Timed out waiting 660000ms", is_of_peer=True)
    job.srun("n1: task 0: Exited with exit code 1", "n3: task 2: Exited with exit code 1")


def no_rendezvous(job: Recorded) -> None:
    job.silent_start = "n1"


def first_alone(job: Recorded) -> None:
    job.srun("n2: task 1: Exited with exit code 1", "n1: task 0: Exited with exit code 1")


def killed_by_the_launcher(job: Recorded) -> None:
    """SLURM clears away what is left of n2 half a minute after n1's own error."""
    job.end(0, 2, kind="MachineError", text="host memory is used up").closed(1).end(3, -9, 31.0)


def two_at_once(job: Recorded) -> None:
    job.end(0, -9).end(3, -9, 0.5)


def one_after_the_other(job: Recorded) -> None:
    """The second dies of the first: it waited in native code."""
    job.end(3, -11).end(0, -11, SAME_MOMENT_S + 1)


def stop_in_a_stall(job: Recorded) -> None:
    """The kill of a stopped rank by its torchrun is no evidence of its own."""
    stopped(job)
    job.end(3, -9, 31.0)


CASES: dict[str, Case] = {
    "rank stopped": (stopped, "n2", 3, Kind.stopped),
    "rank hangs and answers": (hung_and_answers, "n3", 4, Kind.stuck),
    "rank killed": (killed, "n2", 3, Kind.killed),
    "rank killed, clock ahead": (killed_where_the_clock_is_ahead, "n2", 3, Kind.killed),
    "rank killed for memory": (killed_for_memory, "n2", 3, Kind.out_of_memory),
    "another process killed for memory": (another_process_was_killed_for_memory, "n2", 3, Kind.killed),
    "killed for memory by SLURM": (killed_for_memory_by_slurm, "n2", None, Kind.out_of_memory),
    "segmentation fault": (crashed, "n2", 3, Kind.crashed),
    "bus error": (bus_error, "n2", 3, Kind.crashed),
    "early exit 0": (left_early, "n2", 3, Kind.left_early),
    "node lost": (lost, "n2", None, Kind.node_lost),
    "failure of a node": (failure_of_a_node, "n2", None, Kind.node_lost),
    "node no longer the job's": (no_longer_the_jobs, "n2", None, Kind.node_lost),
    "disk gone": (gone_disk, "n2", 3, Kind.disk),
    "read-only for one rank": (read_only_for_one_rank, "n3", 4, Kind.disk),
    "local disk full": (full_local_disk, "n2", 3, Kind.disk),
    "shared folder read-only": (read_only_for_all, None, None, Kind.shared),
    "shared folder full": (full_shared_folder, None, None, Kind.shared),
    "GPU memory broken": (dead_device, "n2", 3, Kind.device),
    "GPU fell off the bus": (xid, "n2", None, Kind.device),
    "XID of a program": (xid_of_a_program, "n2", 3, Kind.killed),
    "machine check": (machine_check, "n3", None, Kind.machine),
    "kernels of one machine": (kernels_of_one_machine, "n2", 3, Kind.killed),
    "settings wrong": (wrong_settings, None, None, Kind.shared),
    "settings wrong, met one by one": (wrong_settings_met_one_by_one, None, None, Kind.shared),
    "checkpoint damaged": (damaged_checkpoint, None, None, Kind.checkpoint),
    "data of one rank": (data_of_one_rank, "n2", 3, Kind.named_error),
    "package missing on one node": (missing_package, "n2", 3, Kind.own_error),
    "network card sick": (sick_card, "n3", None, Kind.peer),
    "network card sick, by NCCL": (sick_card_seen_by_nccl, "n2", None, Kind.peer),
    "one connection": (one_connection, "n2", None, Kind.peer),
    "link down": (sick_link, "n2", None, Kind.link),
    "fault of the code": (code_fault, "n2", 3, Kind.fault),
    "fault of the code everywhere": (code_fault_everywhere, None, None, Kind.fault),
    "torchrun killed": (torchrun_killed, "n2", None, Kind.launcher_killed),
    "hung before the watchdog": (hung_before_the_watchdog, "n2", None, Kind.silent),
    "no rendezvous": (no_rendezvous, "n1", None, Kind.no_start),
    "srun alone": (first_alone, "n2", None, Kind.first),
    "cleared away by SLURM": (killed_by_the_launcher, "n1", 0, Kind.own_error),
    "two at once": (two_at_once, None, None, Kind.killed),
    "one after the other": (one_after_the_other, "n2", 3, Kind.crashed),
    "stopped and cleared away": (stop_in_a_stall, "n2", 3, Kind.stopped),
}


@pytest.mark.parametrize("case", CASES)
def test_who_is_to_blame(case: str, tmp_path: Path) -> None:
    happen, node, rank, kind = CASES[case]
    job = Recorded(tmp_path)
    happen(job)
    verdict = job.verdict
    assert (verdict.node, verdict.rank, verdict.kind) == (node, rank, kind), verdict
    assert verdict.reason and (verdict.confidence == Confidence.none) == (node is None)


def test_every_kind_has_a_case() -> None:
    tried = {kind for _, _, _, kind in CASES.values()}
    assert set(Kind) - tried == {Kind.unknown, Kind.aborted}


def test_a_rank_that_aborts_alone_is_weak_evidence(tmp_path: Path) -> None:
    verdict = Recorded(tmp_path).end(3, -6).victims(0, 1, 4, 5).verdict
    assert (verdict.node, verdict.kind, verdict.confidence) == ("n2", Kind.aborted, Confidence.weak)


def test_without_evidence_nobody_is_to_blame(tmp_path: Path) -> None:
    job = Recorded(tmp_path).victims(0, 1, 2, 3, 4, 5).srun(*FIRST_N1)
    assert job.verdict.node is None
    assert Recorded(tmp_path).verdict.kind == Kind.unknown


def test_a_shared_error_is_told(tmp_path: Path) -> None:
    job = Recorded(tmp_path)
    damaged_checkpoint(job)
    verdict = job.verdict
    assert verdict.checkpoint.endswith("step_20") and verdict.instead.endswith("step_10")
    assert verdict.error == "DamagedCheckpointError: __1_0.distcp has 7 bytes"


def test_lines_that_are_none_are_passed_over(tmp_path: Path) -> None:
    """A node died while it wrote; another writes what a later version understands."""
    job = Recorded(tmp_path).end(3, -9)
    with (job.folder / "ends_n1.jsonl").open("a") as log:
        log.write('{"event": "end", "rank": "x"}\n[1]\n{"event": "later"}\n{"event": "end", "ra')
    (job.folder / "ends_n9.jsonl").write_text('{"event": "begin", "addresses": 7}\n')
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/stall.json").write_text("{")
    assert (job.verdict.node, job.verdict.kind) == ("n2", Kind.killed)


def test_a_stall_is_that_of_its_attempt(tmp_path: Path) -> None:
    """It is moved to the attempt, whose verdict can be found again."""
    job = Recorded(tmp_path)
    stopped(job)
    assert job.verdict == job.verdict
    assert not (tmp_path / "logs/stall.json").exists() and (job.folder / "stall.json").exists()


NODES = ("n1", "n2", "n3")
ERRORS = st.builds(
    RankError,
    kind=st.sampled_from(["DataError", "MachineError", "ConfigError", "DamagedCheckpointError"]),
    text=st.sampled_from(["x", "uncorrectable ECC error", "Connection closed by peer [10.0.0.2]:7"]),
    is_fault=st.booleans(), is_shared=st.booleans(), is_of_peer=st.booleans(),
    code=st.sampled_from(["", "EIO", "ENOSPC"]), path=st.sampled_from(["", "/run/x", "/tmp/x"]),
    of_ranks=st.sampled_from([(), (0,), (3,), (0, 5)]),
)  # fmt: skip
ENDS = st.builds(
    lambda rank, status, at_s, is_closing, error: RankEnd(
        rank=rank, node=NODES[rank // 2], pid=1000 + rank, status=status, at_s=at_s,
        is_closing=is_closing, error=error,
    ),
    st.integers(0, 5), st.sampled_from([0, 1, 2, 70, 75, -6, -9, -11, -15]), st.floats(0, 60), st.booleans(),
    st.none() | ERRORS,
)  # fmt: skip
RANKS = st.sets(st.integers(0, 5), max_size=2).map(tuple)
EVIDENCE = st.builds(
    Evidence,
    nodes=st.just(NODES), ranks_per_node=st.just(2), run=st.just("/run"),
    lost=st.dictionaries(st.sampled_from(NODES), st.just("down*"), max_size=2),
    ends=st.lists(ENDS, max_size=6),
    stall=st.none() | st.builds(Stall, silent=RANKS, culprits=RANKS),
    kernel=st.lists(
        st.builds(
            KernelMessage, node=st.sampled_from(NODES), kind=st.sampled_from(["out_of_memory", "xid"]),
            text=st.sampled_from("ab"), pid=st.none() | st.integers(1000, 1005),
        ),
        max_size=2,
    ),
    steps=st.lists(
        st.builds(StepFailure, node=st.sampled_from(NODES), what=st.sampled_from(["Killed", "Node failure"])),
        max_size=2,
    ),
    silent_start=st.sampled_from(["", "n1"]),
    addresses=st.just({"n1": ["10.0.0.2"]}), watched=st.just(NODES),
)  # fmt: skip


@settings(max_examples=50)
@given(EVIDENCE)
def test_no_node_is_blamed_before_one_with_stronger_evidence(evidence: Evidence) -> None:
    """Nor one of several against which there is the same at the same moment."""
    verdict = judge(evidence)
    accusations = [each for rule in RULES for each in rule(evidence)]
    strength = {each.node: 0 for each in accusations}
    for each in accusations:
        strength[each.node] = max(strength[each.node], STRENGTH[each.kind][0])
    if verdict.node is None:
        return
    assert strength[verdict.node] == max(strength.values()) == STRENGTH[Kind(verdict.kind)][0]
    rivals = [
        each.at_s
        for each in accusations
        if each.node != verdict.node and STRENGTH[each.kind][0] == strength[verdict.node]
    ]
    own = [each.at_s for each in accusations if each.node == verdict.node and each.kind == verdict.kind]
    for at_s in rivals:
        assert at_s is not None
        assert min(found for found in own if found is not None) < at_s - SAME_MOMENT_S


@settings(max_examples=50)
@given(EVIDENCE)
def test_what_the_launcher_ended_accuses_nobody(evidence: Evidence) -> None:
    """Ends that torchrun brought about change nothing but whose process a kernel speaks of."""
    without = replace(
        evidence, ends=[end for end in evidence.ends if not end.is_closing], kernel=[], steps=[]
    )
    assert judge(without) == judge(replace(evidence, kernel=[], steps=[]))


def test_one_of_4096_ranks_is_found() -> None:
    """Each of the others has an error on which all agreed, and every kernel has lines of its own."""
    agreed = RankError(kind="CheckpointError", text="rank 7: EIO", code="EIO", of_ranks=tuple(range(8)))
    nodes = [f"n{number}" for number in range(512)]
    ends = [
        RankEnd(rank=rank, node=nodes[rank // 8], pid=rank, status=2, at_s=1.0, error=agreed)
        for rank in range(4096)
    ]
    kernel = [
        KernelMessage(node=node, kind="out_of_memory", text=f"{node} {number}", pid=9999)
        for node in nodes
        for number in range(20)
    ]
    verdict = judge(Evidence(nodes=nodes, ranks_per_node=8, ends=ends, kernel=kernel))
    assert (verdict.node, verdict.kind) == ("n0", Kind.disk)
