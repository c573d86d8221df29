"""The run folder as all nodes see it: what each writes is read on the others, and how fast.

Each node leaves a token in the run folder and in every folder that is in it already, such as `checkpoints`,
which may be a mount of its own. Then all write a file at once, as they write a checkpoint, and each reads
that of another, which it cannot have in its own cache.
"""

import os
import secrets
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from k25_train.config.basics import is_url
from k25_train.config.cluster import Device
from k25_train.config.schema import Config
from k25_train.run_folder import location, object_store
from k25_train.run_folder.checkpoints import CHECKPOINTS, bind
from launch.preflight.coordination import Coordinator
from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.rates import outliers

SHARED, SPEED = SHARED_FOLDER_CHECKS = ("shared folder", "speed of the run folder")
FOLDER_TIMEOUT_S = 60.0
"""Time within which every node must have written, and read."""
FILE_BYTES = {Device.cuda: 64 * 2**20, Device.cpu: 8 * 2**20}
"""Size of the file that a node writes and another reads."""
CHUNK_BYTES = 4 * 2**20
"""Size of a piece of it, which is on disk before the next is written."""
LIMIT_S = 5.0
"""Time after which a node writes and reads no more of it."""
LEAST_S = 1e-6
TOLERANCE = 0.5
"""How far below the median a node's rate is an outlier at the least: file systems are shared with others."""


@dataclass(slots=True, kw_only=True)
class FolderRates:
    """What a node found out about the run folder."""

    trouble: str | None = None
    """What is wrong with it; None if nothing is."""
    unmeasured: str | None = None
    """Why there is no rate."""
    write_gb_per_s: float | None = None
    """Bytes written and on disk in a second, in units of 1e9."""
    read_gb_per_s: float | None = None
    """The same of reading what another node wrote."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """What rank 0 has prepared."""

    token: str
    """What is to be found in the folders, and part of their names."""
    folders: list[str] = field(default_factory=list)
    """Where: names below the run folder, "." for itself."""
    fast: str = "."
    """Which of them the ranks write checkpoints to, so that its speed counts."""
    trouble: str | None = None
    """Why there is nothing to meet at."""


def try_shared_folder(config: Config, coordinator: Coordinator) -> dict[int, list[Finding]]:
    """Node leader -> findings, on rank 0; called by every node's leader. One that is silent holds nobody up
    for long."""
    run = Path(config.run.dir).absolute()
    meeting = prepare(run, config.checkpoint.dir) if coordinator.is_first else None
    meeting = coordinator.share("folder", meeting, Meeting, 2 * FOLDER_TIMEOUT_S)
    if meeting is None:
        return {}
    leaders = coordinator.node_leaders
    own = leaders.index(coordinator.rank)
    try:
        rates = FolderRates(trouble=meeting.trouble)
        # 1. Does each see what rank 0 wrote, and can it write?
        if meeting.trouble is None:
            rates.trouble = location.exchange_tokens(run, meeting.folders, meeting.token, coordinator.rank)
        url = config.checkpoint.dir or ""
        if rates.trouble is None and is_url(url):
            trouble = object_store.trouble_with(url, f"{meeting.token}-{coordinator.rank}")
            rates.trouble = trouble and f"checkpoint.dir={url} {trouble}"
        if rates.trouble is None:
            num_bytes = FILE_BYTES[config.cluster.device]
            rates.unmeasured = too_full(run / meeting.fast, num_bytes * len(leaders))
            if rates.unmeasured is None:
                write_file(_path(run, meeting, coordinator.rank), num_bytes, rates)
        coordinator.publish("folder written", rates)
        _, goes_on = coordinator.collect_and_vote(
            "folder written",
            leaders,
            FolderRates,
            lambda one: one.write_gb_per_s is not None,
            FOLDER_TIMEOUT_S,
        )
        # 2. Each reads what the node before it wrote.
        if goes_on:
            read_file(_path(run, meeting, leaders[own - 1]), rates)
        coordinator.publish("folder read", rates)
        if not coordinator.is_first:
            return {}
        found = coordinator.collect("folder read", leaders, FolderRates, FOLDER_TIMEOUT_S)
        limit_s = location.LOOK_S
        for rank, one in found.items():
            if one.trouble is None:
                one.trouble = location.sees_tokens(run, meeting.folders, meeting.token, rank, limit_s)
                # The others have had the time as well.
                limit_s = limit_s if one.trouble is None else 0.0
        return judge_folder(run, found, leaders)
    finally:
        if coordinator.is_first:
            location.remove_tokens(run, meeting.token)


def prepare(run: Path, checkpoint_dir: str | None) -> Meeting:
    """Leave tokens in the run folder and in what is in it, checkpoints' among them; on rank 0."""
    token = f"preflight-{secrets.token_hex(8)}"
    try:
        location.make(run)
        bind(run, checkpoint_dir)
        folders = location.shared_folders(run)
        fast = CHECKPOINTS if (run / CHECKPOINTS).is_symlink() else "."
        for name in folders:
            location.make_tokens(run / name, token, rank=0)
        location.try_to_rename(location.tokens(run / fast, token))
    except Exception as error:  # of the file system, or named by location
        return Meeting(token=token, trouble=f"the first node cannot use it ({error})")
    return Meeting(token=token, folders=folders, fast=fast)


def too_full(run: Path, num_bytes: int) -> str | None:
    """Why nothing is measured: there is no room for it, several times over; None if there is."""
    try:
        usage = os.statvfs(run)
    except OSError as error:
        return f"its free space is unknown ({error.strerror or error})"
    free_bytes = usage.f_bavail * usage.f_frsize
    return None if free_bytes > 4 * num_bytes else f"only {free_bytes / 1e9:.3g} GB are free there"


def write_file(path: Path, num_bytes: int, rates: FolderRates) -> None:
    """Write a file, all of it on disk, and add how fast that was, or what went wrong."""
    piece = os.urandom(min(CHUNK_BYTES, num_bytes))
    try:
        with path.open("wb", buffering=0) as file:
            start_s, written = time.monotonic(), 0
            while written < num_bytes and time.monotonic() - start_s < LIMIT_S:
                written += file.write(piece)
                os.fdatasync(file.fileno())
            rates.write_gb_per_s = written / 1e9 / max(LEAST_S, time.monotonic() - start_s)
            # Whoever reads it here again, reads it from the file system.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        rates.trouble = (
            f"cannot write a file of {num_bytes / 2**20:.0f} MiB there ({error.strerror or error})"
        )


def read_file(path: Path, rates: FolderRates) -> None:
    """Read the file of another node, and add how fast that was, or what went wrong."""
    try:
        with path.open("rb", buffering=0) as file:
            start_s, num_read = time.monotonic(), 0
            while time.monotonic() - start_s < LIMIT_S and (piece := file.read(CHUNK_BYTES)):
                num_read += len(piece)
            rates.read_gb_per_s = num_read / 1e9 / max(LEAST_S, time.monotonic() - start_s)
    except OSError as error:
        rates.trouble = f"cannot read there what another node has written ({error.strerror or error})"


def _path(run: Path, meeting: Meeting, rank: int) -> Path:
    return location.tokens(run / meeting.fast, meeting.token) / f"{rank}.data"


def judge_folder(
    run: Path, found: Mapping[int, FolderRates], leaders: Sequence[int]
) -> dict[int, list[Finding]]:
    """Node leader -> whether its folder is that of the others, and how fast it is."""
    writes = {rank: one.write_gb_per_s for rank, one in found.items() if one.write_gb_per_s}
    reads = {rank: one.read_gb_per_s for rank, one in found.items() if one.read_gb_per_s}
    slow = outliers(writes, TOLERANCE), outliers(reads, TOLERANCE)
    findings = {}
    for rank in leaders:
        one = found.get(rank, FolderRates(trouble="did not answer while the folder was tried"))
        findings[rank] = [_judge_shared(run, one, len(leaders))]
        if one.write_gb_per_s is None or one.read_gb_per_s is None:
            reason = one.unmeasured or "not all nodes can use the folder"
            findings[rank].append(skipped(SPEED, reason))
            continue
        text = f"writes {one.write_gb_per_s:.3g} GB/s, reads {one.read_gb_per_s:.3g} GB/s"
        if rank in slow[0] or rank in slow[1]:
            rule = f"the medians are {statistics.median(writes.values()):.3g} and "
            rule += f"{statistics.median(reads.values()):.3g} GB/s"
            remedy = "check the node's connection to the file system: a checkpoint waits for the slowest node"
            findings[rank].append(warned(SPEED, text, rule, remedy))
        else:
            findings[rank].append(passed(SPEED, text))
    return findings


def _judge_shared(run: Path, one: FolderRates, num_nodes: int) -> Finding:
    if one.trouble is not None:
        rule = "every node has to see what the others write in run.dir and in each folder in it"
        remedy = (
            "mount the file system there, or choose a run.dir on one that all nodes share, without mounts or "
            "links in it that lead elsewhere on some nodes"
        )
        return failed(SHARED, f"{run}: {one.trouble}", rule, remedy)
    if num_nodes == 1:
        return skipped(SHARED, "a single node has nobody to share with")
    return passed(SHARED, f"{run}: what each node writes is read on the others")
