"""What a journal says in numbers: pure, one pass over its records."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from k25_train.environments.base import Status, Verdict
from k25_train.rollout.journal_state import JournalState
from k25_train.rollout.records import Record


@dataclass(slots=True)
class Tally:
    """Numbers of a run, as far back as its journal goes."""

    states: Counter[str] = field(default_factory=Counter)
    """State -> responses: `trained`, `judged`, `ended` (without a verdict), `begun`, `waiting`."""
    endings: Counter[str] = field(default_factory=Counter)
    """Why responses ended -> how many."""
    failures: Counter[str] = field(default_factory=Counter)
    """Cause -> how often: of attempts that started over, and of verdicts that found the response at fault."""
    numbers: Counter[str] = field(default_factory=Counter)
    """What is counted -> how much: groups, turns, tokens, tool calls, images, attempts that started over."""
    seconds: Counter[str] = field(default_factory=Counter)
    """Phase -> seconds, where records have them: `tool`."""


def tally(records: Iterable[Record], state: JournalState) -> Tally:
    """Take all records in; `state` begins empty, and has them then."""
    found, sizes, trained = Tally(), dict[int, int](), set[int]()
    for record in records:
        state.apply(record)
        header = record.header
        match header["kind"]:
            case "admitted":
                sizes[header["group"]] = header["size"]
            case "segment":
                # A turn that was interrupted goes on in a segment in which nothing is observed.
                is_turn = "observed_ids" not in record.arrays or len(record.arrays["observed_ids"]) > 0
                found.numbers["turns"] += is_turn
                found.numbers["tokens"] += len(record.arrays["token_ids"])
            case "medium":
                found.numbers["images"] += 1
            case "observed":
                found.numbers["tool calls"] += header.get("calls", 0)
                found.numbers["unreadable calls"] += bool(header.get("fault"))
                found.seconds["tool"] += header.get("seconds", 0.0)
            case "restarted":
                found.numbers["attempts that started over"] += 1
                found.failures[_kind(header["cause"])] += 1
            case "ended":
                found.endings[header["why"]] += 1
            case "judged":
                verdict = Verdict.from_json(header["verdict"])
                if verdict.status is not Status.SCORED:
                    found.failures[verdict.kind] += 1
            case "consumed":
                trained.update(header["groups"])
    found.numbers["groups"] = len(sizes)
    found.states["trained"] = sum(size for number, size in sizes.items() if number in trained)
    for group in state.open.values():
        for response in group.responses:
            found.states[_state(response.is_judged, response.is_finished, bool(response.branches))] += 1
    return found


def _state(is_judged: bool, is_finished: bool, has_begun: bool) -> str:
    if is_judged:
        return "judged"
    return "ended" if is_finished else "begun" if has_begun else "waiting"


def _kind(cause: str) -> str:
    return cause.partition(":")[0][:60]
