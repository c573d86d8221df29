"""What torchrun's watch of its ranks notes, and what kernels say."""

import itertools
import json
import os
from pathlib import Path

import pytest

from k25_train import farewell
from launch import kernel_log
from launch.attempts import Attempts
from launch.blame.evidence import LEFT_EARLY
from launch.blame.judge import judge
from launch.blame.library_texts import peer_of, says_device_is_broken
from launch.ends import EndsLog, NoLog, RankWatch, lines_in, log_of, own_addresses
from launch.witnesses import collect


@pytest.fixture
def error_files(tmp_path: Path) -> dict[int, str]:
    """Where three ranks write their errors."""
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
    return {rank: str(tmp_path / f"{rank}/error.json") for rank in range(3)}


def test_status_0_is_success_only_of_a_rank_that_was_done(
    tmp_path: Path, error_files: dict[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = RankWatch(EndsLog(log_of(tmp_path, "n1")))
    watch.begin(error_files)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error_files[0])
    farewell.is_done()
    assert watch.note(0, 7, 0, error_files[0], is_closing=False) == 0
    for _ in range(2):
        assert watch.note(1, 8, 0, error_files[1], is_closing=False) == LEFT_EARLY
    assert watch.note(2, 9, 0, error_files[2], is_closing=True) == 0
    noted = [line for _, line in lines_in(tmp_path) if line["event"] == "end"]
    assert [(line["rank"], line["status"], line["is_closing"]) for line in noted] == [
        (0, 0, False), (1, LEFT_EARLY, False), (2, 0, True)
    ]  # fmt: skip


def test_a_full_disk_makes_no_failure_of_a_rank(tmp_path: Path) -> None:
    """Neither the mark nor the line could be written."""
    gone = str(tmp_path / "gone/error.json")
    watch = RankWatch(EndsLog(tmp_path / "gone/ends.jsonl"))
    watch.begin({0: gone})
    assert watch.note(0, 7, 0, gone, is_closing=False) == 0
    assert RankWatch(NoLog()).note(0, 7, -9, gone, is_closing=False) == -9
    watch.end()


def test_addresses_are_those_of_all_interfaces() -> None:
    assert {"127.0.0.1", os.uname().nodename} <= set(own_addresses())


@pytest.mark.parametrize(
    ("text", "kind", "pid"),
    [
        ("Out of memory: Killed process 4711 (python) total-vm:1kB", "out_of_memory", 4711),
        ("Memory cgroup out of memory: Killed process 4711 (python) total-vm:1kB", "out_of_memory", 4711),
        ("NVRM: Xid (PCI:0000:5d:00): 79, pid='<unknown>', GPU has fallen off the bus.", "xid", None),
        ("NVRM: Xid (PCI:0000:5d:00): 94, Contained: SM (0x1). RST: No, D-RST: No", "xid", None),
        ("NVRM: Xid (PCI:0000:5d:00): 45, pid=7, name=python, Ch 00000008", None, None),
        ("NVRM: Xid (PCI:0000:5d:00): 13, Graphics SM Warp Exception", None, None),
        ("mce: [Hardware Error]: CPU 4: Machine Check: 0 Bank 7: be00000000800400", "machine", None),
        ("mce: [Hardware Error]: CPU 4: Machine Check: 0 Bank 9: 8c000051000800c0", None, None),
        ("mce: [Hardware Error]: Machine check events logged", None, None),
        (
            "mce: [Hardware Error]: CPU 1: Machine Check Exception: 5 Bank 4: b200000000070f0f",
            "machine",
            None,
        ),
        ("blk_update_request: I/O error, dev sr0, sector 7 op 0x0:(READ)", None, None),
        ("blk_update_request: I/O error, dev nvme0n1, sector 7 op 0x0:(READ)", "disk", None),
        ("EXT4-fs (sda1): Remounting filesystem read-only", "disk", None),
        ("nvme nvme0: controller is down; will reset: CSTS=0xffffffff", "disk", None),
        ("mlx5_core 0000:5d:00.0 ens1f0np0: Link down", "link", None),
        ("bond0: (slave ens1f0): link status definitely down for interface ens1f0", "link", None),
        ("mlx5_core 0000:5d:00.0 ens1f0np0: Link up", None, None),
        ("EXT4-fs (sda1): mounted filesystem with ordered data mode. Quota mode: none.", None, None),
        ("python[7]: segfault at 38 ip 00007fbb75930d44 error 6 in libpython", None, None),
        ("usb 1-1: new high-speed USB device number 2", None, None),
    ],
)
def test_lines_of_a_kernel_that_matter(text: str, kind: str | None, pid: int | None) -> None:
    found = kernel_log.classify(text)
    assert (found and found.kind, found and found.pid) == (kind, pid)


def test_a_kernel_is_read_from_the_start_of_its_ranks_on(tmp_path: Path) -> None:
    log = tmp_path / "kmsg"
    oom = "Out of memory: Killed process {} (python)"
    log.write_text(
        f"6,1,5000000,-;{oom.format(1)}\n6,2,9000000,-;usb\n SUBSYSTEM=usb\n6,3,9500000,-;{oom.format(2)}\n"
    )
    assert [line.pid for line in kernel_log.lines_since(6.0, log)] == [2]
    with pytest.raises(OSError, match="kmsg"):
        list(kernel_log.lines_since(0.0, tmp_path / "none/kmsg"))


def test_a_kernel_that_cannot_be_read_is_said_to_be_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_boot_s: float) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(kernel_log, "lines_since", refuse)
    RankWatch(EndsLog(tmp_path / "ends_n1.jsonl")).end()
    line = json.loads((tmp_path / "ends_n1.jsonl").read_text())
    assert line == {"event": "kernel", "skipped": "/dev/kmsg: Operation not permitted", "lines": []}


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        (
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1",
            "10.0.0.2",
        ),
        ("pair.cc:589] Read error [192.168.70.92]:25266: Connection reset by peer", "192.168.70.92"),
        ("pair.cc:534] Connection closed by peer [fe80::1%eth0]:25266", "fe80::1"),
        ("NET/IB: Got completion from peer 10.216.210.236<54862> with status=12 opcode=0", "10.216.210.236"),
        ("socketProgress: Connection closed by remote peer node7<41000>", "node7"),
        ("socketProgress: Connection closed by remote peer ::ffff:10.0.0.2<41000>", "10.0.0.2"),
        ("Timed out waiting 1800000ms for recv operation to complete", ""),
    ],
)
def test_libraries_name_the_peer(text: str, peer: str) -> None:
    assert peer_of(text) == peer


def test_libraries_name_a_broken_device() -> None:
    assert says_device_is_broken("CUDA error: uncorrectable NVLink error detected during the execution")
    assert not says_device_is_broken("CUDA error: an illegal memory access was encountered")


END = {"event": "end", "rank": 0, "pid": 7, "status": -9, "at_s": 1.0, "is_closing": False, "error": None}
ERROR = {"kind": "DataError", "text": "no", "code": "EIO"}
STALL = {"silent": [0], "culprits": [], "doing": {}}


@pytest.mark.parametrize("garbage", [None, 99, -1, 1e400, "x", [None], [99], {"a": 1}, [{"a": 1}]], ids=repr)
def test_damaged_evidence_ends_no_supervisor(garbage: object, tmp_path: Path) -> None:
    """Whatever a value is, there is a verdict, and it names a node of the attempt or none."""
    attempts = Attempts(tmp_path)
    attempt = attempts.start(7, ["n1", "n2"], "abc")
    folder = attempts.folder(attempt)
    ends = [{**END, name: garbage} for name in END if name != "event"]
    ends += [{**END, "error": {**ERROR, name: garbage}} for name in (*ERROR, "of_ranks", "is_fault", "path")]
    kernel = {"kind": "disk", "text": "x", "pid": 7}
    kernels: list[object] = [garbage, *([{**kernel, name: garbage}] for name in kernel)]
    lines = [*ends, *({"event": "kernel", "lines": each} for each in kernels)]
    lines.append({"event": "begin", "addresses": garbage})
    (tmp_path / "logs").mkdir()
    for line, stall in itertools.zip_longest(lines, [garbage, *({**STALL, name: garbage} for name in STALL)]):
        log_of(folder, "n1").write_text(json.dumps(line) + "\n")
        (tmp_path / "logs/stall.json").write_text(json.dumps(stall))
        assert judge(collect(attempts, attempt, 1, {}, "")).node in {"n1", "n2", None}
