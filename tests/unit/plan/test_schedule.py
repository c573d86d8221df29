"""The learning rate and the batch by steps and tokens, on K2's own numbers and on small ones."""

import itertools
import math
from fractions import Fraction

import pytest

from k25_train.compose.resolve import compose, load, to_yaml
from k25_train.config.batches import batch_schedule
from k25_train.config.schema import Config
from k25_train.config.span import Span
from k25_train.errors import ConfigError
from k25_train.plan.schedule import Schedule

T, B, M = 10**12, 10**9, 10**6
K2 = ("experiment=k25_pretrain_4k", "train.steps=null")


def schedule_of(config: Config) -> Schedule:
    return Schedule(config.optim, config.train)


@pytest.mark.parametrize(
    ("text", "number", "is_tokens"),
    [
        (500, 500, False), ("500", 500, False), ("5.5T", 5_500_000_000_000, True), ("400B", 400 * B, True),
        ("67M", 67 * M, True), ("0.5K", 500, True), ("1.000001M", 1_000_001, True), (0, 0, False),
    ],
)  # fmt: skip
def test_spans_are_read_exactly(text: int | str, number: int, is_tokens: bool) -> None:
    assert Span.read(text) == Span(number, is_tokens=is_tokens)


@pytest.mark.parametrize(
    "text", ["", "T", "5.5", "-1", "1e9", "1 000", "0.0001K", "5.5t", "٣", "1.5TB", True]
)
def test_what_is_no_span_is_none(text: str) -> None:
    assert Span.read(text) is None


def test_the_schedule_of_k2() -> None:
    """Section 2.5: 500 steps of warm-up, 2e-4 for 10T tokens, a cosine to 2e-5 over 5.5T."""
    config = compose([*K2, "train.tokens=15.5T", "optim.warmup=500", "optim.decay=5.5T"])
    schedule, batches = schedule_of(config), config.train.batches
    assert config.train.steps == math.ceil(15.5 * T / 2**26) == 230_968
    assert schedule.learning_rate(1) == pytest.approx(2e-4 / 500)
    assert schedule.learning_rate(250) == pytest.approx(1e-4)
    assert {schedule.learning_rate(step) for step in (500, 501, 100_000, batches.steps_for(10 * T) - 1)} == {
        2e-4
    }
    assert schedule.learning_rate(batches.steps_for(10 * T) + 2) < 2e-4
    middle = batches.steps_for(10 * T + 2_750 * B)
    assert schedule.learning_rate(middle) == pytest.approx(1.1e-4, rel=1e-4)
    assert schedule.learning_rate(230_968) == pytest.approx(2e-5)


def test_the_anneal_of_k2() -> None:
    """2e-5 to 7e-6 over 400B tokens at 4K, then 60B at 32K, of as many tokens a step."""
    rates = ("optim.warmup=0", "optim.lr=2e-5", "optim.min_lr=7e-6")
    anneal = compose([*K2, *rates, "train.tokens=400B", "optim.decay=400B"])
    assert anneal.train.steps == math.ceil(400 * B / 2**26)
    assert schedule_of(anneal).learning_rate(1) == pytest.approx(2e-5, rel=1e-5)
    assert schedule_of(anneal).learning_rate(anneal.train.steps) == pytest.approx(7e-6)
    length = ("train.seq_len=32768", "train.global_batch_size=2048", "model.rope.scaling_factor=8")
    rates = ("optim.warmup=0", "optim.lr=7e-6", "optim.min_lr=7e-6", "optim.decay=0", "optim.start_lr=7e-6")
    smaller = ("train.eval_sequences=2048", "activation=keep", *length)
    stretched = compose([*K2, *rates, *smaller, "train.tokens=60B"])
    assert {schedule_of(stretched).learning_rate(step) for step in (1, stretched.train.steps)} == {7e-6}
    assert stretched.train.batches.tokens_after(1) == anneal.train.batches.tokens_after(1)


def test_steps_and_tokens_say_the_same_without_a_ramp() -> None:
    """A warm-up and a decay of so many tokens are those of as many steps."""
    sizes = ("experiment=smoke", "train.steps=100", "train.seq_len=1000", "train.global_batch_size=16")
    by_steps = compose([*sizes, "optim.warmup=10", "optim.decay=40"])
    by_tokens = compose([*sizes, "optim.warmup=160K", "optim.decay=640K"])
    of_steps, of_tokens = schedule_of(by_steps), schedule_of(by_tokens)
    assert [of_steps.learning_rate(step) for step in range(1, 101)] == pytest.approx(
        [of_tokens.learning_rate(step) for step in range(1, 101)], rel=1e-15
    )


def test_warm_up_rises_from_where_the_stage_before_ended() -> None:
    rates = ("optim.lr=1e-3", "optim.min_lr=1e-4", "optim.start_lr=2e-4", "optim.warmup=4", "optim.decay=2")
    schedule = schedule_of(compose(["experiment=smoke", "train.steps=8", *rates]))
    found = [schedule.learning_rate(step) for step in range(1, 9)]
    assert found == pytest.approx([4e-4, 6e-4, 8e-4, 1e-3, 1e-3, 1e-3, 5.5e-4, 1e-4])


@pytest.mark.parametrize(("span", "moving"), [("3", 5), ("0", 8), ("8", 0), ("0.5K", 4), ("4K", 0)])
def test_biases_stay_in_the_last_part(span: str, moving: int) -> None:
    """Of eight steps of 128 tokens; a step belongs to the part if it begins in it."""
    sizes = ("train.steps=8", "train.seq_len=32", "train.global_batch_size=16", "optim.warmup=0")
    sizes += ("optim.decay=0", "train.micro_batch_size=1", "train.eval_sequences=8")
    if span == "4K":
        with pytest.raises(ConfigError, match="must not be longer than the run"):
            compose(["experiment=smoke", *sizes, "optim.frozen_expert_bias=4.2K"])
        span = "4.096K"
    scale = 4 if span == "0.5K" else 1
    span = "2.048K" if scale == 4 else span
    schedule = schedule_of(compose(["experiment=smoke", *sizes, f"optim.frozen_expert_bias={span}"]))
    assert [schedule.moves_expert_bias(step) for step in range(1, 9)] == [True] * moving + [False] * (
        8 - moving
    )


def test_biases_of_a_frozen_language_model_never_move() -> None:
    schedule = schedule_of(compose(["experiment=smoke", "optim.language_model.trained=false"]))
    assert not schedule.moves_expert_bias(1)


@pytest.mark.parametrize(
    ("warmup", "decay", "fits"),
    [
        ("60", "40", True), ("61", "40", False), ("240K", "160K", True), ("241K", "160K", False),
        ("60", "160K", True), ("60", "161K", False), ("240K", "40", True), ("241K", "40", False),
        ("0", "101", False), ("0", "401K", False),
    ],
)  # fmt: skip
def test_warm_up_and_decay_have_room_in_either_unit(warmup: str, decay: str, fits: bool) -> None:
    sizes = ("train.steps=100", "train.seq_len=250", "train.global_batch_size=16", "train.eval_sequences=16")
    changes = ["experiment=smoke", *sizes, f"optim.warmup={warmup}", f"optim.decay={decay}"]
    if fits:
        compose(changes)
        return
    with pytest.raises(ConfigError, match="must leave room"):
        compose(changes)


# Batches ----------------------------------------------------------------------------------------------------


def by_hand(size: int, seq_len: int, start: int, increment: int, length: str, num_steps: int) -> list[int]:
    """Megatron-LM's rule, step by step: each size for an equal part of the length."""
    span, parts = Span.of(length), (size - start) // increment
    sizes = list[int]()
    for step in range(num_steps):
        done = sum(sizes) * seq_len if span.is_tokens else step
        part = min(parts, int(Fraction(done * parts, span.number))) if span.number else parts
        sizes.append(start + part * increment)
    return sizes


@pytest.mark.parametrize(
    ("size", "start", "increment", "length"),
    [
        (8, 2, 2, "1K"), (8, 2, 2, "7"), (8, 2, 1, "2"), (64, 4, 4, "3K"), (64, 4, 4, "0"), (64, 4, 4, "20"),
        (16, 2, 2, "0.01K"), (16, 8, 8, "1"),
    ],
)  # fmt: skip
def test_the_batch_grows_as_megatron_s_does(size: int, start: int, increment: int, length: str) -> None:
    batches = batch_schedule(size, 10, start, increment, length)
    sizes = by_hand(size, 10, start, increment, length, 60)
    assert [batches.size_of(step) for step in range(1, 61)] == sizes
    after = list(itertools.accumulate(sizes, initial=0))
    assert [batches.sequences_after(step) for step in range(61)] == after
    assert [batches.tokens_after(step) for step in range(61)] == [10 * each for each in after]
    for tokens in range(1, 10 * after[-1], 7):
        steps = batches.steps_for(tokens)
        assert 10 * after[steps - 1] < tokens <= 10 * after[steps]


def test_a_run_of_tokens_has_the_steps_of_its_ramp() -> None:
    ramp = "train.batch_ramp.start=8 train.batch_ramp.increment=4 train.batch_ramp.length=6.4K".split()
    sizes = ("train.seq_len=100", "train.global_batch_size=16", "train.eval_sequences=16", "optim.warmup=1")
    sizes += ("optim.decay=1",)
    config = compose(["experiment=smoke", "train.steps=null", "train.tokens=20K", *sizes, *ramp])
    assert config.train.steps == config.train.batches.steps_for(20_000)
    assert config.train.batches.tokens_after(config.train.steps) >= 20_000
    assert config.train.batches.tokens_after(config.train.steps - 1) < 20_000


# Length in tokens -------------------------------------------------------------------------------------------


def test_a_saved_run_of_tokens_loads_as_it_was(tmp_path: pytest.TempPathFactory) -> None:
    config = compose(["experiment=smoke", "train.steps=null", "train.tokens=1M"])
    path = tmp_path / "config.yaml"  # type: ignore[operator]
    path.write_text(to_yaml(config))
    assert f"steps: {config.train.steps}\n" in path.read_text()
    assert load(path).config == config
    longer = load(path, ["train.tokens=2M", "train.steps=null"]).config
    assert longer.train.steps > config.train.steps
    with pytest.raises(ConfigError, match=r"which train\.tokens=2M comes to(.|\n)*train\.steps=null"):
        load(path, ["train.tokens=2M"])


def test_a_run_has_steps_or_tokens() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.steps=null\n\s+must be a whole number(.|\n)*as train\.tokens"
    ):
        compose(["experiment=smoke", "train.steps=null"])
    with pytest.raises(
        ConfigError, match=r"train\.tokens=1K\n\s+must be at least the tokens of a step"
    ) as short:
        compose(["experiment=smoke", "train.steps=null", "train.tokens=1K"])
    assert "train.steps=" not in str(short.value)
    both = compose(["experiment=smoke", "train.tokens=1M", "train.steps=null"])
    assert compose(["experiment=smoke", "train.tokens=1M", f"train.steps={both.train.steps}"]) == both
