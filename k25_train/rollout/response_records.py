"""What the journal has of one response, and what it becomes with each record.

    medium      an image that the group has not had, once
    segment     what a request has added: place, observed and drawn tokens, log-probabilities, versions
    observed    what an environment has answered: messages, calls, seconds
    restarted   its environment failed, or was lost: another attempt begins
    ended       why it gets no more tokens
    judged      its verdict

Records of one response are numbered by segment and attempt, so that reading them again changes nothing.
"""

import hashlib

import numpy as np

from k25_train.environments.base import Verdict
from k25_train.environments.environment import Action, Observation
from k25_train.rollout.branches import Segment
from k25_train.rollout.engines.base import FinishReason, VersionSpan
from k25_train.rollout.records import Record
from k25_train.rollout.trajectory import Ended, Response
from k25_train.rollout.turns import ROOT, Place

MEDIUM, SEGMENT, OBSERVED, RESTARTED, ENDED, JUDGED = (
    "medium", "segment", "observed", "restarted", "ended", "judged",
)  # fmt: skip
KINDS = (MEDIUM, SEGMENT, OBSERVED, RESTARTED, ENDED, JUDGED)


def apply_record(record: Record, response: Response, media: dict[str, bytes]) -> None:
    """Take a record of a response in; `media`: of its group. Raises ValueError for one that cannot follow."""
    header = record.header
    attempt = header.get("attempt", 0)
    if attempt < response.attempt and header["kind"] in (SEGMENT, OBSERVED, ENDED):
        return
    match header["kind"]:
        case "medium":
            media.setdefault(header["digest"], record.arrays["content"].tobytes())
        case "segment":
            _extend(record, response)
        case "observed":
            response.answered(header["turn"], header.get("calls", 0), is_unread=bool(header.get("fault")))
        case "restarted":
            if attempt > response.attempt:
                response.start_over(attempt, has_failed=header.get("failed", True))
        case "ended":
            response.ended = response.ended or Ended(header["why"])
        case "judged":
            if not response.is_judged:
                response.verdict = Verdict.from_json(header["verdict"])


def _extend(record: Record, response: Response) -> None:
    header, arrays = record.header, record.arrays
    number = header["segment"]
    if number < response.num_segments:
        return
    if number > response.num_segments:
        raise ValueError(f"segment {number} follows segment {response.num_segments - 1}")
    reason = FinishReason(header["finish_reason"])
    if is_old := "after" not in header:
        # Responses were one turn each, and every segment had the prompt.
        had = response.branches[0].token_ids if response.branches else None
        after = ROOT if had is None else Place(0, len(had))
        observed = arrays["prompt_ids"] if had is None else arrays["prompt_ids"][:0]
    else:
        after, observed = Place(*header["after"]), arrays["observed_ids"]
    segment = Segment(
        round=header["round"],
        after=after,
        observed_ids=observed,
        media=tuple(header.get("media", ())),
        token_ids=arrays["token_ids"],
        logprobs=arrays["logprobs"],
        spans=tuple(VersionSpan(*span) for span in header["spans"]),
        finish_reason=reason,
    )
    response.add(segment, header.get("shared_media", 0))
    if is_old and reason is not FinishReason.aborted:
        response.ended = Ended(reason.value)


def digest_of(image: bytes) -> str:
    """What names an image in a group."""
    return hashlib.blake2b(image, digest_size=16).hexdigest()


def medium(group: int, image: bytes) -> Record:
    """An image that responses of the group see."""
    header = {"kind": MEDIUM, "group": group, "digest": digest_of(image)}
    return Record(header, {"content": np.frombuffer(image, np.uint8)})


def extended(group: int, sample: int, response: Response, segment: Segment, shared_media: int = 0) -> Record:
    """A response has got another segment; `shared_media`: images in front of its place, where it forks."""
    return Record(
        {
            "kind": SEGMENT,
            "group": group,
            "sample": sample,
            "attempt": response.attempt,
            "segment": response.num_segments,
            "round": segment.round,
            "after": list(segment.after),
            "media": list(segment.media),
            "shared_media": shared_media,
            "spans": [list(span) for span in segment.spans],
            "finish_reason": segment.finish_reason.value,
        },
        {
            "observed_ids": segment.observed_ids,
            "token_ids": segment.token_ids,
            "logprobs": segment.logprobs,
        },
    )


def observed(
    group: int,
    sample: int,
    response: Response,
    turn: int,
    observation: Observation,
    action: Action,
    seconds: float,
) -> Record:
    """An environment has answered a turn: for people, and for figures."""
    return Record(
        {
            "kind": OBSERVED,
            "group": group,
            "sample": sample,
            "attempt": response.attempt,
            "turn": turn,
            "messages": [dict(message) for message in observation.messages],
            "media": [digest_of(image) for image in observation.media],
            "calls": len(action.calls),
            "fault": action.fault,
            "seconds": round(seconds, 6),
        }
    )


def restarted(group: int, sample: int, attempt: int, cause: str, *, has_failed: bool) -> Record:
    """Attempt `attempt` begins, from 1 on, and why the one before came to nothing: its environment failed, or
    was only lost with the process that had it."""
    return Record(
        {
            "kind": RESTARTED,
            "group": group,
            "sample": sample,
            "attempt": attempt,
            "cause": cause,
            "failed": has_failed,
        }
    )


def ended(group: int, sample: int, response: Response, why: Ended) -> Record:
    """A response gets no more tokens."""
    return Record(
        {"kind": ENDED, "group": group, "sample": sample, "attempt": response.attempt, "why": str(why)}
    )


def judged(group: int, sample: int, verdict: Verdict) -> Record:
    """A response has a verdict with a reward."""
    return Record({"kind": JUDGED, "group": group, "sample": sample, "verdict": verdict.as_json()})
