"""Checkpoints on the nodes' own disks: which one counts, and what lies on a node."""

from pathlib import Path

import pytest
import torch

from k25_train.checkpoint import folders
from k25_train.checkpoint.files.parts import whole
from k25_train.checkpoint.files.writer import write_parts
from k25_train.checkpoint.local.choice import Candidate, choose
from k25_train.checkpoint.local.store import LocalStore, Origin, identity_of, identity_of_run
from k25_train.checkpoint.manifest import Manifest
from k25_train.errors import CheckpointError
from tests.helpers.written_checkpoints import write_checkpoint

LAYOUT = {"pp": 2, "ep": 1, "world_size": 4}
OLD, NEW = Candidate(15, "a", "step_10 x"), Candidate(20, "b", "step_10 x")


def store_of(folder: Path, node: int = 0) -> LocalStore:
    return LocalStore(str(folder), "run-1", node, (2 * node, 2 * node + 1))


def save(store: LocalStore, step: int, name: str = "s", after: str = "") -> Path:
    """What the ranks of a node and then its first do."""
    folder = store.prepare(step)
    files = {}
    for rank in store.ranks:
        file = f"rank_{rank:05d}_0.safetensors"
        tensor = torch.full((5,), float(step))
        files[file] = write_parts(folder / file, [(whole(f"w{rank}", tensor.dtype, (5,)), tensor)])
    manifest = Manifest(step=step, files=files, facts={}, layout=LAYOUT, num_updates=step)
    origin = Origin(save=f"{name}{step}", after=after, layout=LAYOUT, ranks=store.ranks)
    return store.commit(manifest, {folders.CONFIG: "train: {}\n"}, origin)


def steps(store: LocalStore, rank: int | None = None, **layout: int) -> list[int]:
    rank = store.ranks[0] if rank is None else rank
    return [each.step for each in store.candidates(rank, LAYOUT | layout)]


def test_the_newest_that_every_rank_has() -> None:
    chosen = choose([[OLD, NEW], [NEW, OLD], [OLD, NEW]], 10, "step_10 x")
    assert chosen.local == NEW and "10 steps newer" in chosen.why
    # One node was interrupted in the newest.
    assert choose([[OLD, NEW], [OLD]], 10, "step_10 x").local == OLD
    # A disk is lost, or a rank is on another node.
    lost = choose([[OLD, NEW], [], [NEW], []], 10, "step_10 x")
    assert lost.local is None and "not on those of ranks 1, 3" in lost.why


def test_one_that_is_no_newer_than_the_shared_one_is_nothing_to_tell() -> None:
    assert choose([[OLD, NEW]], 20, "step_20 y").local is None
    assert choose([[OLD, NEW]], 20, "step_20 y").why == choose([[], []], 0, "").why == ""


def test_going_back_on_shared_storage_goes_back_on_the_nodes() -> None:
    # step_10 was moved away: step_5 is now the newest shared one.
    gone_back = choose([[NEW], [NEW]], 5, "step_5 w")
    assert gone_back.local is None and "another course of the run" in gone_back.why


def test_the_same_step_of_another_save_is_another_checkpoint() -> None:
    again = Candidate(20, "c", "step_10 x")
    assert choose([[NEW], [again]], 10, "step_10 x").local is None
    assert choose([[NEW, OLD], [again, OLD]], 10, "step_10 x").local == OLD


def test_a_run_that_has_no_shared_checkpoint_yet() -> None:
    first = Candidate(3, "a", "")
    assert choose([[first], [first]], 0, "").local == first


def test_the_newest_two_stay_on_a_node(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    for step in (5, 10, 15):
        save(store, step)
    assert steps(store) == [10, 15]
    assert sorted(path.name for path in store.root.glob("step_*")) == ["step_10", "step_15"]
    # After a crash the run has gone on from step 10, and saves step 15 again; then from step 6.
    save(store, 15, "again")
    assert [each.save for each in store.candidates(0, LAYOUT)] == ["s10", "again15"]
    save(store, 7)
    assert steps(store) == [7]
    store.forget_all()
    assert steps(store) == []


def test_of_use_to_these_ranks_in_this_layout_alone(tmp_path: Path) -> None:
    store = store_of(tmp_path, node=1)
    save(store, 5)
    assert steps(store, 2) == steps(store, 3) == [5]
    assert steps(store, pp=4) == steps(store, world_size=8) == []
    assert steps(store_of(tmp_path, node=0)) == []
    other_ranks = LocalStore(str(tmp_path), "run-1", 1, (1, 3))
    assert other_ranks.candidates(1, LAYOUT) == []
    assert LocalStore(str(tmp_path), "run-2", 1, (2, 3)).candidates(2, LAYOUT) == []


@pytest.mark.parametrize("fault", ["file", "cut", "head", "manifest", "origin", "partial"])
def test_what_is_not_whole_is_passed_over(fault: str, tmp_path: Path) -> None:
    store = store_of(tmp_path)
    save(store, 5)
    folder = save(store, 10)
    path = folder / "rank_00001_0.safetensors"
    match fault:
        case "file":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[:-4])
        case "head":
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        case "manifest" | "origin":
            name = {"manifest": "manifest.json", "origin": "local.json"}[fault]
            (folder / name).write_text("{}")
        case _:
            folder.rename(folder.with_name("step_10.partial"))
    assert steps(store, 1) == [5]
    # The other rank has its file.
    assert steps(store, 0) == ([5, 10] if fault in ("file", "cut", "head") else [5])


def test_a_left_over_goes_before_the_next_save(tmp_path: Path) -> None:
    store = store_of(tmp_path)
    (store.prepare(5) / "rank_00000_0.safetensors").write_bytes(b"half")
    save(store, 10)
    assert [path.name for path in store.root.glob("step_*")] == ["step_10"]


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"checkpoint.local_dir: .*make room or name another"):
        store_of(tmp_path / "file").prepare(5)


def test_identities(tmp_path: Path) -> None:
    assert identity_of(None) == ""
    one = write_checkpoint(tmp_path / "a", 1)
    other = write_checkpoint(tmp_path / "b", 1, losses=[2.0])
    assert identity_of(one) == identity_of(one) != identity_of(other)
    (tmp_path / "run").mkdir()
    assert identity_of_run(tmp_path / "run") == identity_of_run(tmp_path / "run")
    (tmp_path / "next").mkdir()
    assert identity_of_run(tmp_path / "next") != identity_of_run(tmp_path / "run")
    (tmp_path / "next/run_id").write_text("../..")
    with pytest.raises(CheckpointError, match="no id of a run"):
        identity_of_run(tmp_path / "next")
