"""How fast a checkpoint is written and read, and what an asynchronous save costs training.

    python -m tests.bench.checkpoint_speed [FOLDER] [GB]

One rank's state (bfloat16 weights, float32 masters and moments) in FOLDER, in alternating rounds: ours
(copied, hashed, looked at for NaN, verified when read), torch.distributed.checkpoint and torch.save of the
same bytes, all fsynced, and read from a cold cache as far as the system drops it. Then a loop of training
steps, with saves that are waited for and saves behind it: what it loses of its wall time. Prints the share
that an asynchronous save loses of a synchronous one; 1 if a bar is missed.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.table import Table
from torch import Tensor

from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.checkpoint.saving import Saving
from k25_train.checkpoint.snapshot import Snapshot, build_snapshot
from k25_train.units import GB
from tests.helpers.small_saves import contents, one_rank, pieces_of

NUM_ROUNDS = 5
NUM_WRITERS = 2
MOST_STALL = 0.10
"""Bar: of the time that a save takes training that is waited for, what one behind it does."""
MOST_MEMORY = 1.1
"""Bar: host memory of a save, of what the rank holds."""
LEAST_SPEED = 0.7
"""Bar: of the speed of torch.distributed.checkpoint, which neither hashes nor looks at what it writes."""

State = dict[str, Tensor]


def state_of(num_bytes: float) -> State:
    """Tensors of about so many bytes, 2 of weights and 12 of optimizer state per parameter."""
    rows = max(1, int(num_bytes / 14 / 8 / 4096))
    state: State = {}
    for layer in range(8):
        name = f"decoder.layers.{layer}.weight"
        state[name] = torch.randn(rows, 4096).bfloat16()
        for key in ("param", "exp_avg", "exp_avg_sq"):
            state[f"optimizer.state.{key}.{name}"] = torch.randn(rows, 4096)
    return state


def save_ours(root: Path, state: State, snapshot: Snapshot) -> None:
    """A save that is waited for."""
    saving = Saving(root, contents(1), snapshot, lambda: pieces_of(state), NUM_WRITERS)
    finish(saving)


def finish(saving: Saving) -> None:
    """Wait for a save."""
    while True:
        saving.wait()
        if saving.advance():
            return


def save_plain(root: Path, state: State) -> None:
    """torch.save, then fsync."""
    with (root / "state.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def load_ours(root: Path, state: State) -> None:
    """Every tensor into memory that is there."""
    stored = StoredCheckpoint.open(root / "step_1")
    for name, tensor in state.items():
        tensor.copy_(stored.read(name).view(tensor.shape))


def drop_cache(root: Path) -> None:
    """Ask the system to forget what it has read of files."""
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def timed(action: Callable[[], object]) -> float:
    """Seconds of a call."""
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


def speeds(folder: Path, state: State) -> dict[str, tuple[float, float]]:
    """Way -> median seconds of a save and of a load, in alternating rounds."""
    snapshot = build_snapshot(torch.device("cpu"))
    ways: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
        "ours": (lambda root: save_ours(root, state, snapshot), lambda root: load_ours(root, state)),
        "torch.distributed.checkpoint": (
            lambda root: dcp.save(dict(state), checkpoint_id=root / "dcp"),
            lambda root: dcp.load(dict(state), checkpoint_id=root / "dcp"),
        ),
        "torch.save": (
            lambda root: save_plain(root, state),
            lambda root: [state[n].copy_(t) for n, t in torch.load(root / "state.pt").items()],
        ),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(NUM_ROUNDS + 1):
        for name, (save, load) in ways.items():
            root = folder / "round"
            root.mkdir()
            saved_s = timed(lambda: save(root))  # noqa: B023
            drop_cache(root)
            seconds[name].append((saved_s, timed(lambda: load(root))))  # noqa: B023
            shutil.rmtree(root)
    # The first round takes memory, and starts threads.
    return {
        name: (statistics.median(s for s, _ in found[1:]), statistics.median(s for _, s in found[1:]))
        for name, found in seconds.items()
    }


def lost_s(folder: Path, state: State, snapshot: Snapshot, *, step_s: float, waits: bool) -> float:
    """Wall time that a loop of steps loses to one save, in seconds."""
    root = folder / "loop"
    root.mkdir()
    started_s = time.perf_counter()
    saving = Saving(root, contents(1), snapshot, lambda: pieces_of(state), NUM_WRITERS)
    num_steps, is_complete = 0, False
    if waits:
        finish(saving)
    while not is_complete:
        # The device computes, and the host waits for it.
        time.sleep(step_s)
        num_steps += 1
        snapshot.wait_to_update()
        is_complete = waits or (not saving.is_busy and saving.advance() is not None)
    total_s = time.perf_counter() - started_s
    shutil.rmtree(root)
    return total_s - num_steps * step_s


def main() -> int:
    """Print the figures."""
    place = sys.argv[1] if len(sys.argv) > 1 else None
    num_gb = float(sys.argv[2]) if len(sys.argv) > 2 else 0.5
    with one_rank(), tempfile.TemporaryDirectory(dir=place) as text:
        folder, state = Path(text), state_of(num_gb * GB)
        num_bytes = sum(tensor.nbytes for tensor in state.values())
        found = speeds(folder, state)
        snapshot = build_snapshot(torch.device("cpu"))
        stalls: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(NUM_ROUNDS + 1):
            for waits in stalls:
                stalls[waits].append(lost_s(folder, state, snapshot, step_s=0.5, waits=waits))
        waited, behind = (statistics.median(stalls[waits][1:]) for waits in (True, False))
        memory = snapshot.num_bytes / num_bytes
    return report(found, num_bytes, waited=waited, behind=behind, memory=memory)


def report(
    found: dict[str, tuple[float, float]], num_bytes: int, *, waited: float, behind: float, memory: float
) -> int:
    """Print the table and each figure with its bar; 1 if one is missed."""
    table = Table("", "save GB/s", "load GB/s")
    for name, (save_s, load_s) in found.items():
        table.add_row(name, f"{num_bytes / GB / save_s:.2f}", f"{num_bytes / GB / load_s:.2f}")
    console = Console()
    console.print(table)
    ours, theirs = found["ours"], found["torch.distributed.checkpoint"]
    save, load = theirs[0] / ours[0], theirs[1] / ours[1]
    share = behind / waited
    print(f"save: {save:.2f} x torch.distributed.checkpoint (bar {LEAST_SPEED}), load: {load:.2f} x")
    print(f"memory of a save: {memory:.3f} x what the rank holds (bar {MOST_MEMORY})")
    print(f"lost to a save: {waited:.2f} s waited for, {behind:.3f} s behind training")
    print(f"stall of an asynchronous save: {share:.1%} of a synchronous one (bar {MOST_STALL:.0%})")
    return int(save < LEAST_SPEED or memory > MOST_MEMORY or share >= MOST_STALL)


if __name__ == "__main__":
    sys.exit(main())
