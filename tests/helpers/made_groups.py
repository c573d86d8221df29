"""Groups and segments of a journal, made up."""

import numpy as np

from k25_train.rollout.engines.base import FinishReason, VersionSpan
from k25_train.rollout.trajectory import Group, Response, Segment


def group(number: int, size: int = 2) -> Group:
    """With responses that have nothing yet."""
    responses = [Response() for _ in range(size)]
    return Group(
        number=number, task=f"t/{number}", epoch=0, version=3, stamp={"phase": "free"}, responses=responses
    )


def segment(tokens: list[int], *, version: int = 3, ends: bool = True, number_of_round: int = 0) -> Segment:
    """Tokens of a response; it ends with them, or is cut."""
    return Segment(
        round=number_of_round,
        prompt_ids=np.array([9, 8], np.int32),
        token_ids=np.array(tokens, np.int32),
        logprobs=-np.array(tokens, np.float32) / 7,
        spans=(VersionSpan(version, 0, len(tokens)),) if tokens else (),
        finish_reason=FinishReason.stop if ends else FinishReason.aborted,
    )
