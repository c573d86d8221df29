"""One trace: a task's cells run in a session, and the conversation that this makes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from k25_train.data.traces.draw import Draw
from k25_train.data.traces.families.registry import FAMILIES
from k25_train.data.traces.session import Session
from k25_train.data.traces.slips import SLIPS
from k25_train.data.traces.task import Cell, NoValueError, Task, Value, value_of

TOOL = "ipython"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "Run Python in a session that stays. Images lie in its folder.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string"}},
                "required": ["code"],
            },
        },
    }
]
"""The one tool of a trace, as OpenAI's API declares it. Its name in K2.5's data is not disclosed: ours."""
TOLERANCE = 1e-9
"""Of an answer that is no whole number."""
_TASK, _SPLIT = 0, 1
"""What a draw is for, the last part of its key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What traces are asked for."""

    seed: int = 0
    """Of everything that is drawn."""
    families: tuple[str, ...] = tuple(FAMILIES)
    """They take turns."""
    difficulties: tuple[int, ...] = (1, 2, 3)
    """Drawn evenly."""
    slips: float = 0.15
    """Share of traces in which the assistant makes a mistake first and corrects it. Our choice."""
    heldout: float = 0.04
    """Share that is held out. Our choice."""


@dataclass(frozen=True, slots=True)
class Trace:
    """A conversation, or why there is none."""

    conversation: dict[str, Any] | None
    """In the form of OpenAI's API; `trace` says what it was made of."""
    discarded: str
    """The reason, in few words that are counted; empty for a trace."""
    is_heldout: bool


def make_trace(options: TraceOptions, number: int, session: Session) -> Trace:
    """The trace of a number from 0 on; the same whatever was made before it and by whom."""
    # 1. The task, and perhaps a mistake.
    draw = Draw(options.seed, number, _TASK)
    name = options.families[number % len(options.families)]
    difficulty = draw.of(options.difficulties)
    task = FAMILIES[name](draw, difficulty)
    cells = draw.of(SLIPS)(draw, task) if draw.chance(options.slips) else task.cells
    num_mistakes = int(cells != task.cells)

    # 2. It is run; what its last cell says has to be the truth.
    session.begin(task.images)
    messages: list[dict[str, Any]] = [{"role": "user", "content": task.question}]
    outputs = [_call(session, each, turn, messages) for turn, each in enumerate(cells)]
    session.finish()
    discarded = _fault_of(task, outputs, num_mistakes)
    is_heldout = Draw(options.seed, number, _SPLIT).chance(options.heldout)
    if discarded:
        return Trace(None, discarded, is_heldout)

    # 3. The answer states what was printed.
    final = task.answer(value_of(outputs[-1].text))
    closing = {"role": "assistant", "reasoning_content": task.conclusion, "content": final}
    facts = {
        "family": name,
        "difficulty": difficulty,
        "seed": options.seed,
        "number": number,
        "answer": task.truth,
        "mistakes": num_mistakes,
    }
    return Trace({"messages": [*messages, closing], "tools": TOOLS, "trace": facts}, "", is_heldout)


@dataclass(frozen=True, slots=True)
class _Ran:
    text: str
    failed: bool


def _call(session: Session, each: Cell, turn: int, messages: list[dict[str, Any]]) -> _Ran:
    """Run a cell; adds the call and its result to the messages."""
    output = session.run(each.code)
    name = f"functions.{TOOL}:{turn}"
    arguments = json.dumps({"code": each.code}, ensure_ascii=False)
    call = {"id": name, "type": "function", "function": {"name": TOOL, "arguments": arguments}}
    messages += [
        {"role": "assistant", "reasoning_content": each.thought, "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": name, "content": output.text},
    ]
    return _Ran(output.text, output.failed)


def _fault_of(task: Task, outputs: Sequence[_Ran], num_mistakes: int) -> str:
    """Why a trace is thrown away; empty for a good one."""
    if sum(each.failed for each in outputs) != num_mistakes:
        return "a cell failed" if not num_mistakes else "other cells failed than were to"
    try:
        found = value_of(outputs[-1].text)
    except NoValueError:
        return "no value"
    return "" if _equal(found, task.truth) else "wrong answer"


def _equal(found: Value, truth: Value) -> bool:
    if isinstance(found, float) or isinstance(truth, float):
        numbers = (int, float)
        same_kind = isinstance(found, numbers) and isinstance(truth, numbers)
        return same_kind and abs(found - truth) <= TOLERANCE  # type: ignore[operator]
    return type(found) is type(truth) and found == truth
