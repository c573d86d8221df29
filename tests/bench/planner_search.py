"""Search for layouts of `k25_1t` at 4,096 GPUs: how long it takes, and whether it finds the best.

    python -m tests.bench.planner_search [SECTION.KEY=VALUE ...]

Prints the ranking, candidates that were planned and those that bounds left out, and last the seconds, next to
their bar of 60 on two cores. Also missed is the bar if the search gives up, if one of a sample of candidates
that are planned without bounds is faster than the winner and fits, or if the configured layout is.
"""

import random
import sys
import time
from collections.abc import Sequence

from k25_train.compose.offer import offer
from k25_train.compose.resolve import compose
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.ranking import Progress, print_ranking
from k25_train.plan.search.candidates import activation_names
from k25_train.plan.search.ranking import ranking_of
from k25_train.plan.search.search import SearchResult, search_layouts
from k25_train.plan.search.space import Candidate, choices, groups, layouts_of
from k25_train.plan.search.trial import Outcome

ARGUMENTS = ("experiment=k25_pretrain_4k", "cluster.nodes=512")
BAR_S = 60.0
NUM_WORKERS = 2
NUM_SAMPLED = 60
"""Candidates that are planned without bounds."""


def sampled(result: SearchResult) -> list[Candidate]:
    """Candidates drawn from the whole space, the same in every run."""
    planner = result.planner
    names = activation_names(planner.config, planner.offer)
    every = choices(planner.config, names, planner.assumptions.vision_share)
    layouts = [layout for group in groups(planner.config) for layout in layouts_of(planner.config, group)]
    draw = random.Random(0)
    return [Candidate(draw.choice(layouts), draw.choice(every)) for _ in range(NUM_SAMPLED)]


def main(overrides: Sequence[str]) -> int:
    """Print the ranking and the figure; 1 if a bar is missed."""
    arguments = [*ARGUMENTS, *overrides]
    pipeline = plan_pipeline(compose(arguments))
    # 1. The search, from choices to the ranking.
    start_s = time.monotonic()
    result = search_layouts(pipeline, offer(), num_workers=NUM_WORKERS, told=Progress())
    ranking = ranking_of(result, lambda more: compose([*arguments, *more]))
    seconds = time.monotonic() - start_s
    print_ranking(ranking)
    # 2. What it found, next to what is planned without bounds.
    winner, missed = result.winner, []
    if winner is None:
        missed.append("nothing fits")
    else:
        trials = [result.planner.plan(candidate) for candidate in sampled(result)]
        fitting = [trial for trial in trials if trial.outcome is Outcome.fits]
        faster = [trial for trial in [*fitting, result.configured] if trial.step_s < winner.step_s]
        print(
            f"{len(fitting)} of {NUM_SAMPLED} candidates drawn fit; {len(faster)} are faster than the winner"
        )
        missed += [f"faster: {trial.candidate}" for trial in faster]
        config = compose([*arguments, *ranking.overrides])
        again_s = result.planner.plan_step(plan_pipeline(config)).step_s
        if again_s != winner.step_s:
            missed.append(f"pasted, the winner takes {again_s} s, not {winner.step_s}")
    if not result.is_complete:
        missed.append("the search was given up")
    if seconds > BAR_S:
        missed.append("too slow")
    # 3. The figure.
    for each in missed:
        print(f"MISSED: {each}")
    num_planned, number = result.num_planned, result.num_candidates
    print(f"{1e3 * seconds / max(1, num_planned):.0f} ms a plan; {number - num_planned:,} left out by bounds")
    print(
        f"{seconds:.0f} s for {number:,} candidates of {pipeline.config.world_size:,} GPUs (bar {BAR_S:.0f})"
    )
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
