"""Groups and segments of a journal, made up."""

import numpy as np

from k25_train.rollout import response_records
from k25_train.rollout.branches import Segment
from k25_train.rollout.engines.base import FinishReason, VersionSpan
from k25_train.rollout.records import Record
from k25_train.rollout.trajectory import Ended, Group, Response
from k25_train.rollout.turns import ROOT, Place


def group(number: int, size: int = 2) -> Group:
    """With responses that have nothing yet."""
    responses = [Response() for _ in range(size)]
    return Group(
        number=number, task=f"t/{number}", epoch=0, version=3, stamp={"phase": "free"}, responses=responses
    )


def segment(
    tokens: list[int],
    *,
    version: int = 3,
    ends: bool = True,
    number_of_round: int = 0,
    after: Place = ROOT,
) -> Segment:
    """Tokens of a response behind a prompt of two, or behind what there is; they end its turn, or are cut."""
    observed = [9, 8] if after == ROOT else []
    return Segment(
        round=number_of_round,
        after=after,
        observed_ids=np.array(observed, np.int32),
        media=(),
        token_ids=np.array(tokens, np.int32),
        logprobs=-np.array(tokens, np.float32) / 7,
        spans=(VersionSpan(version, 0, len(tokens)),) if tokens else (),
        finish_reason=FinishReason.stop if ends else FinishReason.aborted,
    )


def extended(group: int, sample: int, number: int, segment: Segment) -> Record:
    """A record of segment `number` of a response."""
    return response_records.extended(group, sample, Response(num_segments=number), segment)


def stopped(group: int, sample: int) -> Record:
    """A record of a response that the policy has ended."""
    return response_records.ended(group, sample, Response(), Ended.STOP)
