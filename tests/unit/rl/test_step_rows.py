"""What a step trains on: what the policy drew, once, and nothing that it only saw."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from k25_train.environments.base import Task, scored
from k25_train.rl.figures import group_figures
from k25_train.rl.step_rows import step_rows, toggle_group
from k25_train.rl.toggle import NoToggle
from k25_train.rollout.branches import Segment
from k25_train.rollout.engines.base import FinishReason, VersionSpan
from k25_train.rollout.response_records import digest_of
from k25_train.rollout.trajectory import Ended, Group, Response
from k25_train.rollout.turns import ROOT, Place
from tests.helpers.scripted_rollouts import algorithm_config

IMAGE = b"an image"


def segment(after: Place, seen: Sequence[int], drawn: Sequence[int], media: tuple[str, ...] = ()) -> Segment:
    return Segment(
        round=0, after=after, observed_ids=np.array(seen, np.int32), media=media,
        token_ids=np.array(drawn, np.int32), logprobs=-np.arange(1, len(drawn) + 1, dtype=np.float32),
        spans=(VersionSpan(4, 0, len(drawn)),), finish_reason=FinishReason.stop,
    )  # fmt: skip


def response(reward: float, *segments: Segment) -> Response:
    made = Response(ended=Ended.STOP, verdict=scored(reward, {}))
    for each in segments:
        made.add(each)
    return made


@pytest.fixture
def group() -> Group:
    """One response of two turns and a fork within its first answer's prompt, and one of one turn."""
    first = response(
        1.0,
        segment(ROOT, [1, 2], [10, 11]),
        segment(Place(0, 4), [3, 9, 9, 3], [12], (digest_of(IMAGE),)),
        segment(Place(0, 4), [5], [13, 14]),
    )
    second = response(0.0, segment(ROOT, [1, 2], [15]))
    first.answered(0, 2, is_unread=False)
    return Group(
        number=0, task="t/0", epoch=0, version=4, stamp={"phase": "free"}, responses=[first, second],
        media={digest_of(IMAGE): IMAGE},
    )  # fmt: skip


TASK = Task(key="t/0", family="t", messages=(), judge="none")


def test_each_drawn_token_trains_once_and_observed_ones_have_no_loss(group: Group) -> None:
    rows = step_rows([group], [TASK], NoToggle(), algorithm_config(), version=4)
    assert rows.names == ("t/0#0, branch 0", "t/0#0, branch 1", "t/0#1")
    assert rows.responses.tolist() == [0, 0, 1]
    parts = [slice(*pair) for pair in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]
    assert [rows.tokens[part].tolist() for part in parts] == [
        [1, 2, 10, 11, 3, 9, 9, 3, 12], [1, 2, 10, 11, 5, 13, 14], [1, 2, 15]
    ]  # fmt: skip
    assert [rows.tokens[part][rows.generated[part]].tolist() for part in parts] == [
        [10, 11, 12],
        [13, 14],
        [15],
    ]
    assert rows.media == ((IMAGE,), (), ())
    # N = 6 drawn tokens, of one prompt: each weighs 1, whatever was observed.
    assert rows.policy_weights[rows.generated].tolist() == [1.0] * 6
    assert not rows.policy_weights[~rows.generated].any() and not rows.advantages[~rows.generated].any()
    assert rows.advantages[rows.generated].tolist() == [0.5] * 5 + [-0.5]
    assert (rows.versions[rows.generated] == 4).all() and (rows.versions[~rows.generated] == -1).all()


def test_what_branches_share_is_drawn_once_for_budgets_and_figures(group: Group) -> None:
    assert toggle_group(group, TASK).num_tokens == [5, 1]
    found = group_figures([group], 5)
    assert found["response_tokens"] == 3.0 and found["rollout/tokens"] == 6
    assert found["turns"] == 2.0 and found["tool_calls"] == 1.0 and found["observed_tokens"] == 2.5
    assert found["staleness"] == 0.0 and found["length_share"] == found["timeout_share"] == 0.0


def test_a_place_that_there_is_not_is_refused() -> None:
    made = response(1.0, segment(ROOT, [1, 2], [10, 11]))
    with pytest.raises(ValueError, match="token 5 of a branch of 4"):
        made.add(segment(Place(0, 5), [3], [12]))
    with pytest.raises(IndexError):
        made.add(segment(Place(3, 1), [3], [12]))


def test_a_turn_stays_open_whatever_other_branches_do() -> None:
    made = response(1.0, segment(ROOT, [1, 2], [10, 11]))
    made.add(replace(segment(Place(0, 2), [3], [12]), finish_reason=FinishReason.aborted))
    made.add(segment(Place(0, 4), [4], [13]))
    assert made.open_branch == 1 and made.num_turns == 3 and made.current == 0
    made.add(segment(Place(1, 4), [], [14]))
    assert made.open_branch == -1 and made.num_turns == 3 and made.branches[1].turns() == [(3, 5)]


def test_another_attempt_forgets_what_the_one_before_has_drawn(group: Group) -> None:
    made = group.responses[0]
    made.start_over(1, has_failed=True)
    assert not made.branches and not made.is_finished and made.num_segments == 3
    assert made.num_turns == made.num_calls == made.num_answers == 0 and made.num_failures == 1
    assert made.token_ids.tolist() == [] and made.last_turn.tolist() == [] == made.conversation.tolist()
