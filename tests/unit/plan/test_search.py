"""The search finds what trying everything finds, whatever its workers; what it proposes can be pasted."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k25_train.compose.offer import offer
from k25_train.compose.resolve import compose
from k25_train.plan.assumptions import AS_CONFIGURED
from k25_train.plan.memory.verdict import judge_memory
from k25_train.plan.offer import Offer
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.report.ranking import print_ranking
from k25_train.plan.search import best_first
from k25_train.plan.search.best_first import Found, Item
from k25_train.plan.search.candidates import activation_names, candidate_of, config_of, simplicity
from k25_train.plan.search.floor import KernelFloors
from k25_train.plan.search.opening import Open, Work
from k25_train.plan.search.ranking import pasted, ranking_of
from k25_train.plan.search.reasons import summed_up, why_group_loses, why_not_possible
from k25_train.plan.search.search import SearchResult, _Search, find_layouts, judge_quickly
from k25_train.plan.search.space import Candidate, Group, GroupKey, choices, groups, layouts_of, sharing_sizes
from k25_train.plan.search.trial import Outcome, Planner, Trial
from k25_train.plan.search.uses import uses_of
from k25_train.plan.search.workers import InProcess
from k25_train.plan.time.plan_step import plan_step
from parallel.config import ContextExchange, DepMode
from parallel.dispatcher import Dispatcher
from parallel.pipeline.schedule import schedule_of

TINY = ["experiment=smoke", "cluster.gpus_per_node=2", "parallelism.ep=1"]
LARGE = ["experiment=k25_pretrain_4k"]


@lru_cache(maxsize=1)
def few() -> Offer:
    """Two choices of activations: enough to choose."""
    every = offer()
    return replace(every, activations={name: every.activations[name] for name in ("keep", "k2")})


def planner_of(pipeline: PipelinePlan) -> Planner:
    return Planner(
        config=pipeline.config,
        assumptions=pipeline.assumptions,
        offer=few(),
        plan_step=plan_step,
        judge_memory=judge_quickly,
    )


def every_candidate(pipeline: PipelinePlan) -> list[Candidate]:
    found = choices(pipeline.config, activation_names(pipeline.config, few()), AS_CONFIGURED.vision_share)
    return [
        Candidate(layout, choice)
        for group in groups(pipeline.config)
        for layout in layouts_of(pipeline.config, group)
        for choice in found
    ]


def searched(pipeline: PipelinePlan, **options: Any) -> SearchResult:
    options = {"num_workers": 1, "most_s": 600.0, **options}
    return find_layouts(pipeline, few(), KernelFloors(), plan_step, judge_quickly, **options)


@lru_cache(maxsize=1)
def tiny() -> tuple[PipelinePlan, SearchResult]:
    pipeline = plan_pipeline(compose(TINY))
    return pipeline, searched(pipeline)


class TestBestFirst:
    """Branch and bound over trees of numbers."""

    @settings(max_examples=60, deadline=None)
    @given(
        st.lists(
            st.lists(st.tuples(st.integers(1, 12), st.floats(0.3, 1.0)), min_size=1, max_size=6),
            min_size=1,
            max_size=8,
        ),
        st.integers(1, 4),
        st.floats(0.0, 1.0),
    )
    def test_finds_the_best_of_each_group(
        self, tree: list[list[tuple[int, float]]], num_best: int, window: float
    ) -> None:
        # 1. Groups of leaves with a value and a bound below it.
        def leaves(group: int) -> list[Item]:
            return [
                Item(share * value, f"{group}-{at}", share * value, group, float(value))
                for at, (value, share) in enumerate(tree[group])
            ]

        def work(what: Any) -> Any:
            return leaves(what) if isinstance(what, int) else what

        items = [Item(0.0, "", 0.0, group, group) for group in range(len(tree))]
        found = best_first.search(
            items,
            InProcess(work),
            lambda _, answer: answer,
            num_best=num_best,
            window=window,
            gives_up=lambda _: False,
        )
        # 2. The same by trying all of them.
        best = sorted(min(value for value, _ in group) for group in tree)
        wanted = [each for each in best if each <= best[0] * (1 + window)][:num_best]
        assert sorted(value for value, _ in found.best.values())[: len(wanted)] == wanted
        assert found.is_complete

    def test_says_that_it_gave_up(self) -> None:
        items = [Item(0.0, str(at), 0.0, at, float(at)) for at in range(9)]
        found = best_first.search(
            items,
            InProcess(lambda what: what),
            lambda _, answer: answer,
            num_best=9,
            window=100.0,
            gives_up=lambda number: number >= 4,
        )
        assert not found.is_complete
        assert found.num_answers == 4

    def test_the_limit_is_that_of_the_last_one_wanted(self) -> None:
        found = Found(2, 1.0)
        for group, value in enumerate((1.5, 1.9, 1.0)):
            found.take(Item(0.0, "", 0.0, group, None), value)
        assert found.limit == 1.5
        found.window = 0.25
        assert found.limit == 1.25

    def test_equal_values_are_decided_by_name(self) -> None:
        found = Found(1, 0.0)
        found.take(Item(0.0, "b", 0.0, 0, None), 2.0)
        assert found.needs(Item(2.0, "a", 2.0, 0, None))
        assert not found.needs(Item(2.0, "c", 2.0, 0, None))


class TestTiny:
    """All of a small space."""

    def test_the_winner_is_that_of_trying_everything(self) -> None:
        pipeline, result = tiny()
        planner = planner_of(pipeline)
        trials = [planner.plan(candidate) for candidate in every_candidate(pipeline)]
        fitting = [trial for trial in trials if trial.outcome is Outcome.fits]
        best = min(fitting, key=lambda each: (float(f"{each.step_s:.9g}"), simplicity(each.candidate)))
        assert result.winner is not None
        assert result.winner.step_s == pytest.approx(best.step_s, rel=1e-8)
        assert simplicity(result.winner.candidate) == simplicity(best.candidate)
        assert result.num_candidates == len(trials)
        assert result.num_planned < len(trials)

    def test_is_at_least_as_fast_as_what_is_configured(self) -> None:
        _, result = tiny()
        assert result.winner is not None
        assert result.winner.step_s <= result.configured.step_s

    def test_overrides_give_the_very_plan(self) -> None:
        _, result = tiny()
        base = TINY
        assert result.winner is not None
        overrides = ranking_of(result, lambda more: compose([*base, *more])).overrides
        config = compose([*base, *overrides])
        assert plan_step(plan_pipeline(config)).step_s == result.winner.step_s

    def test_each_other_group_has_a_reason(self) -> None:
        _, result = tiny()
        told = ranking_of(result)
        assert len(told.losers) == len(result.groups) - 1
        assert all(reason for _, reason in told.losers)
        # Bounds speak where nothing of a group had to be planned.
        assert result.winner is not None
        slower = replace(
            result, floors=dict.fromkeys(result.floors, 3 * result.winner.step_s), ranked=[result.winner]
        )
        bounded = [why_group_loses(group, slower) for group in result.groups if group.key in result.floors]
        assert set(bounded) == {"", "at least 200.0% slower"}

    def test_workers_change_nothing(self) -> None:
        pipeline, alone = tiny()
        together = searched(pipeline, num_workers=2)
        assert together.ranked == alone.ranked
        assert together.trials == alone.trials
        assert ranking_of(together).losers == ranking_of(alone).losers


def drawn(number: int, overrides: Sequence[str]) -> tuple[Planner, list[Candidate]]:
    """Candidates far from each other."""
    pipeline = plan_pipeline(compose([*LARGE, *overrides]))
    every = every_candidate(pipeline)
    return planner_of(pipeline), every[:: max(1, len(every) // number)]


SHARED = [
    "cluster.nodes=64",
    "train.seq_len=32768",
    "train.global_batch_size=2048",
    "parallelism.cp=8",
    "model.rope.scaling_factor=8",
]
"""Sequences that ranks may share."""


@pytest.mark.parametrize("overrides", [["cluster.nodes=64"], SHARED], ids=" ".join)
def test_no_step_takes_less_than_its_bound(overrides: list[str]) -> None:
    planner, candidates = drawn(6, overrides)
    floors = KernelFloors()
    for candidate in candidates:
        layout, choice = candidate
        step_s = plan_step(planner.pipeline_of(candidate)).step_s
        assert floors.of_candidate(planner, candidate) <= step_s, candidate
        assert floors.of_layout(planner, layout, choice.activation) <= step_s, candidate


def test_late_gradients_of_weights_are_no_part_of_the_bound_where_exchanges_hide_them() -> None:
    """As few micro-batches as there can be, so that most passes run alone; nothing around them counts."""
    sizes = ["cluster.nodes=512", "train.global_batch_size=4096", "activation=keep"]
    pipeline = plan_pipeline(compose([*LARGE, *sizes]))
    planner, floors = planner_of(pipeline), KernelFloors()
    candidate = candidate_of(pipeline.config, planner.offer)
    assert candidate.layout.delays and pipeline.num_micro_batches == 16
    passes_s = plan_step(planner.pipeline_of(candidate)).timeline.makespan_s
    bound_s = floors.of_layout(planner, candidate.layout, candidate.choice.activation)
    assert 0.7 * passes_s < bound_s <= passes_s


@pytest.mark.parametrize("overrides", [["cluster.nodes=64"], SHARED], ids=" ".join)
def test_no_device_holds_less_than_its_bound(overrides: list[str]) -> None:
    planner, candidates = drawn(12, overrides)
    floors = KernelFloors()
    for candidate in candidates:
        held = judge_memory(planner.pipeline_of(candidate), seeks_remedy=False).device_bytes
        assert floors.states_bytes(planner, candidate) <= held
        # Close enough to leave out what does not fit without planning it, but for a coupled tower's images.
        least = 0.8 if candidate.choice.mode is DepMode.decoupled or overrides is not SHARED else 0.7
        assert least * held < floors.device_bytes(planner, candidate) <= held, candidate


def test_candidates_are_what_the_overrides_compose() -> None:
    """Whatever is proposed passes the checks of training, and is the configuration that was planned."""
    base = [*LARGE, "cluster.nodes=64"]
    planner, candidates = drawn(9, ["cluster.nodes=64"])
    num_legal = 0
    for candidate in candidates:
        config = config_of(planner.config, candidate, planner.offer)
        if planner.offer.find_problems(config) or planner.offer.find_plan_problems(config):
            continue
        num_legal += 1
        assert candidate_of(config, planner.offer) == candidate
        result = SearchResult(
            planner=planner,
            configured=Trial(candidate=candidate, outcome=Outcome.fits),
            ranked=[],
            closest=None,
            groups=[],
            floors={},
            states={},
            trials=[],
            num_candidates=0,
            num_planned=0,
            is_complete=True,
        )
        trial = Trial(candidate=candidate, outcome=Outcome.fits)
        for overrides in (
            pasted(result, trial),
            pasted(result, trial, lambda more: compose([*base, *more])),
        ):
            assert compose([*base, *overrides]) == config
    assert num_legal > 3


def test_sequences_are_shared_where_they_are_long() -> None:
    """A rank keeps as many tokens as it has in the 4K stage."""
    config = plan_pipeline(compose(LARGE)).config
    assert sharing_sizes(config) == [1]
    long = plan_pipeline(compose([*LARGE, *SHARED])).config
    assert sharing_sizes(long) == [1, 2, 4, 8]
    found = {(layout.cp, layout.exchange) for layout in layouts_of(long, Group(16, 2, 16, 4, ""))}
    assert found == {(4, exchange) for exchange in ContextExchange}
    assert all(group.why_not for group in groups(long) if 512 // group.pp % group.cp)


def test_experts_overlap_wherever_training_can_do_so() -> None:
    config = plan_pipeline(compose(LARGE)).config
    for pp, vpp, ep, expected in ((1, 1, 16, True), (4, 1, 16, False), (4, 2, 16, True), (4, 2, 1, False)):
        layouts = list(layouts_of(config, Group(pp, vpp, ep, 1, "")))
        assert any(layout.overlaps for layout in layouts) is expected, (pp, vpp, ep)
        assert all(layout.overlaps for layout in layouts if layout.delays)


def test_sms_are_those_of_the_dispatcher_that_they_were_configured_for() -> None:
    more = ("parallelism.dispatcher=hybridep", "parallelism.dispatcher_sms=24")
    config = plan_pipeline(compose([*LARGE, *more])).config
    own = candidate_of(config, few())
    for dispatcher, expected in ((Dispatcher.hybridep, 24), (Dispatcher.deepep, None)):
        candidate = own._replace(layout=own.layout._replace(dispatcher=dispatcher))
        assert config_of(config, candidate, few()).parallelism.dispatcher_sms == expected


@pytest.mark.parametrize(("pp", "vpp", "number"), [(1, 1, 7), (4, 3, 48), (4, 2, 18), (2, 5, 6), (8, 1, 20)])
def test_uses_are_counted_without_going_through_all_passes(pp: int, vpp: int, number: int) -> None:
    overlaps = pp == 1 or vpp > 1
    for stage, uses in enumerate(uses_of(pp, vpp, number, overlaps=overlaps)):
        group = pp if vpp > 1 else number
        while vpp > 1 and number % group and number % group < pp:
            group += 1
        passes = schedule_of(pp, vpp, number, group, stage, overlaps=overlaps)
        pairs = sum(each.overlaps_next for each in passes)
        assert sum(uses.values()) == len(passes) - pairs
        assert sum(times for (ahead, back), times in uses.items() if None not in (ahead, back)) == pairs


def test_nodes_that_nothing_divides_have_reasons() -> None:
    config = compose(LARGE)
    config = replace(config, cluster=replace(config.cluster, nodes=67))
    assert all("do not divide" in group.why_not for group in groups(config))


def test_too_few_micro_batches_are_told() -> None:
    config = compose([*LARGE, "cluster.nodes=512"])
    config = replace(config, train=replace(config.train, global_batch_size=1024))
    reasons = {group.why_not for group in groups(config) if group.pp == 16 and group.vpp == 2}
    assert reasons == {"needs 16 micro-batches per replica, and there are 4"}


def test_nothing_fits_a_small_cluster() -> None:
    config = compose([*LARGE, "cluster.nodes=32"])
    small = replace(config, cluster=replace(config.cluster, nodes=1))
    result = searched(_unchecked(small))
    assert result.winner is None
    assert "nothing fits" in ranking_of(result).notes[-1]
    assert all(reason for _, reason in ranking_of(result).losers)


def test_the_time_of_a_search_is_that_of_all_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is found in time, what leaves no margin is not looked for as long again."""
    starts: list[bool] = []
    run = _Search.run

    def noted(self: _Search, *given: Any) -> SearchResult:
        starts.append(self.is_tight)
        return run(self, *given)

    monkeypatch.setattr(_Search, "run", noted)
    config = compose([*LARGE, "activation=keep", "optim.offload=none"])
    result = searched(plan_pipeline(config), most_s=0.0)
    assert starts == [False]
    assert not result.ranked and not result.is_complete
    assert [trial.candidate for trial in result.trials] == [candidate_of(config, few())]
    note = ranking_of(result).notes[-1]
    assert note.startswith("whether anything fits is not known") and "the closest, pp 16" in note
    assert "nothing fits" not in " ".join(ranking_of(result).notes)


def test_what_is_configured_is_planned_whatever_the_time() -> None:
    pipeline, _ = tiny()
    result = searched(pipeline, most_s=0.0)
    assert not result.is_complete and result.num_planned == 1
    assert result.winner is not None
    assert result.winner.candidate == candidate_of(pipeline.config, few())
    # A layout of layers of one's own is no candidate, but its plan is known.
    alone = ranking_of(replace(result, ranked=[], trials=[]))
    assert alone.notes[-1].startswith("what is configured fits; whether anything is faster is not known")
    told = {reason for _, reason in alone.losers}
    assert not any("does not fit" in reason for reason in told)


def test_a_group_is_held_against_time_before_memory() -> None:
    """What is known to be slower needs no bound on its memory, which takes longest to find."""
    pipeline, _ = tiny()
    asked: list[GroupKey] = []

    class Noted(KernelFloors):
        def device_bytes(self, planner: Planner, candidate: Candidate) -> float:
            asked.append(candidate.layout.group)
            return super().device_bytes(planner, candidate)

    work = Work(planner_of(pipeline), Noted(), is_tight=False)
    num_possible = 0
    for group in groups(pipeline.config):
        if group.why_not:
            continue
        (bounded,) = work(Open(group, 0.0)).items
        assert not asked and bounded.bound > 0
        layouts = work(bounded.what).items
        assert asked and all(bounded.bound <= each.bound for each in layouts)
        asked.clear()
        num_possible += 1
    assert num_possible > 1


def _unchecked(config: Any) -> PipelinePlan:
    """The plan of a layout that a node has ranks for."""
    sizes = replace(config.parallelism, pp=8, vpp=1, ep=1, overlap_expert_comm=False, delay_wgrad=False)
    return plan_pipeline(replace(config, parallelism=sizes))


def test_reasons_are_summed_up_by_kind() -> None:
    reasons = [
        "at least 2.1% slower",
        "needs 16 micro-batches",
        "at least 1,013.5% slower",
        "at least 4.0% slower",
    ]
    assert summed_up(reasons) == [
        "3 others: at least 2.1 to 1,013.5% slower",
        "1 other: needs 16 micro-batches",
    ]
    assert summed_up([]) == []


def test_a_search_that_is_given_up_says_so_first(capsys: pytest.CaptureFixture[str]) -> None:
    _, result = tiny()
    print_ranking(ranking_of(replace(result, is_complete=False)))
    assert capsys.readouterr().out.startswith("NOT COMPLETE")
    print_ranking(ranking_of(result))
    told = capsys.readouterr().out
    assert "NOT COMPLETE" not in told
    assert len(told.splitlines()) < 40


def test_reasons_name_what_is_missing() -> None:
    _, result = tiny()
    assert result.winner is not None
    lacking = replace(result.winner, outcome=Outcome.too_large, margin_bytes=-3e9, stage=1, note="states")
    assert why_not_possible(lacking) == "does not fit by 3.0 GB on stage 1, because of states"
