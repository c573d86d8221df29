"""Why layouts lose, one line each; torch-free."""

import re
from collections.abc import Iterable

from k25_train.plan.cause import Cause
from k25_train.plan.memory.room import MARGIN_SHARE
from k25_train.plan.search.search import SearchResult
from k25_train.plan.search.space import Group
from k25_train.plan.search.trial import Outcome, Trial
from k25_train.units import GB

EXPOSED = {
    "pipeline's idle time": (Cause.bubble,),
    "exchanges with experts that nothing hides": (Cause.experts,),
    "messages between stages": (Cause.pipeline,),
    "gradients and weights of replicas": (Cause.data_parallel,),
    "recomputation": (Cause.recompute,),
    "activations stored in FP8": (Cause.storage,),
    "copies to the host": (Cause.offload,),
    "the vision encoder": (Cause.encoder,),
    "the optimizer": (Cause.optimizer,),
    "small kernels": (Cause.compute, Cause.memory_bound, Cause.host),
}
"""What a layout can lose by -> parts of its step."""

_UNSEEN = "the search was given up before all of it was seen"


def why_slower(trial: Trial, winner: Trial) -> str:
    """By how much a layout that fits is slower than the winner, and what that is due to."""
    share = trial.step_s / winner.step_s - 1
    lost = {name: trial.seconds_of(*causes) - winner.seconds_of(*causes) for name, causes in EXPOSED.items()}
    what = max(lost, key=lost.__getitem__)
    if lost[what] <= 0:
        return f"{share:.1%} slower"
    return f"{share:.1%} slower: {what}, {lost[what]:.2f} s more"


def why_not_possible(trial: Trial) -> str:
    """Why a candidate cannot be trained, or leaves too little."""
    if trial.outcome is Outcome.illegal:
        return trial.note
    margin = trial.margin_bytes
    if margin is None or trial.note == "host memory":
        return "does not fit: too little host memory"
    if trial.outcome is Outcome.tight:
        return f"is tight: {margin / GB:.1f} GB left of stage {trial.stage}"
    return f"does not fit by {-margin / GB:.1f} GB on stage {trial.stage}, because of {trial.note}"


def why_group_loses(group: Group, result: SearchResult) -> str:
    """Why a pp, vpp and ep is not the winner's; empty for the winner's own."""
    key, winner = group.key, result.winner
    if group.why_not:
        return group.why_not
    if winner is not None and winner.candidate.layout.group == key:
        return ""
    # 1. What was planned.
    own = [
        trial
        for trial in result.trials
        if trial.candidate.layout.group == key and trial.outcome is not Outcome.fits
    ]
    # What is missing the least comes first.
    own.sort(key=lambda trial: float("inf") if trial.margin_bytes is None else -trial.margin_bytes)
    fitting = [trial for trial in result.ranked if trial.candidate.layout.group == key]
    if fitting and winner is not None:
        return why_slower(fitting[0], winner)
    # 2. What its bound says; and what had to be planned, and was not possible.
    floor, states = result.floors.get(key), result.states.get(key, 0.0)
    if floor is None:
        return "not looked at"
    if floor == float("inf"):
        limit = (result.planner.config.cluster.gpu_memory_gb or 0.0) * GB
        may_fill = limit * (1 if winner is None or winner.outcome is Outcome.tight else 1 - MARGIN_SHARE)
        what = f"{states / GB:.0f} GB at least, and {may_fill / GB:.1f} of {limit / GB:.1f} may be filled"
        return f"does not fit: {what}, whatever is done with activations"
    if winner is None:
        return why_not_possible(own[0]) if own else _UNSEEN if not result.is_complete else "does not fit"
    if floor > winner.step_s:
        return f"at least {floor / winner.step_s - 1:.1%} slower"
    rest = "what fits is slower" if result.is_complete else _UNSEEN
    return f"{why_not_possible(own[0])}; {rest}" if own else rest


def nearness(group: Group, result: SearchResult) -> float:
    """How many seconds a step of a group's layouts takes, or takes at least; infinite if there is none."""
    key = group.key
    fitting = [trial.step_s for trial in result.ranked if trial.candidate.layout.group == key]
    return min(fitting, default=result.floors.get(key, float("inf")))


def summed_up(reasons: Iterable[str]) -> list[str]:
    """A line for each kind of reason: how many there are, and the least and most of each number in it. The
    most frequent first."""
    kinds: dict[tuple[str, ...], list[list[str]]] = {}
    for reason in reasons:
        kinds.setdefault(tuple(NUMBER.split(reason)), []).append(NUMBER.findall(reason))
    found = []
    for words, numbers in sorted(kinds.items(), key=lambda kind: -len(kind[1])):
        text = words[0]
        for column, after in zip(zip(*numbers, strict=True), words[1:], strict=True):
            least, most = min(column, key=_value), max(column, key=_value)
            text += (least if least == most else f"{least} to {most}") + after
        found.append(f"{len(numbers):,} other{'s' * (len(numbers) > 1)}: {text}")
    return found


NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def line_of(trial: Trial) -> str:
    """A candidate in a few words."""
    layout, choice = trial.candidate
    words = [f"pp {layout.pp}", f"vpp {layout.vpp}", f"ep {layout.ep}"]
    if layout.exchange is not None:
        words.append(f"cp {layout.cp} by {layout.exchange.value}")
    words += [f"micro-batch {layout.micro_batch_size}", layout.dispatcher.value]
    if layout.overlaps:
        words.append("overlapped, weights' gradients later" if layout.delays else "overlapped")
    words += [f"activation={choice.activation}", f"optimizer {_PLACES[choice.offload.value]}"]
    words.append(choice.schedule.value if choice.mode.value == "decoupled" else choice.mode.value)
    return ", ".join(words)


_PLACES = {"none": "on the device", "cpu": "in the host"}
