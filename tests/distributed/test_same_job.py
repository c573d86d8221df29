"""Over real processes: ranks that would run something else than others are named, before any collective."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from k25_train.errors import K25Error
from k25_train.joining.facts import package_folder
from tests.helpers.interrupted_runs import short_run
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.tiny_shards import tiny_samples, write_shard_set

pytestmark = pytest.mark.distributed

SCENES: dict[str, tuple[list[str], str]] = {
    "alike": ([], ""),
    "learning rate": (["optim.lr=6e-3"], "optim.lr: 0.005 on node 0 (host "),
    "steps": (["train.steps=16"], "train.steps: 20 on node 0 (host "),
    "seed": (["train.seed=7"], "train.seed: "),
    "layout": (["parallelism.ep=2"], "parallelism.ep: 1 on node 0 (host "),
    "interval": (["checkpoint.interval=5"], "checkpoint.interval: 10 on node 0"),
    "run folder": (["run.dir=elsewhere"], "/elsewhere on node 1 (host "),
    "node's variable": ([], "NCCL_IB_DISABLE: not set on node 0 (host "),
    "two libraries": ([], "OMP_DYNAMIC: not set on node 0 (host "),
    "secret": ([], "(secret, not shown; digest "),
    "package": ([], "transformer-engine: absent on node 0 (host "),
    "code": ([], "k25_train/train.py: "),
    "code added": ([], "k25_train/added.py: not set on node 0 (host "),
    "other data": (["data.dir={other}"], "data.train.text: "),
    "copy of the data": (["data.dir={copy}"], ""),
    "no data": (["data.dir={none}"], "some nodes fail where others do not\n  node 1 (host "),
}
"""Scene -> overrides of rank 1, and what all ranks raise."""


def raised_in_scenes(
    context: RankContext, arguments: Sequence[str], places: dict[str, str]
) -> dict[str, str]:
    """Scene -> error of this rank, a node of its own."""
    from k25_train.compose.resolve import compose
    from k25_train.data.start import start_source
    from k25_train.joining.environment import read_environment
    from k25_train.joining.join import join
    from k25_train.joining.same_job import SameJob
    from k25_train.training.run import open_data

    nodes = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(context.rank)}
    where = read_environment({**context.environment(), **nodes})
    store = join(where, 60.0)
    errors = {}
    for scene, (more, _) in SCENES.items():
        undo = disturb(scene, places) if context.rank == 1 else lambda: None
        own = [each.format(**places) for each in more] if context.rank == 1 else []
        job = SameJob(dist.PrefixStore(scene, store), where)
        try:
            config = compose([*arguments, *own])
            job.check_start(config)
            source = start_source(config)
            with source:
                job.load_data(
                    lambda config=config, source=source: open_data(config, source),
                    lambda _, source=source: source.facts(),
                )
            errors[scene] = ""
        except K25Error as error:
            errors[scene] = f"{type(error).__name__}: {error}"
            assert error.is_shared
            # What finds the node to blame.
            assert (error.of_ranks, error.code) == (((1,), "ENOENT") if scene == "no data" else ((), ""))
        undo()
    return errors


def disturb(scene: str, places: dict[str, str]) -> Callable[[], object]:
    """Make this node another one than it was; what undoes it."""
    from k25_train.joining import facts

    facts.code_facts.cache_clear()
    facts.package_facts.cache_clear()
    variables = {
        "node's variable": ("NCCL_IB_DISABLE", "1"),
        "two libraries": ("OMP_DYNAMIC", "true"),
        "secret": ("TORCH_API_KEY", "hunter2"),
    }
    if scene in variables:
        name, value = variables[scene]
        os.environ[name] = value
        return lambda: os.environ.pop(name)
    if scene == "package":
        version = facts.version
        facts.version = lambda name: "2.20.0" if name == "transformer-engine" else version(name)
        return lambda: setattr(facts, "version", version)
    if scene in ("code", "code added"):
        folder = facts.package_folder
        facts.package_folder = lambda name: Path(places[scene]) if name == "k25_train" else folder(name)
        return lambda: (setattr(facts, "package_folder", folder), facts.code_facts.cache_clear())
    return lambda: None


@pytest.fixture
def places(data: Path, tmp_path: Path) -> dict[str, str]:
    """Copies of the code and of the data, changed."""
    own = package_folder("k25_train")
    for name in ("code", "code added"):
        shutil.copytree(own, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "code" / "train.py").open("a") as file:
        file.write("# changed\n")
    (tmp_path / "code added" / "added.py").touch()
    shutil.copytree(data, tmp_path / "copy")
    found: dict[str, Any] = {name: tmp_path / name for name in ("code", "code added", "copy", "none")}
    few = {"train": tiny_samples(1, seed=0), "heldout": tiny_samples(1, seed=1000)}
    found["other"] = write_shard_set(tmp_path / "other", few)
    return {name: str(path) for name, path in found.items()}


def test_each_difference_is_named_on_all_ranks(data: Path, tmp_path: Path, places: dict[str, str]) -> None:
    arguments = overrides(
        data, tmp_path / "run", "cluster.nodes=2", "cluster.gpus_per_node=1", "parallelism=serial"
    )
    first, second = run_ranks(raised_in_scenes, 2, arguments, places)
    assert first == second
    assert set(first) == set(SCENES)
    for scene, (_, expected) in SCENES.items():
        if not expected:
            assert first[scene] == "", scene
            continue
        assert expected in first[scene], f"{scene}: {first[scene]}"
        assert "rank 1)" in first[scene], scene
        # Nothing else differs.
        assert first[scene].count("on node 1") <= 2 or scene in ("other data", "code"), first[scene]
    assert "hunter2" not in str(first)
    assert first["no data"].startswith("DataError: ")


def built(context: RankContext, arguments: Sequence[str]) -> str:
    """The error of a rank that builds a run; rank 1 has another layout and length."""
    try:
        start_run(context, [*arguments, *(["train.steps=9", "train.seed=5"] if context.rank else [])])
    except K25Error as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_run_is_not_built_of_ranks_that_differ(data: Path, tmp_path: Path) -> None:
    errors = run_ranks(built, 2, short_run(data, tmp_path / "run", *layout(ep=2, dp=2)))
    assert errors[0] == errors[1] and "train.seed: " in errors[0] and "train.steps: " in errors[0]
    assert "rank 1 of node 0 (host " in errors[0]
    assert not (tmp_path / "run").exists()
