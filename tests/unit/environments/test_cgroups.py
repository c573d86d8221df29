"""Groups of both versions, on folders that look like the kernel's."""

import os
from pathlib import Path

from k25_train.environments import cgroups


def version_2(root: Path, own: str) -> Path:
    """A mount of version 2 in which this process's group is `own`; returns the file that says so."""
    root.mkdir()
    (root / "cgroup.controllers").write_text("cpu memory pids\n")
    folder = root / own.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    for place in (folder, folder.parent):
        (place / "cgroup.subtree_control").write_text("")
    own_groups = root.parent / "own"
    own_groups.write_text(f"0::{own}\n")
    return own_groups


def test_version_2_has_one_group_with_both_limits(tmp_path: Path) -> None:
    own_groups = version_2(tmp_path / "cgroup", "/job/step")
    (found,) = cgroups.hierarchies(tmp_path / "cgroup", own_groups)
    assert (found.parent, found.version) == (tmp_path / "cgroup/job/step", 2)
    assert (found.parent / "cgroup.subtree_control").read_text() == "+memory +pids"
    group = cgroups.make_group([found], 1 << 20, 7)
    (folder,) = group.folders
    assert (folder / "memory.max").read_text() == str(1 << 20)
    assert (folder / "memory.swap.max").read_text() == "0"
    assert (folder / "pids.max").read_text() == "7"
    assert group.entrances == [str(folder / "cgroup.procs")]
    (folder / "memory.events").write_text("oom 1\noom_kill 0\n")
    assert not group.was_out_of_memory()
    (folder / "memory.events").write_text("oom 1\noom_kill 2\n")
    assert group.was_out_of_memory()


def test_version_1_has_a_group_in_each_hierarchy(tmp_path: Path) -> None:
    for name in ("memory", "pids", "cpu"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").write_text("")
    found = cgroups.hierarchies(tmp_path)
    assert [hierarchy.limits for hierarchy in found] == [("memory",), ("pids",)]
    memory, pids = cgroups.make_group(found, 1 << 20, 7).folders
    assert (memory / "memory.limit_in_bytes").read_text() == str(1 << 20)
    assert (pids / "pids.max").read_text() == "7"
    assert not (memory / "pids.max").exists()


def test_nothing_is_found_where_nothing_is_writable(tmp_path: Path) -> None:
    assert cgroups.hierarchies(tmp_path / "nothing") == []


def test_groups_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path: Path) -> None:
    where = [cgroups.Hierarchy(tmp_path, ("pids",), 1)]
    alive = cgroups.make_group([], 1, 1)
    assert alive.folders == ()
    mine = tmp_path / f"{cgroups.PREFIX}-{cgroups._owner()}-0"
    dead = tmp_path / f"{cgroups.PREFIX}-999999999.5-0"
    # The number is taken again, by a process that began at another time.
    again = tmp_path / f"{cgroups.PREFIX}-{os.getpid()}.1-0"
    other = tmp_path / "other-1.1"
    for folder in (mine, dead, again, other):
        folder.mkdir()
    assert cgroups.remove_orphans(where) == 2
    assert [folder.exists() for folder in (mine, dead, again, other)] == [True, False, False, True]
