"""Step files as a `DataSource`: what micro-batches have, what is refused, where a run goes on from."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.data.batch import Reads
from k25_train.data.loader import DataLoader
from k25_train.data.policy_rows import POLICY_COLUMNS
from k25_train.data.share_reader import HostInputs, Share
from k25_train.data.start import start_source
from k25_train.data.tokenizer import load_tokenizer
from k25_train.data.trajectories.loader import TrajectoryLoader
from k25_train.data.trajectories.rows import Trajectories
from k25_train.data.trajectories.source import TrajectorySource, rollouts_of
from k25_train.data.trajectories.step_file import step_path, write_step_file
from k25_train.errors import ConfigError, DataError
from k25_train.objectives.base import PolicyTargets
from tests.helpers.parity import NARROW
from tests.helpers.policy_runs import PTX, RL
from tests.helpers.runs import overrides
from tests.helpers.step_files import make_rollouts, write_steps
from tests.helpers.tiny_shards import write_tiny_shard_set

ALONE = Share(rank=0, dp_rank=0, dp_size=1, reads=Reads(tokens=True, labels=True, pixels=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_shard_set(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Config:
    return compose(overrides(data, tmp_path, *RL, *NARROW, *PTX, "dep.mode=coupled"))


@pytest.fixture
def steps(config: Config, data: Path) -> list[Trajectories]:
    """Of three steps, which are written."""
    tokenizer = load_tokenizer(str(data / "tokenizer.json"))
    vision = config.model.vision
    made = [make_rollouts(tokenizer, vision, seed=seed, num_images=1).weighted() for seed in range(3)]
    write_steps(rollouts_of(config), made)
    return made


@pytest.fixture
def source(config: Config, steps: list[Trajectories]) -> Iterator[TrajectorySource]:
    with opened(config) as source:
        yield source


def opened(config: Config) -> TrajectorySource:
    source = start_source(config)
    assert isinstance(source, TrajectorySource)
    source.open()
    source.take(ALONE)
    return source


def rewritten(config: Config, rows: Trajectories, **more: object) -> None:
    write_step_file(step_path(rollouts_of(config), 1), replace(rows, **more), {})  # type: ignore[arg-type]


def test_every_generated_token_is_a_label_with_what_is_known_of_it(
    source: TrajectorySource, steps: list[Trajectories]
) -> None:
    batches, rows = source.step(0).batches, steps[0]
    numbers, mask = batches.responses, batches.loss_mask
    for number in range(len(rows.names)):
        of = slice(*rows.offsets[number : number + 2].tolist())
        drawn = rows.generated[of]
        own = numbers == number
        assert batches.labels[own].tolist() == rows.tokens[of][drawn].tolist()
        assert mask[own].all()
        columns = batches.policy.transpose(0, 1)[:, own].numpy()
        assert columns[0].tolist() == rows.rollout_logprobs[of][drawn].tolist()
        assert columns[1].tolist() == rows.advantages[of][drawn].tolist()
    # What else has a loss is of `data`.
    others = batches.policy[:, POLICY_COLUMNS.index("ptx_weights")][mask & (numbers < 0)]
    assert len(others) and (others > 0).all() and len(others.unique()) == 1
    assert not (batches.policy[:, 4][numbers >= 0]).any() and not batches.policy[:, 2][numbers < 0].any()
    assert PolicyTargets._fields[:5] == POLICY_COLUMNS


def test_the_state_of_a_step_is_its_files_and_that_of_data(
    source: TrajectorySource, config: Config, steps: list[Trajectories]
) -> None:
    first, second, third = (source.step(step) for step in range(3))
    assert [each.state_after["cursor"] for each in (first, second, third)] == [1, 2, 3]
    with opened(config) as other:
        other.start_from(2, second.state_after)
        assert_same(other.step(2), third)


def test_a_state_that_is_none_is_refused(source: TrajectorySource) -> None:
    with pytest.raises(DataError):
        source.start_from(2, {"cursor": 2, "data": {"step": "two"}})


def test_plans_know_the_images_of_every_sequence(
    source: TrajectorySource, config: Config, steps: list[Trajectories], data: Path
) -> None:
    tokenizer = load_tokenizer(str(data / "tokenizer.json"))
    made = make_rollouts(tokenizer, config.model.vision, seed=4, sizes=(3, 4, 2), num_images=3)
    write_steps(rollouts_of(config), [made.weighted()])
    loader = DataLoader(config.data, config.of_batch(3).train, config.model.vision)
    plan = TrajectoryLoader(config, loader, rollouts_of(config)).plan(0)
    found = [item.grid_thw for sequence in plan.sequences for item in sequence.items]
    assert plan.grids() == found and len(set(found)) >= 3
    firsts = plan.first_items().tolist()
    assert [len(sequence.items) for sequence in plan.sequences] == np.diff(firsts).tolist()


def assert_same(one: HostInputs, other: HostInputs) -> None:
    pairs = zip(one.batches.tensors(), other.batches.tensors(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert one.batches.documents == other.batches.documents
    assert (one.sizes, one.state_after, one.served) == (other.sizes, other.state_after, other.served)


def test_a_placeholder_too_few_is_named(
    source: TrajectorySource, config: Config, steps: list[Trajectories], data: Path
) -> None:
    rows = steps[0]
    tokens = rows.tokens.copy()
    pad = load_tokenizer(str(data / "tokenizer.json")).media_pad
    tokens[np.flatnonzero(tokens == pad)[0]] = 11
    rewritten(config, rows, tokens=tokens)
    with pytest.raises(
        DataError, match=r"has runs of \[\d+\] placeholders, but its images .* tokens"
    ) as told:
        source.step(0)
    assert rows.names[0] in str(told.value)


def test_an_image_that_does_not_decode_is_no_sample_to_skip(
    source: TrajectorySource, config: Config, steps: list[Trajectories]
) -> None:
    rows = steps[0]
    image = rows.media[0][0]
    broken = image[: len(image) // 2]
    media = tuple(tuple(broken if each == image else each for each in of) for of in rows.media)
    rewritten(config, rows, media=media)
    with pytest.raises(DataError, match="what an engine was shown cannot be decoded"):
        source.step(0)


def test_a_step_without_a_file_is_named(source: TrajectorySource) -> None:
    with pytest.raises(DataError, match=r"step_4\.safetensors: is not there"):
        source.step(3)


def test_evaluations_weigh_every_token_alike(source: TrajectorySource) -> None:
    source.step(0)
    batches = source.evaluation(4, None).batches
    assert (batches.policy[:, 4][batches.loss_mask] == 1).all() and (batches.responses < 0).all()


def test_sources_of_data_have_other_names(config: Config) -> None:
    of = {"rollouts": next(iter(config.data.sources.values()))}
    named = replace(config, data=replace(config.data, sources=of))
    with pytest.raises(ConfigError, match=r"data\.sources\.rollouts: .* another name"):
        opened(named)
