"""Whatever the layout of the trainer, engines get the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.ranks import run_ranks
from tests.helpers.runs import fit, layout, overrides
from tests.helpers.weight_pushes import (
    INT4,
    LAYOUTS,
    REINFORCED,
    SHORT,
    expected,
    push_checkpoint,
    push_from_gpus,
)

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def checkpoint(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a short run."""
    folder = tmp_path_factory.mktemp("pushed")
    run_ranks(fit, 1, overrides(data, folder / "run", *SHORT, *layout()), timeout_s=240.0)
    return folder / "run/checkpoints/step_2"


@pytest.mark.parametrize("transport", [pytest.param("in_memory", marks=pytest.mark.slow), "shared_memory"])
@pytest.mark.parametrize(
    "name", [name if name == "pp vpp ep" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_engines_get_the_bits_of_the_checkpoint(
    data: Path, tmp_path: Path, checkpoint: Path, name: str, transport: str
) -> None:
    sizes, *more = LAYOUTS[name]
    arguments = overrides(data, tmp_path / "run", *SHORT, *REINFORCED, *sizes, *more)
    world = int(sizes[-1].partition("=")[2])
    by_rank = run_ranks(push_checkpoint, world, arguments, checkpoint, transport, timeout_s=240.0)
    first, second, events = by_rank[0]
    assert first == second == expected(checkpoint, arguments)
    assert [text.partition(":")[0] for text in events] == [
        "second is fenced off", "second serves version 1 again; it was fenced off",
    ]  # fmt: skip
    assert all(not others[0] for others in by_rank[1:])


@pytest.mark.parametrize("kind", [pytest.param("nccl", marks=pytest.mark.slow), "checkpoint_engine"])
def test_ways_of_gpus_bring_the_same_bits_to_paused_engines(
    data: Path, tmp_path: Path, checkpoint: Path, kind: str
) -> None:
    sizes = layout(pp=2, ep=1)
    arguments = overrides(data, tmp_path / "run", *SHORT, *REINFORCED, *sizes, "rollout.weights=int4", INT4)
    by_rank = run_ranks(push_from_gpus, 2, arguments, checkpoint, kind, timeout_s=240.0)
    found, num_bytes, _ = by_rank[0]
    assert found == expected(checkpoint, arguments) and num_bytes == by_rank[1][1] > 0
    if kind == "checkpoint_engine":
        calls = ["gather_metas", "update", "asked", "unregister"]
        for _, _, of_rank in by_rank:
            assert of_rank == ["register version_1", *calls, "register version_2", *calls]
