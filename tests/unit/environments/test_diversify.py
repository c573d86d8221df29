"""Tasks vary with their key alone and stay what they are; instructions are checked in every answer."""

from dataclasses import replace

import pytest

from k25_train.environments.base import Task, failed, scored
from k25_train.environments.diversify.diversify import diversified
from k25_train.environments.diversify.texts import BOXED, LAST_LINE, TOOLS
from k25_train.environments.instructions.instructions import followed, instructed, with_instructions
from k25_train.environments.instructions.kinds import KINDS
from k25_train.environments.shown_tools import ShownTools
from k25_train.environments.toolsets.browser import LOOK, OPEN
from k25_train.environments.toolsets.files import Files
from k25_train.environments.toolsets.python import PYTHON
from k25_train.environments.toolsets.search.tools import Search
from k25_train.environments.toolsets.shell import SHELL


def task(number: int, **more: object) -> Task:
    """A task with tools."""
    made = Task(
        key=f"t/{number}",
        family="t",
        messages=({"role": "user", "content": "Use the shell."},),
        judge="answer",
        reference="7",
        environment="tools",
        setup={"toolsets": {"shell": {}, "python": {}, "files": {}}},
    )
    return replace(made, **more)  # type: ignore[arg-type]


def test_a_task_is_varied_alike_whenever_it_is_made_and_differently_from_others() -> None:
    varied = [diversified(task(number)) for number in range(200)]
    assert varied == [diversified(task(number)) for number in range(200)]
    assert len({str(each.messages) + str(each.setup) for each in varied}) > 150
    assert {each.messages[0]["role"] for each in varied} == {"system", "user"}
    assert len({str(each.setup["tools"].get("python")) for each in varied}) == 1 + len(TOOLS["python"])


def test_what_is_asked_and_how_it_is_judged_stays() -> None:
    for number in range(100):
        made, varied = task(number), diversified(task(number))
        assert (varied.key, varied.judge, varied.reference) == (made.key, made.judge, made.reference)
        assert varied.messages[-1]["content"].startswith("Use the shell.")
        assert varied.setup["toolsets"].keys() == made.setup["toolsets"].keys()
        # The prompt speaks of it.
        assert "shell" not in varied.setup["tools"]
        plain = diversified(replace(made, judge="unit_tests", environment="one_turn", setup={}))
        assert plain.setup == {} and plain.messages[-1]["content"] == "Use the shell."
    said = str([diversified(task(number)).messages for number in range(300)])
    assert all(text in said.replace("\\\\", "\\") for text in (*BOXED.values(), *LAST_LINE.values()))


def test_every_other_name_is_of_a_tool_and_its_arguments_and_no_two_are_alike() -> None:
    tools = (SHELL, PYTHON, OPEN, LOOK, *Files.declarations, *Search.declarations)
    known = {each["function"]["name"]: each["function"]["parameters"]["properties"] for each in tools}
    assert TOOLS.keys() <= known.keys()
    for tool, others in TOOLS.items():
        assert all(each.get("arguments", {}).keys() <= known[tool].keys() for each in others)
    names = [each["name"] for others in TOOLS.values() for each in others]
    assert len({*names, *known}) == len(names) + len(known)
    shown = ShownTools(tools, {tool: others[0] for tool, others in TOOLS.items()})
    assert len(shown.declarations) == len(tools)


FOLLOWS = {
    "begins_with": ({"word": "well"}, "Well, so it is.", "So, well."),
    "at_least": ({"count": 3}, "one two three", "one two"),
    "at_most": ({"count": 2}, "one two", "one two three"),
    "bullets": ({"count": 2}, "So:\n- a\n- b", "- a"),
    "heading": ({"text": "Result"}, "## Result\nIt is.", "Result"),
    "mentions": ({"word": "copper", "count": 2}, "Copper and copper", "coppery copper"),
    "avoids": ({"word": "the"}, "a theory", "The theory"),
    "no_commas": ({}, "It is so.", "It, too."),
    "exclamation": ({}, "So!", "So!!"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_instructions_hold_or_do_not(kind: str) -> None:
    given, right, wrong = FOLLOWS[kind]
    instruction = {"kind": kind, **given}
    assert followed([instruction], f"{right}\nAnswer: 1,2,3") == [True]
    assert followed([instruction], f"{wrong}\nAnswer: 1,2,3") == [False]
    assert followed([instruction], f"{right}\n```python\nthe, the!\n- a\n```\n") == [True]
    assert str(given.get("word", given.get("text", given.get("count", "")))) in KINDS[kind].say(given)


def test_instructions_are_drawn_by_the_key_said_and_never_at_odds() -> None:
    for number in range(100):
        made = instructed(task(number), 3)
        assert made == instructed(task(number), 3)
        groups = [KINDS[each["kind"]].group for each in made.instructions]
        assert 1 <= len(groups) == len(set(groups)) <= 3
        said = made.messages[-1]["content"]
        assert all(KINDS[each["kind"]].say(each) in said for each in made.instructions)
        assert said.endswith(LAST_LINE["en"])
    assert instructed(task(1, judge="ocr"), 3).instructions == ()
    assert instructed(task(1), 0) == task(1)


def test_a_right_answer_earns_the_share_that_it_follows_and_a_wrong_one_nothing() -> None:
    made = task(1, instructions=({"kind": "no_commas"}, {"kind": "exclamation"}))
    verdict = with_instructions(made, "So!\nAnswer: 7", scored(1.0, {}))
    assert (verdict.reward, verdict.parts["instructions"], verdict.accuracy) == (1.0, 1.0, 1.0)
    verdict = with_instructions(made, "So.\nAnswer: 7", scored(1.0, {}))
    assert (verdict.reward, verdict.parts["instructions"], verdict.accuracy) == (0.5, 0.5, 1.0)
    assert verdict.kind == "instructions missed"
    assert with_instructions(made, "So!", scored(0.0, {})).reward == 0.0
    assert with_instructions(made, "So!", failed("empty: nothing")) == failed("empty: nothing")
    assert with_instructions(task(1), "", scored(1.0, {})) == scored(1.0, {})
