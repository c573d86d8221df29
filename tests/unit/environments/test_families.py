"""Generated tasks: what they ask, what is right, how they are demonstrated, and what is held out."""

import asyncio
import io
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from k25_train.compose.resolve import compose
from k25_train.data.chat.messages import MediaPart, parse_conversation
from k25_train.environments.environment import Services
from k25_train.environments.families.counting import CELL, COLOURS, Counting, Picture, Shape, png_of
from k25_train.environments.families.sums import Sums
from k25_train.environments.family import Split, read_range, split_of
from k25_train.environments.playing import play
from k25_train.environments.registry import make_environment, make_family
from k25_train.environments.sandboxes.none import NoSandboxes
from k25_train.errors import ConfigError
from k25_train.rl.demonstrations import conversation, write_demonstrations
from k25_train.rl.rewards.judges import open_judges
from tests.helpers.family_cases import NAMES, family_of

NUM_TASKS = 150
CHEAP = {"logic": {"datasets": "chain_sum,gcd,syllogism"}, "visual": {"difficulty": "1"}}
"""Options of families that take milliseconds to draw."""
JUDGES = open_judges(10, 1, places=1)
SERVICES = Services(sandboxes=NoSandboxes(), judging=JUDGES, tool_timeout_s=10)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_a_function_of_its_number(name: str, tmp_path: Path) -> None:
    random.seed(1)
    first = [family_of(name, tmp_path).task(Split.TRAIN, number) for number in range(20)]
    random.seed(2)
    again = [family_of(name, tmp_path).task(Split.TRAIN, number) for number in reversed(range(20))]
    assert first == again[::-1]
    assert len({task.key for task in first}) == 20
    assert all(task.family == name and task.thinking and task.problem for task in first)
    demonstrations = [family_of(name, tmp_path).demonstration(Split.TRAIN, 3) for _ in range(2)]
    assert demonstrations[0] == demonstrations[1]


@pytest.mark.parametrize("name", NAMES)
def test_held_out_tasks_ask_what_no_training_task_asks(name: str, tmp_path: Path) -> None:
    family = family_of(name, tmp_path, **CHEAP.get(name, {}))
    asked = {
        split: {
            (repr(task.messages), task.media, repr(task.setup))
            for task in (family.task(split, n) for n in range(NUM_TASKS))
        }
        for split in Split
    }
    assert not asked[Split.TRAIN] & asked[Split.HELDOUT]
    assert len(asked[Split.HELDOUT]) > NUM_TASKS / 4


def test_one_of_eight_contents_is_held_out() -> None:
    found = Counter(split_of(number) for number in range(8000))
    assert 850 < found[Split.HELDOUT] < 1150


def test_sums_are_right_and_demonstrated_step_by_step() -> None:
    family = Sums({"digits": "2-6", "passes": "1-4"})
    passes = set()
    for number in range(NUM_TASKS):
        task, shown = family.task(Split.TRAIN, number), family.demonstration(Split.TRAIN, number)[-1]
        digits = [int(digit) for digit in re.findall(r"\d", task.messages[0]["content"])]
        assert task.messages[0]["content"] == "+".join(map(str, digits)) + "?"
        assert task.reference == shown.content == str(sum(digits) % 10)
        assert task.problem == f"sums/{len(digits)}"
        lines = shown.reasoning.split(";")
        passes.add(len(lines))
        assert len(set(lines)) == 1
        total = digits[0]
        text = str(total)
        for digit in digits[1:]:
            total = (total + digit) % 10
            text += f"+{digit}={total}"
        assert lines[0] == text
    assert passes == {1, 2, 3, 4}


def test_as_many_demonstrations_are_wrong_as_asked_for_and_no_task_is() -> None:
    family = Sums({"wrong": "0.4"})
    wrong = 0
    for number in range(400):
        task, shown = family.task(Split.TRAIN, number), family.demonstration(Split.TRAIN, number)[-1]
        assert task == Sums({}).task(Split.TRAIN, number)
        wrong += shown.content != task.reference
        assert shown.reasoning[-1] == shown.content
        copied = re.sub(r"=\d", "", shown.reasoning.split(";")[0])
        assert f"{copied}?" == task.messages[0]["content"]
    assert 0.3 < wrong / 400 < 0.5


def test_a_picture_shows_what_is_counted() -> None:
    family = Counting({"shapes": "1-9", "side": "3"})
    for number in range(60):
        task = family.task(Split.TRAIN, number)
        pixels = np.asarray(Image.open(io.BytesIO(task.media[0])))
        assert pixels.shape == (3 * CELL, 3 * CELL, 3)
        middles = pixels[CELL // 2 :: CELL, CELL // 2 :: CELL].reshape(-1, 3)
        colour = task.messages[0]["content"][1]["text"].removeprefix("How many are ").removesuffix("?")
        assert task.reference == str(sum(tuple(middle) == COLOURS[colour] for middle in middles))
        seen = [tuple(middle) for middle in middles if tuple(middle) != (255, 255, 255)]
        words = family.demonstration(Split.TRAIN, number)[-1].reasoning.split(",")
        assert [COLOURS[word.split()[0]] for word in words] == seen
        assert task.problem == f"counting/{len(seen)}"


def test_discs_and_squares_look_different() -> None:
    pictures = [png_of(Picture(1, (Shape(0, kind, "red"),), "red")) for kind in ("disc", "square")]
    coloured = [(np.asarray(Image.open(io.BytesIO(each))) != 255).any(-1).sum() for each in pictures]
    assert 0.6 < coloured[0] / coloured[1] < 0.9


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("riddles", {}, "there is no such family of tasks"),
        ("sums", {"digits": "6-3"}, "options.digits=6-3"),
        ("sums", {"digits": "many"}, "options.digits=many"),
        ("sums", {"digits": "1-3"}, "two digits or more"),
        ("sums", {"wrong": "1.5"}, "between 0 and 1"),
        ("sums", {"shapes": "3"}, "it has no shapes\n  -> it has digits, passes, wrong;"),
        ("counting", {"shapes": "0-2"}, "options.shapes=0-2"),
        ("counting", {"shapes": "5-9", "side": "2"}, "4 places"),
    ],
)
def test_wrong_options_are_named(family: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        make_family(family, options)
    assert "->" in str(error.value)


def test_too_few_different_tasks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    only = next(
        digits for digits in itertools.product(range(10), repeat=2) if split_of(digits) is Split.TRAIN
    )
    monkeypatch.setattr(Sums, "draw", lambda self, rng: only)
    assert Sums({}).task(Split.TRAIN, 0).reference == str(sum(only) % 10)
    with pytest.raises(ConfigError, match=r"none of 10,000 draws is a heldout task.*\n.*use wider options"):
        Sums({}).task(Split.HELDOUT, 0)


def test_a_range_has_both_of_its_ends() -> None:
    assert list(read_range("2-4")) == [2, 3, 4]
    assert list(read_range("5")) == [5]


@pytest.mark.parametrize("name", ["sums", "counting", "logic"])
def test_a_demonstration_is_a_conversation_to_learn_from(name: str) -> None:
    family = make_family(name, None)
    task, (shown,) = family.task(Split.TRAIN, 0), family.demonstration(Split.TRAIN, 0)
    played = asyncio.run(play(task, make_environment(task, SERVICES), (shown,)))
    parsed = parse_conversation(json.dumps(conversation(played)).encode())
    prompt, answer = parsed.messages
    assert (answer.reasoning, answer.content) == (shown.reasoning, (shown.content,))
    assert answer.learned and parsed.thinking
    assert sum(isinstance(part, MediaPart) for part in prompt.content) == len(task.media)


def test_a_file_of_demonstrations_holds_training_tasks_alone(tmp_path: Path) -> None:
    config = compose(["experiment=rl_smoke", "environment.tasks.sums.num_tasks=30"]).environment
    assert config is not None
    out = tmp_path / "new" / "sums.jsonl"
    assert asyncio.run(write_demonstrations(config, SERVICES, out)) == 30
    first = out.read_bytes()
    lines = [json.loads(line) for line in first.splitlines()]
    family = make_family("sums", config.tasks["sums"].options)
    asked = [family.task(Split.TRAIN, number).messages[0] for number in range(30)]
    assert [line["messages"][0] for line in lines] == asked
    answered = [family.demonstration(Split.TRAIN, number)[-1].reasoning for number in range(30)]
    assert [line["messages"][1]["reasoning_content"] for line in lines] == answered
    asyncio.run(write_demonstrations(config, SERVICES, out))
    assert out.read_bytes() == first
    assert [path.name for path in out.parent.iterdir()] == ["sums.jsonl"]
