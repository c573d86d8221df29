"""Faults of files: one of the run folder or of the data set is damaged, or something is gone."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.helpers.faults.plans import DONE, NAMED, STOPPED, Plan, draw_moment, draw_start
from tests.helpers.faults.scenes import KEEP, Scene, World
from tests.helpers.faults.small_jobs import SmallJob

_BACKUP, LOCK = "backup", "lock.json"


def _cut(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(max(1, len(content)))])


def _empty(file: Path, _: random.Random) -> None:
    file.write_bytes(b"")


def _flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _overwrite(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    start = rng.randrange(max(1, len(content)))
    content[start : start + 4096] = rng.randbytes(min(4096, len(content) - start))
    file.write_bytes(content)


def _append(file: Path, rng: random.Random) -> None:
    with file.open("ab") as opened:
        opened.write(rng.choice([b"\0" * 64, b"\xff\xfe garbage", b'{"step": ', rng.randbytes(512)]))


def _remove(file: Path, _: random.Random) -> None:
    file.unlink()


def _make_folder(file: Path, _: random.Random) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "is cut": _cut,
    "is empty": _empty,
    "has a bit flipped": _flip,
    "is overwritten in part": _overwrite,
    "has more at its end": _append,
    "is gone": _remove,
    "is a folder": _make_folder,
}
RUN_FILES = ("metrics.jsonl", "config.yaml", "tensorboard/*", LOCK)
CHECKPOINT_FILES = (
    "*.safetensors",
    "*.safetensors",
    "manifest.json",
    "config.yaml",
    "data_state.json",
    "*",
)
DATA_FILES = ("*.tar", "*.index.jsonl", "dataset.json", "tokenizer.json")


def draw_run_file(rng: random.Random, world: World) -> Plan:
    """A file of the run folder is damaged while no job runs."""
    layout, started_at = draw_start(rng, earliest=1)
    if rng.random() < 0.7:
        step = rng.randint(max(1, started_at - KEEP + 1), started_at)
        pattern = f"checkpoints/step_{step}/{rng.choice(CHECKPOINT_FILES)}"
    else:
        pattern = rng.choice(RUN_FILES)
    return _damaged("run file", rng, layout, started_at, "run", pattern)


def draw_data_file(rng: random.Random, world: World) -> Plan:
    """A file of the data set is damaged between two jobs."""
    layout, started_at = draw_start(rng, earliest=1)
    return _damaged("data file", rng, layout, started_at, "data", rng.choice(DATA_FILES))


def _damaged(kind: str, rng: random.Random, layout: str, started_at: int, folder: str, pattern: str) -> Plan:
    damage, seed = rng.choice(list(DAMAGES)), rng.randrange(2**32)
    is_of_metrics = pattern == "metrics.jsonl"
    return Plan(
        kind=kind,
        text=f"{folder}/{pattern} {damage}",
        layout=layout,
        started_at=started_at,
        ends=frozenset({DONE, NAMED}),
        prepare=partial(damage_one, folder=folder, pattern=pattern, damage=damage, seed=seed),
        repair=partial(restore, folder=folder),
        # Rows of before the damage are what the damage has made of them.
        first_row=started_at + 1 if is_of_metrics else 0,
        may_lose_rows=is_of_metrics,
    )


def damage_one(scene: Scene, *, folder: str, pattern: str, damage: str, seed: int) -> None:
    """Damage a file that matches the pattern, and keep a copy of it."""
    if folder == "data":
        scene.copy_data()
    rng, root = random.Random(seed), scene.folder / folder
    if pattern == LOCK:
        # Of a job that has ended; nobody has a copy of it.
        (root / LOCK).write_text('{"job_id": 7}\n')
        DAMAGES[damage](root / LOCK, rng)
        return
    files = sorted(path for path in root.glob(pattern) if path.is_file())
    if files:
        file = rng.choice(files)
        backup = scene.folder / _BACKUP / file.relative_to(root)
        backup.parent.mkdir(parents=True)
        shutil.copy2(file, backup)
        DAMAGES[damage](file, rng)


def restore(scene: Scene, *, folder: str) -> None:
    """Put the backup back, as an operator would who is told of the file."""
    root, backups = scene.folder / folder, scene.folder / _BACKUP
    # No job runs now.
    lock = scene.run / LOCK
    if lock.is_dir():
        lock.rmdir()
    lock.unlink(missing_ok=True)
    for backup in [path for path in backups.rglob("*") if path.is_file()]:
        file = root / backup.relative_to(backups)
        # A row of metrics that was added meanwhile would be lost otherwise; what was damaged is set aside.
        if file.is_dir():
            shutil.rmtree(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(backup, file)


REMOVALS = (
    "run",
    "run/checkpoints",
    "run/checkpoints/step_*",
    "run/metrics.jsonl",
    "run/tensorboard",
    "run/*.json",
)
DATA_REMOVALS = ("data", "data/*.tar", "data/*.index.jsonl", "data/dataset.json", "data/tokenizer.json")


def draw_removed(rng: random.Random, world: World) -> Plan:
    """A file or folder is moved away while the job runs; what belongs to the data comes back afterwards."""
    layout, started_at = draw_start(rng)
    moment = draw_moment(rng, world, layout, started_at)
    pattern = rng.choice([*REMOVALS, *DATA_REMOVALS])
    loses_rows = pattern in ("run", "run/metrics.jsonl")
    return Plan(
        kind="removed",
        text=f"{pattern}, {moment}",
        layout=layout,
        started_at=started_at,
        ends=frozenset({DONE, NAMED, STOPPED}),
        prepare=lambda scene: _own_data(scene),
        moment=moment,
        strike=partial(_move_away, pattern=pattern, seed=rng.randrange(2**32)),
        repair=_move_data_back,
        may_lose_rows=loses_rows,
    )


def _own_data(scene: Scene) -> None:
    scene.copy_data()


def _move_away(scene: Scene, _: SmallJob, *, pattern: str, seed: int) -> None:
    found = sorted(scene.folder.glob(pattern))
    if found:
        path = random.Random(seed).choice(found)
        away = scene.folder / _BACKUP / path.relative_to(scene.folder)
        away.parent.mkdir(parents=True, exist_ok=True)
        path.rename(away)


def _move_data_back(scene: Scene) -> None:
    backup = scene.folder / _BACKUP / "data"
    if not backup.exists():
        return
    if not scene.data.exists():
        backup.rename(scene.data)
        return
    for path in backup.iterdir():
        path.rename(scene.data / path.name)
