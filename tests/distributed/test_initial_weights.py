"""A new run starts from an import, and from parts of other checkpoints, the same in every layout."""

import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from k25_train.checkpoint.files.parts import whole
from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.checkpoint.files.writer import write_parts
from k25_train.checkpoint.integrity import entry_of
from k25_train.checkpoint.manifest import Kind, Manifest, read_manifest
from k25_train.compose.resolve import compose
from k25_train.convert import __main__ as convert
from tests.helpers.hf_folders import k25_config, ours_of, random_state, write_folder
from tests.helpers.interrupted_runs import short_run
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit, layout, overrides, start_run

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
SCHEDULE = ["optim.warmup=0", "optim.decay=0"]


def start(context: RankContext, arguments: Sequence[str]) -> dict[str, Any]:
    """Start a run from weights: what every tensor that this rank holds is, and the first losses."""
    from k25_train.checkpoint.initial import start_from_weights
    from k25_train.checkpoint.pieces import MASTER, OPTIMIZER_STATE, pieces
    from k25_train.checkpoint.whole import held_tensors
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    started = start_from_weights(run.config, run.modules, run.optimizer)
    held = [
        (each.name, each.start, each.tensor.flatten().clone())
        for m in run.modules
        for each in held_tensors(m)
    ]
    prefix = f"{OPTIMIZER_STATE}.{MASTER}."
    masters = [
        (piece.part.name.removeprefix(prefix), piece.part.start, piece.tensor.flatten().clone())
        for piece in pieces(run.modules, run.optimizer)
        if piece.part.name.startswith(prefix)
    ]
    with run.data:
        losses = [train_step(run, step).loss for step in (1, 2)]
    return {
        "held": held,
        "masters": masters,
        "notes": started.notes,
        "facts": started.facts,
        "losses": losses,
    }


def fit_and_listen(context: RankContext, arguments: Sequence[str]) -> str:
    """Train; returns what is printed."""
    printed = StringIO()
    with redirect_stdout(printed):
        fit(context, arguments)
    return printed.getvalue()


def assert_equal(found: Sequence[tuple[str, int, Tensor]], expected: dict[str, Tensor]) -> None:
    """Ranges of flat tensors are those of the expected ones."""
    for name, first, values in found:
        part = expected[name].flatten()[first : first + values.numel()]
        assert torch.equal(values, part.to(values.dtype)), name


@pytest.fixture(scope="module")
def imported(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """An import in float32 of random weights of the shrunk model, and these."""
    folder = tmp_path_factory.mktemp("imported")
    model = compose(overrides(data, folder)).model
    state = random_state(model, torch.float32)
    # Far fewer are equal to their neighbours in bfloat16.
    state = {name: each * 0.3 if each.ndim > 1 else each for name, each in state.items()}
    source = write_folder(folder / "hf", state, k25_config(model))
    assert (
        convert.main(["import", str(source), str(folder / "out"), "--dtype", "float32", "--workers", "1"])
        == 0
    )
    return folder / "out", ours_of(state)


def check_start(
    more: Sequence[str], num_ranks: int, imported: tuple[Path, dict[str, Tensor]], data: Path, folder: Path
) -> list[float]:
    """Start a run from the import and compare what its ranks hold; returns its first losses."""
    source, weights = imported
    arguments = overrides(data, folder, *more, f"checkpoint.init_from={source}")
    by_rank = run_ranks(start, num_ranks, arguments, timeout_s=240.0)
    for each in by_rank:
        assert_equal(each["held"], weights)
        assert_equal(each["masters"], weights)
        assert each["losses"] == by_rank[0]["losses"]
        assert each["facts"]["init.language_model"].startswith(str(source))
    assert {name for each in by_rank for name, *_ in each["held"]} == set(weights)
    losses: list[float] = by_rank[0]["losses"]
    return losses


def test_layouts_start_alike(imported: tuple[Path, dict[str, Tensor]], data: Path, tmp_path: Path) -> None:
    alone = check_start(layout(), 1, imported, data, tmp_path / "alone")
    together = check_start(layout(pp=2, vpp=2, ep=2, dp=2), 4, imported, data, tmp_path / "together")
    assert together == pytest.approx(alone, rel=TOLERANCE)


@pytest.mark.slow
def test_masters_keep_what_bfloat16_weights_lose(
    imported: tuple[Path, dict[str, Tensor]], data: Path, tmp_path: Path
) -> None:
    more = [*layout(pp=2), "dep.mode=coupled", "train.dtype=bfloat16"]
    check_start(more, 2, imported, data, tmp_path)


def test_parts_and_what_a_run_remembers(
    imported: tuple[Path, dict[str, Tensor]], run_alone: Path, data: Path, tmp_path: Path
) -> None:
    """The tower is another run's, the projector random; checkpoints say so, and a resume does not ask."""
    source, weights = imported
    other = run_alone / "checkpoints" / "step_5"
    chosen = [
        f"checkpoint.init_from={source}",
        f"checkpoint.init_parts={{vision_tower: {other}}}",
        "checkpoint.init_fresh=[mm_projector.*]",
    ]
    arguments = short_run(data, tmp_path / "run", *layout(), *chosen, "train.steps=2", *SCHEDULE)
    (found,) = run_ranks(start, 1, arguments)
    stored = StoredCheckpoint.open(other)
    expected = {
        name: stored.read(name) if name.startswith("vision_tower") else each
        for name, each in weights.items()
        if not name.startswith("mm_projector")
    }
    fresh = [each for each in found["held"] if each[0] not in expected]
    assert_equal([each for each in found["held"] if each[0] in expected], expected)
    assert len(fresh) == 6
    assert all(not torch.equal(values, weights[name].flatten()) for name, _, values in fresh)
    assert any("mm_projector" in note and "random" in note for note in found["notes"])
    # What is recorded, and a resume.
    printed = run_ranks(fit_and_listen, 1, arguments)[0]
    assert (
        f"vision_tower: {sum(name.startswith('vision') for name in weights)} tensors from {other}" in printed
    )
    facts = read_manifest(tmp_path / "run" / "checkpoints" / "step_2").facts
    assert facts["init.vision_tower"] == f"{other} (step 5)"
    assert "imported from" in facts["init.language_model"]
    printed = run_ranks(fit_and_listen, 1, [*arguments, "train.steps=3"])[0]
    assert "checkpoint.init_from is not read again" in printed
    assert read_manifest(tmp_path / "run" / "checkpoints" / "step_3").facts == facts


def refusals(context: RankContext, arguments: Sequence[str], cases: Sequence[str]) -> dict[str, str]:
    """For further overrides, separated by spaces: the error of starting from weights."""
    from k25_train.checkpoint.initial import start_from_weights
    from k25_train.errors import K25Error

    run = start_run(context, arguments)
    outcomes = {}
    for case in cases:
        try:
            start_from_weights(compose([*arguments, *case.split()]), run.modules, run.optimizer)
            outcomes[case] = "started"
        except K25Error as error:
            outcomes[case] = str(error)
    return outcomes


def test_what_is_refused(imported: tuple[Path, dict[str, Tensor]], data: Path, tmp_path: Path) -> None:
    source, weights = imported
    tower = {name: each for name, each in weights.items() if name.startswith("vision_tower")}
    half = dict(list(tower.items())[1:]) | {"vision_tower.extra": torch.ones(3)}
    write_parts_folder(tmp_path / "half", half, (source / "config.yaml").read_text())
    other_model = (source / "config.yaml").read_text().replace("num_layers: 2", "num_layers: 3")
    write_parts_folder(tmp_path / "other", tower, other_model)
    damaged = tmp_path / "damaged"
    shutil.copytree(source, damaged)
    flip_byte(next(damaged.glob("*.safetensors")))
    whole_model = f"checkpoint.init_from={source}"
    expected = {
        f"checkpoint.init_parts={{vision_tower:{source}}}": "word_embeddings.weight: no source is named",
        f"checkpoint.init_from={tmp_path / 'nowhere'}": "nowhere",
        f"{whole_model} checkpoint.init_fresh=[vision_towr.*]": "vision_towr.* means no tensor",
        f"{whole_model} checkpoint.init_parts={{vision_tower:{tmp_path / 'half'}}}": (
            "vision_tower.extra: in"
        ),
        f"{whole_model} checkpoint.init_parts={{vision_tower:{tmp_path / 'other'}}}": (
            "model.vision.num_layers=3"
        ),
        f"checkpoint.init_from={damaged}": "damaged",
    }
    (found,) = run_ranks(refusals, 1, overrides(data, tmp_path / "run", *layout()), list(expected))
    for case, text in expected.items():
        assert text in found[case], case
    half_case = next(case for case in expected if "half" in case)
    assert f"{next(iter(tower))}: not in" in found[half_case]


def write_parts_folder(folder: Path, tensors: dict[str, Tensor], config: str) -> None:
    """Write a checkpoint of weights by hand."""
    folder.mkdir()
    parts = [(whole(name, each.dtype, tuple(each.shape)), each.flatten()) for name, each in tensors.items()]
    files = {"rank_00000_0.safetensors": write_parts(folder / "rank_00000_0.safetensors", parts)}
    (folder / "config.yaml").write_text(config)
    files["config.yaml"] = entry_of(folder / "config.yaml")
    manifest = Manifest(step=0, files=files, facts={}, kind=Kind.WEIGHTS)
    (folder / "manifest.json").write_text(manifest.to_text())


def flip_byte(path: Path) -> None:
    """Change a byte in the middle of the data."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
