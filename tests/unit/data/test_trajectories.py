"""Files of a step: what is written is read, in parts; what is wrong is refused with its name."""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from k25_train.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from k25_train.data.trajectories.packing import dealt, num_padded, packed
from k25_train.data.trajectories.reading import StepFile
from k25_train.data.trajectories.rows import Trajectories
from k25_train.data.trajectories.step_file import step_path, write_step_file
from k25_train.errors import DataError
from tests.helpers.step_files import make_rollouts
from tests.helpers.tiny_shards import VOCAB_SIZE, make_text, tiny_vision_config

STATE = {"cursor": 12, "toggle": {"phase": 1}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "tokenizer.json"
    train_tokenizer([make_text(400, seed) for seed in range(4)], VOCAB_SIZE, path)
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def rows(tokenizer: Tokenizer) -> Trajectories:
    return make_rollouts(tokenizer, tiny_vision_config(), seed=1, num_images=2).weighted()


def test_what_is_written_is_read(rows: Trajectories, tmp_path: Path) -> None:
    path = step_path(tmp_path / "rollouts", 7)
    write_step_file(path, rows, STATE)
    file = StepFile(path)
    assert file.state == STATE and path.name == "step_7.safetensors"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    found = file.everything()
    for field in fields(Trajectories):
        before, after = getattr(rows, field.name), getattr(found, field.name)
        if isinstance(before, np.ndarray):
            assert before.dtype == after.dtype and before.tolist() == after.tolist(), field.name
        else:
            assert before == after, field.name
    assert file.num_generated.sum() == rows.generated.sum()


def test_responses_to_a_prompt_share_its_images(rows: Trajectories, tmp_path: Path) -> None:
    write_step_file(tmp_path / "one.safetensors", rows, STATE)
    kinds = {media for of in rows.media for media in of}
    file = StepFile(tmp_path / "one.safetensors")
    assert (
        len({segment for n in range(file.num_trajectories) for segment in file.segments(n)})
        == len(kinds)
        == 2
    )


def changed(rows: Trajectories, name: str, position: int, value: float) -> Trajectories:
    values = getattr(rows, name).copy()
    values[position] = value
    return replace(rows, **{name: values})


def drawn(rows: Trajectories) -> int:
    """Some token that was generated."""
    return int(np.flatnonzero(rows.generated)[3])


def given(rows: Trajectories) -> int:
    """Some token that was not."""
    return int(np.flatnonzero(~rows.generated)[3])


@pytest.mark.parametrize(
    ("name", "where", "value", "told"),
    [
        ("rollout_logprobs", drawn, np.nan, "log-probability of its rollout that is no finite number: nan"),
        ("rollout_logprobs", drawn, -np.inf, "no finite number"),
        ("rollout_logprobs", drawn, 0.5, "above 0: 0.5"),
        ("advantages", drawn, np.nan, "an advantage that is no finite number"),
        ("policy_weights", drawn, -1.0, "policy_weights that are not 0 or more"),
        ("ratio_weights", given, 1.0, "ratio_weights where nothing was generated"),
        ("versions", drawn, -1, "of no version"),
        ("tokens", given, -5, "negative token id"),
        ("generated", lambda rows: int(rows.offsets[2]), True, "from its first token on"),
    ],
)
def test_what_cannot_be_trained_is_named(
    rows: Trajectories,
    tmp_path: Path,
    name: str,
    where: Callable[[Trajectories], int],
    value: Any,
    told: str,
) -> None:
    position = where(rows)
    number = int(np.searchsorted(rows.offsets, position, side="right")) - 1
    with pytest.raises(DataError, match=told) as caught:
        write_step_file(tmp_path / "bad.safetensors", changed(rows, name, position, value), STATE)
    assert f"trajectory {rows.names[number]} " in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_images_and_facts_are_looked_at_first(rows: Trajectories, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    with pytest.raises(DataError, match=f"an image of trajectory {rows.names[0]} is no image"):
        write_step_file(path, replace(rows, media=((b"no image",), *rows.media[1:])), STATE)
    with pytest.raises(DataError, match=f"facts of trajectory {rows.names[1]} are nothing that JSON"):
        write_step_file(path, replace(rows, facts=({}, {"reward": np.nan}, *rows.facts[2:])), STATE)
    with pytest.raises(DataError, match="advantages has 1 entries"):
        write_step_file(path, replace(rows, advantages=np.zeros(1)), STATE)


def test_a_damaged_file_is_named(rows: Trajectories, tmp_path: Path) -> None:
    path = tmp_path / "step_1.safetensors"
    with pytest.raises(DataError, match="has not been rolled out"):
        StepFile(path)
    write_step_file(path, rows, STATE)
    whole = path.read_bytes()
    # 1. Cut short.
    path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"cannot be read .*restore it, or remove it"):
        StepFile(path)
    # 2. A bit of what describes it, and one of a trajectory.
    path.write_bytes(whole.replace(b'\\"cursor\\": 12', b'\\"cursor\\": 13'))
    with pytest.raises(DataError, match="CRC-32 of its description"):
        StepFile(path)
    logprob = rows.rollout_logprobs[drawn(rows)].tobytes()
    path.write_bytes(whole.replace(logprob, bytes(4)))
    file = StepFile(path)
    number = int(np.searchsorted(rows.offsets, drawn(rows), side="right")) - 1
    with pytest.raises(DataError, match=f"trajectory {rows.names[number]} is damaged"):
        file.rows(number)
    # 3. Of another time, or no such file at all.
    path.write_bytes(whole.replace(b"k25-trajectories", b"k25-trajectoriet"))
    with pytest.raises(DataError, match="is no file of trajectories"):
        StepFile(path)


def test_a_trajectory_is_never_cut() -> None:
    lengths = np.array([30, 90, 10, 60, 96, 5])
    grids = [np.zeros((0, 3), dtype=np.int32)] * 6
    sequences = packed(lengths, list("abcdef"), grids, 96)
    assert sorted(sequences.items.tolist()) == list(range(6)) and not sequences.starts.any()
    sums = np.add.reduceat(sequences.lengths, sequences.offsets[:-1])
    assert (sums <= 96).all() and len(sums) == 4
    with pytest.raises(DataError, match=r"trajectory e has 96 tokens .* train\.seq_len is 95: raise it"):
        packed(lengths, list("abcdef"), grids, 95)


def test_replicas_get_as_many_sequences_and_about_as_many_tokens() -> None:
    tokens = np.random.default_rng(0).integers(0, 100, 48)
    for dp in (1, 2, 4, 8):
        order = dealt(tokens, dp)
        assert sorted(order.tolist()) == list(range(48))
        shares = tokens[order].reshape(dp, -1).sum(1)
        assert shares.max() - shares.min() <= 100
    assert num_padded(5, dp=2, micro_batch_size=2, fewest=1) == 8
    assert num_padded(1, dp=2, micro_batch_size=2, fewest=4) == 16
    assert num_padded(8, dp=2, micro_batch_size=2, fewest=2) == 8
