"""Which stages of a chain are finished, which have to be trained, and what is refused."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.checkpoint import folders
from k25_train.checkpoint.storage.kinds import MANIFEST
from k25_train.compose.resolve import to_yaml
from k25_train.errors import ConfigError
from k25_train.recipes import running
from k25_train.recipes.chain import Chain, Stage
from k25_train.recipes.composed import Composed, compose_chain
from k25_train.recipes.running import StageError, check_order, is_finished, remove_from, run_stage
from tests.helpers.written_checkpoints import write_checkpoint

FRESH = ("vision_tower.*", "mm_projector.*")


@pytest.fixture
def stages(tmp_path: Path) -> list[Composed]:
    """A language model, and a tower that is trained against it."""
    first = Stage(name="lm", experiment="smoke_lm")
    second = Stage(name="vit", experiment="smoke_vit", parts={"language_model": "lm"}, fresh=FRESH)
    return compose_chain(Chain(name="two", dir=str(tmp_path), stages=(first, second)))


def finish(stage: Composed) -> Path:
    """Write a last checkpoint, of which the configuration alone is read."""
    folder = Path(stage.last_checkpoint)
    texts = {folders.CONFIG: to_yaml(stage.config)}
    write_checkpoint(folder.parent, stage.config.train.steps, texts=texts)
    return folder


def no_job(_command: Sequence[str]) -> int:
    pytest.fail("a finished stage was trained again")


def test_a_finished_stage_is_not_trained_again(
    stages: list[Composed], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(stages[0])
    monkeypatch.setattr(running, "run_job", no_job)
    assert not run_stage(stages[0], 1, 2, print)
    check_order(stages)


@pytest.mark.parametrize("damage", [lambda folder: (folder / MANIFEST).unlink(), lambda folder: cut(folder)])
def test_one_whose_last_checkpoint_is_not_whole_is(
    stages: list[Composed], damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(finish(stages[0]))
    assert not is_finished(stages[0])
    trained: list[Sequence[str]] = []
    monkeypatch.setattr(running, "run_job", lambda command: trained.append(command) or 0)
    with pytest.raises(StageError, match="stopped before its last step"):
        run_stage(stages[0], 1, 2, print)
    assert [command[-len(stages[0].arguments) :] for command in trained] == [[*stages[0].arguments]]


def cut(folder: Path) -> None:
    """Lose the end of a file."""
    (folder / folders.CONFIG).write_text("model:")


def test_a_stage_that_fails_ends_the_chain(stages: list[Composed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "run_job", lambda _: 3)
    with pytest.raises(StageError, match="stage lm failed with status 3"):
        run_stage(stages[0], 1, 2, print)


def test_a_stage_that_has_lost_its_start_is_refused(stages: list[Composed]) -> None:
    finish(stages[1])
    with pytest.raises(ConfigError, match="vit is finished, but lm, which it starts from, is not"):
        check_order(stages)


def test_a_stage_that_was_trained_otherwise_is_refused(stages: list[Composed]) -> None:
    finish(stages[0])
    config = stages[0].config
    elsewhere = replace(config, cluster=replace(config.cluster, gpus_per_node=1))
    check_order([replace(stages[0], config=elsewhere), stages[1]])
    faster = replace(config, optim=replace(config.optim, lr=0.25))
    with pytest.raises(ConfigError, match=rf"optim\.lr={config.optim.lr} then, 0\.25 now"):
        check_order([replace(stages[0], config=faster), stages[1]])


def test_a_source_that_came_or_went_is_a_change(stages: list[Composed]) -> None:
    finish(stages[0])
    config = stages[0].config
    sources = config.data.sources
    more = {**sources, "other": replace(sources["text"])}
    for changed, words in (
        (more, "other.format=nothing then, shards now"),
        ({}, "text.format=shards then, nothing"),
    ):
        other = replace(config, data=replace(config.data, sources=changed))
        with pytest.raises(ConfigError, match=words):
            check_order([replace(stages[0], config=other), stages[1]])


def test_stages_are_removed_with_all_that_follow(stages: list[Composed]) -> None:
    for each in stages:
        finish(each)
    remove_from(stages, "vit", print)
    assert [is_finished(each) for each in stages] == [True, False]
    with pytest.raises(ConfigError, match="is not a stage"):
        remove_from(stages, "other", print)


def test_checkpoints_that_are_elsewhere_are_not_forgotten(stages: list[Composed], tmp_path: Path) -> None:
    finish(stages[0])
    config = stages[1].config
    elsewhere = replace(config, checkpoint=replace(config.checkpoint, dir=str(tmp_path / "there")))
    with pytest.raises(ConfigError, match=r"vit are in checkpoint\.dir"):
        remove_from([stages[0], replace(stages[1], config=elsewhere)], "lm", print)
    assert is_finished(stages[0])
