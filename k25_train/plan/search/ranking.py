"""What a search found, as rows and overrides; torch-free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from k25_train.config.leaves import leaves, plain_values
from k25_train.config.schema import Config
from k25_train.plan.search.candidates import EXCHANGE, config_of, overrides_of, written
from k25_train.plan.search.reasons import line_of, nearness, why_group_loses, why_not_possible, why_slower
from k25_train.plan.search.search import SearchResult
from k25_train.plan.search.space import Group
from k25_train.plan.search.trial import Outcome, Trial
from k25_train.units import GB

COLUMNS = ("layout", "tokens/s/GPU", "MFU", "step s", "GB left", "why not")
"""Headings of `Ranking.rows`."""
MOST_NEAR = 12
"""Losers that are told one by one."""
GAVE_UP = "NOT COMPLETE: the search was given up, so there may be something better than what follows"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """What a search found, in words."""

    overrides: list[str]
    """What to add to the command line for the winner; nothing if nothing fits, or if it is configured."""
    rows: list[tuple[str, ...]]
    """The winner, those behind it, and the configured layout; texts of `COLUMNS`."""
    losers: list[tuple[str, str]]
    """Every other pp, vpp and ep, with the reason why it loses; the nearest first."""
    num_near: int
    """Of these, as many could be trained, and are near enough to be told one by one."""
    gave_up: str
    """What to know before anything else if the search was given up; empty if it was not."""
    notes: list[str]
    """What else is to be known."""


def ranking_of(result: SearchResult, compose: Callable[[Sequence[str]], Config] | None = None) -> Ranking:
    """A search in words.

    Args:
        result: what it found.
        compose: from overrides that are added to the command line to the configuration; it is asked whether
            the winner's lead to the winner. Without it they are told key by key.
    """
    winner, configured = result.winner, result.configured
    rows = [
        _row(trial, "" if trial is result.ranked[0] else why_slower(trial, result.ranked[0]))
        for trial in result.ranked
    ]
    note = ""
    if configured.outcome not in (Outcome.fits, Outcome.tight):
        note = why_not_possible(configured)
    elif winner is not None:
        note = why_slower(configured, winner)
    first, *rest = _row(configured, note)
    rows.append((f"as configured: {first}", *rest))
    every = sorted(result.groups, key=lambda group: nearness(group, result))
    losers = [(_name_of(group), why_group_loses(group, result)) for group in every]
    num_possible = sum(nearness(group, result) < float("inf") for group in every)
    return Ranking(
        overrides=[] if winner is None else pasted(result, winner, compose),
        rows=rows,
        losers=[each for each in losers if each[1]],
        num_near=min(MOST_NEAR, max(0, num_possible - (winner is not None))),
        gave_up="" if result.is_complete else GAVE_UP,
        notes=_notes(result),
    )


def pasted(
    result: SearchResult, trial: Trial, compose: Callable[[Sequence[str]], Config] | None = None
) -> list[str]:
    """Overrides that lead from what is configured to a candidate."""
    planner = result.planner
    config = config_of(planner.config, trial.candidate, planner.offer)
    short = overrides_of(planner.config, config, planner.offer)
    if compose is not None and compose(short) == config:
        return short
    before, after = dict(leaves(plain_values(planner.config))), dict(leaves(plain_values(config)))
    told = {EXCHANGE} if config.parallelism.cp > 1 else set()
    return [
        f"{key}={written(value)}" for key, value in after.items() if before.get(key) != value or key in told
    ]


def _name_of(group: Group) -> str:
    name = f"pp {group.pp}, vpp {group.vpp}, ep {group.ep}"
    return f"{name}, cp {group.cp}" if group.cp > 1 else name


def _row(trial: Trial, note: str) -> tuple[str, ...]:
    margin = "" if trial.margin_bytes is None else f"{trial.margin_bytes / GB:.1f}"
    if not trial.tokens_per_s_per_gpu:
        return line_of(trial), "", "", "", margin, note
    speed = f"{trial.tokens_per_s_per_gpu:,.0f}"
    return line_of(trial), speed, f"{trial.mfu:.1%}", f"{trial.step_s:,.2f}", margin, note


def _notes(result: SearchResult) -> list[str]:
    found = [f"{result.num_planned:,} of {result.num_candidates:,} candidates were planned"]
    if result.winner is not None and result.winner.outcome is Outcome.tight:
        found.append("nothing fits with a margin")
    if result.winner is None:
        found.append(_what_is_known(result))
    return found


def _what_is_known(result: SearchResult) -> str:
    """What can be said where no candidate is known that fits."""
    closest = result.closest
    near = "" if closest is None else f"the closest, {line_of(closest)}, {why_not_possible(closest)}"
    if not result.is_complete:
        fits = (
            "whether anything fits is not known: the search was given up before it had planned what may fit"
        )
        if result.configured.outcome in (Outcome.fits, Outcome.tight):
            fits = "what is configured fits; whether anything is faster is not known"
        return f"{fits}; {near}" if near else fits
    if near:
        return f"nothing fits; {near}"
    least = min(result.states.values(), default=0.0) / GB
    return f"nothing fits: a device would have to hold {least:.0f} GB at least" if least else "nothing fits"
