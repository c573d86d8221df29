"""Disturbances of files: a full disk, a folder that cannot be written, damaged checkpoints and records."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.helpers.slurm_faults.evidence import FAILED, FINISHED, NO_ROOM, STOPPED
from tests.helpers.slurm_faults.judge import Expected
from tests.helpers.slurm_faults.plans import Plan, draw_spares, draw_step
from tests.helpers.slurm_faults.scene import Scene

DISK_SIZE = "96m"
FILL = ".fill"
ANY_END = frozenset({FINISHED, FAILED, STOPPED, NO_ROOM})
KILLED = frozenset({FAILED})


def disk_full(rng: random.Random) -> Plan:
    """The disk of the run folder is full but for some bytes, from a step on, for a while."""
    left_bytes, away_s = rng.choice([0, 0, 20_000, 1_000_000]), round(rng.uniform(5, 30))
    return Plan(
        text=f"{left_bytes:,} bytes are left for {away_s} s",
        strike=partial(_fill, left_bytes=left_bytes, away_s=away_s),
        expected=Expected(outcomes=ANY_END, told=("No space left|disk.*full|full disk",), max_attempts=8),
        step=draw_step(rng),
        overrides=draw_spares(rng),
        small_disk=True,
    )


def _fill(scene: Scene, *, left_bytes: int, away_s: float) -> None:
    scene.note(None)
    fill = scene.run.folder / FILL
    with fill.open("wb", buffering=0) as file:
        for size in (2**20, 4096):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    os.truncate(fill, max(0, fill.stat().st_size - left_bytes))
    scene.pause(away_s)
    fill.unlink()


def read_only(rng: random.Random) -> Plan:
    """The run folder, or its checkpoints, cannot be written for a while; open files stay writable."""
    name, away_s = rng.choice([".", "checkpoints"]), round(rng.uniform(3, 20))
    return Plan(
        text=f"run/{name} is read-only for {away_s} s",
        strike=partial(_freeze, name=name, away_s=away_s),
        expected=Expected(outcomes=ANY_END, max_attempts=8),
        step=draw_step(rng, after_checkpoint=True),
        overrides=draw_spares(rng),
        small_disk=True,
    )


def _freeze(scene: Scene, *, name: str, away_s: float) -> None:
    folder = scene.run.folder / name
    scene.note(None)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    scene.pause(away_s)
    subprocess.run(["umount", "--lazy", folder], check=True)


def mount_small_disk(folder: Path) -> None:
    """Give a folder a small file system, seen by this process and those it starts from here on."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "tmpfs", str(folder)]
    subprocess.run(command, check=True)


def unmount_below(folder: Path) -> None:
    """Unmount all that is mounted there, the latest first."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in reversed(mounts):
        if mount.startswith(f"{folder}/"):
            subprocess.run(["umount", "--lazy", mount], check=False, capture_output=True)


def checkpoint_truncated(rng: random.Random) -> Plan:
    """A shard of the newest checkpoint loses its end, and a rank is killed."""
    return _of_checkpoint(rng, "a shard truncated", _truncate)


def checkpoint_flipped(rng: random.Random) -> Plan:
    """One bit of the newest checkpoint changes, and a rank is killed."""
    return _of_checkpoint(rng, "one bit changed", partial(_flip, place=rng.random()))


def checkpoint_without_manifest(rng: random.Random) -> Plan:
    """The newest checkpoint loses its manifest, or a shard, and a rank is killed."""
    name = rng.choice(["manifest.json", "rank_00000_0.safetensors", "config.yaml"])
    return _of_checkpoint(rng, f"{name} removed", lambda folder: (folder / name).unlink())


def _of_checkpoint(rng: random.Random, text: str, damage: Callable[[Path], None]) -> Plan:
    return Plan(
        text=f"the newest checkpoint: {text}",
        strike=partial(_damage_and_kill, damage=lambda scene: damage(newest_checkpoint(scene))),
        expected=Expected(outcomes=KILLED, told=(r"step_\d+",), max_steps_lost=12, max_attempts=3),
        step=rng.randint(13, 16),
        overrides=draw_spares(rng),
    )


def newest_checkpoint(scene: Scene) -> Path:
    """The run's newest whole checkpoint."""
    found = [path for path in (scene.run.folder / "checkpoints").iterdir() if path.name[5:].isdecimal()]
    return max(found, key=lambda path: int(path.name[5:]))


def _truncate(folder: Path) -> None:
    shard = folder / "rank_00000_0.safetensors"
    os.truncate(shard, shard.stat().st_size // 2)


def _flip(folder: Path, *, place: float) -> None:
    shard = folder / "rank_00001_0.safetensors"
    with shard.open("r+b") as file:
        offset = int(place * shard.stat().st_size)
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def _damage_and_kill(scene: Scene, *, damage: Callable[[Scene], None]) -> None:
    scene.wait_for_ranks()
    node = scene.node_of(1)
    pid = scene.ranks()[node]
    scene.note(node)
    scene.kill(pid, signal.SIGSTOP)
    damage(scene)
    scene.kill(pid, signal.SIGKILL)


def record_removed(rng: random.Random) -> Plan:
    """What says how the attempts went loses a file, and a rank is killed."""
    name = rng.choice(["attempts/latest", "attempts/1/srun.log", "attempts/1/rank_0.log", "loss.png"])
    return _of_record(rng, f"{name} removed", lambda scene: (scene.run.folder / name).unlink(missing_ok=True))


def metrics_garbage(rng: random.Random) -> Plan:
    """The metrics get bytes that are no row, or lose one, and a rank is killed."""
    how = rng.choice(["appended", "cut"])
    if how == "appended":
        return _of_record(rng, "garbage appended to metrics.jsonl", _append_garbage)
    return _of_record(rng, "metrics.jsonl cut in its last row", _cut_metrics)


def _of_record(rng: random.Random, text: str, damage: Callable[[Scene], None]) -> Plan:
    return Plan(
        text=f"{text}, SIGKILL of rank 1",
        strike=partial(_damage_and_kill, damage=damage),
        expected=Expected(outcomes=KILLED),
        step=draw_step(rng, after_checkpoint=True),
        overrides=draw_spares(rng),
    )


def _append_garbage(scene: Scene) -> None:
    with (scene.run.folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\x00\xff not a row\n[1, 2]\n" + json.dumps({"step": "many"}).encode() + b"\n")


def _cut_metrics(scene: Scene) -> None:
    path = scene.run.folder / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 20)
