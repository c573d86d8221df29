"""Groups of both versions, on folders that look like the kernel's."""

from dataclasses import replace
from pathlib import Path

from k25_train.environments.sandboxes import cgroups, owners


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
    assert found.limits == ("memory", "pids", "cpu")
    assert (found.parent / "cgroup.subtree_control").read_text() == "+cpu"
    group = cgroups.make_group([found], "label", 1 << 20, 7, 0.5)
    (folder,) = group.folders
    assert (folder / "memory.max").read_text() == str(1 << 20)
    assert (folder / "memory.swap.max").read_text() == "0"
    assert (folder / "pids.max").read_text() == "7"
    assert (folder / "cpu.max").read_text() == "50000 100000"
    assert group.entrances == [str(folder / "cgroup.procs")]
    (folder / "memory.events").write_text("oom 1\noom_kill 0\n")
    assert group.memory_kills() == 0
    (folder / "memory.events").write_text("oom 1\noom_kill 2\n")
    assert group.memory_kills() == 2


def test_version_1_has_a_group_in_each_hierarchy(tmp_path: Path) -> None:
    for name in ("memory", "pids", "cpu"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cgroup.procs").write_text("")
    found = cgroups.hierarchies(tmp_path)
    assert [hierarchy.limits for hierarchy in found] == [("memory",), ("pids",), ("cpu",)]
    memory, pids, cpu = cgroups.make_group(found, "label", 1 << 20, 7, 1.5).folders
    assert (memory / "memory.limit_in_bytes").read_text() == str(1 << 20)
    assert (pids / "pids.max").read_text() == "7"
    assert (cpu / "cpu.cfs_quota_us").read_text() == "150000"
    assert not (memory / "pids.max").exists()
    assert not (pids / "cpu.cfs_quota_us").exists()


def test_nothing_is_found_where_nothing_is_writable(tmp_path: Path) -> None:
    assert cgroups.hierarchies(tmp_path / "nothing") == []


def test_groups_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path: Path) -> None:
    where = [cgroups.Hierarchy(tmp_path, ("pids",), 1)]
    here = owners.this_process("run")
    labels = {
        "mine": here.label(60),
        "mine, expired": here.label(-1),
        "dead": replace(here, pid=999999999).label(60),
        # The number is taken again, by a process that began at another time.
        "again": replace(here, started="1").label(60),
        # Of another machine or container nobody here knows who lives.
        "elsewhere": replace(here, pid=999999999, machine="00000000").label(60),
        "elsewhere, expired": replace(here, machine="00000000").label(-1),
        "nobody's": "1.1-x",
    }
    folders = {name: tmp_path / f"{cgroups.PREFIX}-{label}" for name, label in labels.items()}
    for folder in folders.values():
        folder.mkdir()
    gone = cgroups.remove_orphans(where)
    assert gone == {labels[name] for name in ("mine, expired", "dead", "again", "elsewhere, expired")}
    left = {name for name, folder in folders.items() if folder.exists()}
    assert left == {"mine", "elsewhere", "nobody's"}
