"""Faults of file systems: a disk that is full, one that turns read-only, folders that nodes do not share."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from functools import partial
from pathlib import Path

from tests.helpers.faults.plans import DONE, NAMED, STOPPED, Plan, draw_moment, draw_start
from tests.helpers.faults.scenes import LAYOUTS, Scene, World
from tests.helpers.faults.small_jobs import SmallJob

SIZE = "48m"
"""Of the file system of a run that will be full."""
_FILL = ".fill"
_CHUNK_BYTES = 4096


def draw_full(rng: random.Random, world: World) -> Plan:
    """The file system of the run folder is full from some moment on, or nearly."""
    layout, started_at = draw_start(rng)
    moment = draw_moment(rng, world, layout, started_at)
    left_bytes = rng.choice([0, 0, 1000, 20_000, 300_000])
    return Plan(
        kind="full disk",
        text=f"{left_bytes:,} bytes are left, {moment}",
        layout=layout,
        started_at=started_at,
        ends=frozenset({DONE, NAMED, STOPPED}),
        prepare=_on_small_disk,
        moment=moment,
        strike=partial(_fill, left_bytes=left_bytes),
        repair=lambda scene: (scene.run / _FILL).unlink(missing_ok=True),
    )


def draw_read_only(rng: random.Random, world: World) -> Plan:
    """The run folder, or the one of its checkpoints, cannot be written from some moment on."""
    layout, started_at = draw_start(rng)
    moment = draw_moment(rng, world, layout, started_at)
    name = rng.choice([".", "checkpoints"])
    return Plan(
        kind="read-only",
        text=f"run/{name}, {moment}",
        layout=layout,
        started_at=started_at,
        ends=frozenset({DONE, NAMED, STOPPED}),
        moment=moment,
        strike=partial(_freeze, name=name),
        repair=lambda scene: unmount_below(scene.folder),
    )


def draw_unshared(rng: random.Random, _: World) -> Plan:
    """Two nodes that each have a folder of the run's name."""
    _, started_at = draw_start(rng)
    return Plan(
        kind="unshared folder",
        text="each of two nodes has its own",
        layout=rng.choice([name for name, (num_ranks, _) in LAYOUTS.items() if num_ranks == 2]),
        started_at=started_at,
        ends=frozenset({NAMED}),
        prepare=_move_to_first_node,
        overrides=["cluster.nodes=2", "cluster.gpus_per_node=1"],
        environment={"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        folders=["node_0", "node_1"],
        is_relative=True,
    )


def _on_small_disk(scene: Scene) -> None:
    source = scene.folder / "source"
    scene.run.mkdir(exist_ok=True)
    scene.run.rename(source)
    scene.run.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", scene.run], check=True)
    shutil.copytree(source, scene.run, dirs_exist_ok=True)


def _fill(scene: Scene, _: SmallJob, *, left_bytes: int) -> None:
    """Fill the disk but for some bytes."""
    fill = scene.run / _FILL
    with fill.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(2**20)):
                pass
        except OSError:
            pass
        try:
            while file.write(bytes(_CHUNK_BYTES)):
                pass
        except OSError:
            pass
    os.truncate(fill, max(0, fill.stat().st_size - left_bytes))


def _freeze(scene: Scene, _: SmallJob, *, name: str) -> None:
    folder = scene.run / name
    # What is open for writing stays so, as on a disk that turns read-only after an error.
    if folder.is_dir():
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def _move_to_first_node(scene: Scene) -> None:
    for name in ("node_0", "node_1"):
        (scene.folder / name).mkdir()
    own = scene.folder / "node_0/run"
    if scene.run.exists():
        scene.run.rename(own)
    else:
        own.mkdir()
    scene.run.symlink_to(own)


def can_mount() -> bool:
    """Whether this process may mount: root outside of most containers."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True)
    return done.returncode == 0


def unmount_below(folder: Path) -> None:
    """Unmount all that a trial has mounted in its folder, the latest first."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed(mounts):
        if mount.startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)
