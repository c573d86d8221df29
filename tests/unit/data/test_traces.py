"""Tool-use traces: what the code prints is the truth, mistakes are real ones, and parts can be made again."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from k25_train.data.__main__ import main
from k25_train.data.chat.messages import parse_conversation
from k25_train.data.chat.template import Text, render
from k25_train.data.traces import conversation, generate
from k25_train.data.traces.conversation import Trace, TraceOptions, make_trace
from k25_train.data.traces.draw import Draw
from k25_train.data.traces.families.registry import FAMILIES
from k25_train.data.traces.session import FOLDER, MAX_OUTPUT, Session
from k25_train.data.traces.slips import SLIPS
from k25_train.data.traces.task import Family, Task, cell
from k25_train.errors import DataError

PLAIN = TraceOptions(slips=0.0)
DOT = {"dot.png": Image.new("RGB", (3, 2), (220, 40, 40))}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """One for all tests that do not break it."""
    with Session() as opened:
        yield opened


def tool_outputs(trace: Trace) -> list[str]:
    assert trace.conversation is not None
    return [each["content"] for each in trace.conversation["messages"] if each["role"] == "tool"]


@pytest.mark.parametrize("difficulty", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_code_prints_is_the_truth(session: Session, family: str, difficulty: int) -> None:
    options = replace(PLAIN, families=(family,), difficulties=(difficulty,))
    traces = [make_trace(options, number, session) for number in range(3)]
    assert [each.discarded for each in traces] == ["", "", ""]
    for trace in traces:
        assert trace.conversation is not None
        assert not any("Traceback" in output for output in tool_outputs(trace))
        # The session saw the image; the conversation has none.
        parsed = parse_conversation(json.dumps(trace.conversation).encode())
        assert all(isinstance(part, str) for message in parsed.messages for part in message.content)
        assert len({json.dumps(each.conversation) for each in traces}) == 3


def test_thoughts_name_colours_that_were_printed_before(session: Session) -> None:
    for number in range(len(FAMILIES)):
        trace = make_trace(PLAIN, number, session)
        assert trace.conversation is not None
        printed = ""
        for message in trace.conversation["messages"]:
            printed += message["content"] if message["role"] == "tool" else ""
            thought = message.get("reasoning_content", "")
            for name in ("Red", "Green", "Blue", "Yellow", "Orange", "Purple", "Cyan", "Pink", "Brown"):
                _, found, rest = thought.partition(f"{name} is ")
                if found:
                    assert rest[: rest.index(")") + 1] in printed


def test_a_trace_depends_on_its_number_alone(session: Session) -> None:
    options = TraceOptions(seed=5, slips=0.5)
    first = [make_trace(options, number, session).conversation for number in range(8)]
    with Session() as other:
        again = [make_trace(options, number, other).conversation for number in reversed(range(8))]
    assert first == again[::-1]
    assert first != [
        make_trace(replace(options, seed=6), number, session).conversation for number in range(8)
    ]


def test_mistakes_are_real_and_corrected(session: Session) -> None:
    traces = [make_trace(TraceOptions(slips=1.0), number, session) for number in range(24)]
    assert {each.discarded for each in traces} == {""}
    errors = {output.splitlines()[-1].split(":")[0] for each in traces for output in tool_outputs(each)}
    assert errors >= {"FileNotFoundError", "NameError", "AttributeError"}
    with_one = [each for each in traces if each.conversation and each.conversation["trace"]["mistakes"]]
    assert len(with_one) > 16
    for trace in with_one:
        [failed] = [output for output in tool_outputs(trace) if "Traceback" in output]
        assert 'File "<cell 1>", line' in failed
        assert "site-packages" not in failed


def test_only_what_the_assistant_writes_is_learned(session: Session) -> None:
    trace = make_trace(PLAIN, 0, session)
    [document] = render(parse_conversation(json.dumps(trace.conversation).encode()))
    learned = "".join(piece.text for piece in document if isinstance(piece, Text) and piece.learned)
    shown = "".join(piece.text for piece in document if isinstance(piece, Text) and not piece.learned)
    assert "Image.open" in learned
    assert tool_outputs(trace)[0] in shown
    assert tool_outputs(trace)[0] not in learned


def wrong(family: Family, **changes: object) -> Family:
    """A family with something wrong in its tasks."""
    return lambda draw, difficulty: replace(family(draw, difficulty), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"truth": -1}, "wrong answer"),
        ({"cells": (cell("", "1 / 0"),)}, "a cell failed"),
        ({"cells": (cell("", "print('no number')"),)}, "no value"),
        ({"cells": (cell("", "x = 1"),)}, "no value"),
        ({"cells": (cell("", "True"),)}, "no value"),
    ],
)
def test_what_is_not_right_is_thrown_away(
    session: Session, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], reason: str
) -> None:
    broken = {"count": wrong(FAMILIES["count"], **changes)}
    monkeypatch.setattr(conversation, "FAMILIES", broken)
    trace = make_trace(replace(PLAIN, families=("count",)), 0, session)
    assert (trace.conversation, trace.discarded) == (None, reason)


def test_a_mistake_that_goes_through_is_thrown_away(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harmless(draw: Draw, task: Task) -> tuple[object, ...]:
        return (cell("", "0"), *task.cells)

    monkeypatch.setattr(conversation, "SLIPS", (harmless,))
    assert make_trace(TraceOptions(slips=1.0), 0, session).discarded == "other cells failed than were to"


def test_a_session_keeps_names_until_the_next_trace(session: Session) -> None:
    session.begin(DOT)
    assert session.run("x = 20").text == ""
    assert session.run("x += 1\nx").text == "21"
    assert session.run("import os; os.getcwd(), os.listdir('.')").text == f"('{FOLDER}', ['dot.png'])"
    session.finish()
    session.begin({})
    assert session.run("x").text.endswith("NameError: name 'x' is not defined")
    assert session.run("print('seen'); int('a')").text.startswith("seen\nTraceback (most recent call last):")
    assert session.run("x = (").failed
    assert session.run("None").text == ""
    assert session.run("'a' * 9000").text.endswith(f"… {9002 - MAX_OUTPUT} more characters")
    session.finish()


def test_a_cell_may_neither_run_for_ever_nor_take_the_session_along() -> None:
    with Session(timeout_s=0.3) as own:
        own.begin({})
        found = own.run("while True: pass")
        assert found.failed
        assert found.text.endswith("TimeoutError: the cell ran longer than it may")
        stubborn = "import time\nwhile True:\n    try:\n        time.sleep(9)\n    except BaseException: pass"
        assert own.run(stubborn).text == "the session has ended: no answer within 0.6 s"
        assert own.run("1 + 1").text == "the session has ended"
        own.begin({})
        assert own.run("import os; os._exit(3)").text == "the session has ended: its process is gone"
        own.begin(DOT)
        assert own.run("1 + 1").text == "2"


def lines_of(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.jsonl")}


def test_parts_are_made_once_and_more_can_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "PART_TRACES", 6)
    options = replace(PLAIN, heldout=0.3, families=("darkest_quarter", "largest_colour"))
    seen: list[tuple[int, int]] = []
    counts = generate.generate(options, 9, tmp_path / "a", 0, lambda *done: seen.append(done))
    assert seen == [(0, 9), (6, 9), (9, 9)]
    assert sum(counts.written.values()) == 9
    assert counts.discarded == {}
    assert set(counts.written) == {"train", "heldout"}
    before = lines_of(tmp_path / "a")
    seen.clear()
    generate.generate(options, 12, tmp_path / "a", 0, lambda *done: seen.append(done))
    assert seen == [(6, 12), (12, 12)], "a part that is there and whole stays"
    assert lines_of(tmp_path / "a")["train/traces-00000.jsonl"] == before["train/traces-00000.jsonl"]
    # Two processes make the same.
    generate.generate(options, 12, tmp_path / "b", 2, lambda *done: None)
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")
    with pytest.raises(DataError, match="made with seed=0, not 1"):
        generate.generate(replace(options, seed=1), 12, tmp_path / "a", 0, lambda *done: None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--family", "nothing"], "known families of traces are pixel_count"),
        (["--difficulty", "4"], "is 1, 2 or 3"),
        (["--slips", "1.5"], "--slips 1.5: is a share"),
    ],
)
def test_options_out_of_range_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["traces", "--out", str(tmp_path / "t"), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["traces", "--out", str(tmp_path / "t"), "--count", "3", "--heldout", "0"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "3 traces to train on, 0 held out, of 3 families; 0 thrown away" in told


def test_every_slip_changes_a_task_that_it_fits() -> None:
    task = FAMILIES["count"](Draw(1), 1)
    assert all(slip(Draw(2), task) != task.cells for slip in SLIPS)
