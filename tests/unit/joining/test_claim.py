"""The run folder before anything is built: made, held, and seen by all; errors name what is wrong."""

import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.errors import ConfigError, K25Error
from k25_train.joining import council
from k25_train.joining.claim import FolderClaim, NoClaim, claim_folder, find_unshared
from k25_train.joining.council import Council
from k25_train.joining.environment import read_environment
from k25_train.run_folder import location
from k25_train.run_folder.record import LOCK, LockedError

ALONE = read_environment({})


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there does not come later."""
    monkeypatch.setattr(location, "LOOK_S", 0.2)
    monkeypatch.setattr(location, "RETRY_S", 0.05)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def writing_to(run: object) -> Config:
    """A run there."""
    config = compose(["experiment=smoke"])
    return replace(config, run=replace(config.run, dir=str(run)))


def test_a_folder_is_made_held_and_given_back(tmp_path: Path) -> None:
    run = tmp_path / "a" / "run"
    with claim_folder(writing_to(f"{run}/"), ALONE, dist.HashStore()) as claim:
        assert isinstance(claim, FolderClaim)
        claim.check()
        assert [path.name for path in run.iterdir()] == [LOCK]
        with pytest.raises(LockedError):
            # Taken by the same process again, which is the later one.
            claim_folder(writing_to(run), ALONE, dist.HashStore()).close()
            claim.check()
    assert list(run.iterdir()) == []


def a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "run"


def a_broken_link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "nowhere")
    return folder / "link"


def a_link_to_itself(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop" / "run"


def too_long(folder: Path) -> Path:
    return folder / ("x" * 300)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (a_file, "a file, or a broken link, is in its place: choose another run.dir"),
        (below_a_file, "a file, or a broken link, is in its place"),
        (a_broken_link, "a file, or a broken link, is in its place"),
        (a_link_to_itself, "a link leads back to itself"),
        (too_long, "its name is too long"),
    ],
)
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, make: object, expected: str) -> None:
    assert callable(make)
    run = make(tmp_path)
    with pytest.raises(ConfigError) as caught:
        claim_folder(writing_to(run), ALONE, dist.HashStore())
    assert f"run.dir={run} cannot be used (" in str(caught.value) and expected in str(caught.value)


@pytest.mark.parametrize(
    ("number", "expected"),
    [(13, "this user may not write there"), (28, "the disk is full"), (30, "the file system is read-only")],
)
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, expected: str
) -> None:
    real = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.parent == tmp_path:
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError, match=rf"run\.dir={tmp_path} cannot be used \(.*\): {expected}"):
        claim_folder(writing_to(tmp_path), ALONE, dist.HashStore())
    assert list(tmp_path.iterdir()) == []


class Ranks:
    """Two ranks on two nodes, as threads of this process."""

    def __init__(self, *runs: Path) -> None:
        store = dist.HashStore()
        self.outcomes: list[NoClaim | K25Error | None] = [None] * len(runs)

        def body(rank: int, run: Path) -> None:
            where = replace(ALONE, rank=rank, world_size=len(runs), node=rank)
            try:
                self.outcomes[rank] = claim_folder(writing_to(run), where, store)
            except K25Error as error:
                self.outcomes[rank] = error

        threads = [
            threading.Thread(target=body, args=(rank, run), name=f"node {rank}")
            for rank, run in enumerate(runs)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)

    @property
    def errors(self) -> list[str]:
        """The texts, where there were errors."""
        return [str(each) for each in self.outcomes if isinstance(each, K25Error)]


def test_ranks_share_a_folder_that_one_of_them_holds(tmp_path: Path) -> None:
    first, second = Ranks(tmp_path, tmp_path).outcomes
    assert isinstance(first, FolderClaim) and type(second) is NoClaim
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    first.close()


def test_who_is_second_is_refused_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("damaged")
    ranks = Ranks(tmp_path, tmp_path)
    assert all(isinstance(each, LockedError) for each in ranks.outcomes)


def test_a_node_that_does_not_see_the_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the folder is free again."""
    sees = location.sees_lock

    def sees_lock(run: Path, holder_id: str) -> str | None:
        blind = threading.current_thread().name == "node 1"
        return sees(run / "elsewhere" if blind else run, holder_id)

    monkeypatch.setattr(location, "sees_lock", sees_lock)
    ranks = Ranks(tmp_path, tmp_path)
    assert len(ranks.errors) == 2
    expected = (
        rf"run\.dir={tmp_path} is not one folder that all nodes share:\n  node 1 \(.*\): does not see it"
    )
    with pytest.raises(ConfigError, match=expected):
        raise ConfigError(ranks.errors[0])
    assert list(tmp_path.iterdir()) == []


def said(*troubles: tuple[bool, str | None]) -> list[tuple[dict[str, Any], bool, str | None]]:
    """What ranks, each a node of its own, tell of the folder."""
    return [({"rank": n, "node": n, "host": f"h{n}"}, *trouble) for n, trouble in enumerate(troubles)]


def test_what_a_node_writes_must_be_seen_too(tmp_path: Path) -> None:
    """A node may see the folder below a layer of its own, which takes what it writes."""
    location.make_tokens(tmp_path, "id", rank=0)
    assert location.leave_token(tmp_path, "id", 1) is None
    fine = [(True, None), (True, None), (False, None)]
    assert find_unshared(tmp_path, ["."], "id", said(*fine)) is None
    error = find_unshared(tmp_path, ["."], "id", said(*fine, (True, None)))
    assert "  node 3 (host h3, rank 3): writes there what rank 0 does not see" in str(error)
    assert error is not None and error.of_ranks == (3,)
    refused = location.leave_token(tmp_path / "no", "id", 1)
    error = find_unshared(tmp_path, ["."], "id", said(*fine, (True, refused), (True, refused)))
    assert "  nodes 3 and 4 (hosts h3, h4): cannot write there (No such file or directory)" in str(error)
    location.remove_tokens(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["checkpoints", "logs", "attempts", "anything"])
def test_every_folder_in_it_has_to_be_shared(tmp_path: Path, name: str) -> None:
    """A node may have another file system there, or a link may lead to a disk of its own."""
    run, other = tmp_path / "run", tmp_path / "seen by node 1"
    (run / name).mkdir(parents=True)
    # Node 1 sees the run folder itself, but within it a folder of its own.
    other.mkdir()
    names = location.shared_folders(run)
    assert names == [".", name]
    for each in names:
        location.make_tokens(run / each, "id", rank=0)
    assert location.exchange_tokens(run, names, "id", 1) is None
    (other / name).mkdir()
    location.tokens(run, "id").rename(other / location.tokens(run, "id").name)
    trouble = location.exchange_tokens(other, names, "id", 1)
    assert trouble == f"{name}/: does not see what rank 0 has written there"


def test_tokens_go_from_every_folder(tmp_path: Path) -> None:
    """Those of an earlier start, too."""
    (tmp_path / "checkpoints" / ".startup.dead").mkdir(parents=True)
    ranks = Ranks(tmp_path, tmp_path)
    assert ranks.errors == []
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checkpoints", LOCK]
    first = ranks.outcomes[0]
    assert isinstance(first, FolderClaim)
    first.close()


def test_the_first_rank_ends_after_all_have_read_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the store, which may be in its process, would end before."""
    monkeypatch.setattr(council, "READ_S", 60.0)
    store, ended = dist.HashStore(), threading.Event()

    def decide(rank: int) -> None:
        with pytest.raises(ConfigError, match="no"):
            Council(store, rank, 2).decide("topic", None, ConfigError("no") if rank == 0 else None)

    def first_rank() -> None:
        decide(0)
        ended.set()

    first = threading.Thread(target=first_rank, daemon=True)
    first.start()
    assert not ended.wait(0.3)
    decide(1)
    assert ended.wait(60)
    first.join()
