"""What passes between the first rank and its shards arrives as it was sent."""

from dataclasses import fields, replace

import numpy as np
import pytest

from k25_train.environments.base import Task, scored
from k25_train.rollout.engines.base import FinishReason, Generated, Request, Sampling, VersionSpan
from k25_train.rollout.records import Record
from k25_train.rollout.response_records import apply_record
from k25_train.rollout.shards.link import message_in
from k25_train.rollout.shards.messages import (
    generated_message,
    generated_of,
    record_message,
    record_of,
    request_message,
    request_of,
    work_message,
    work_of,
)
from k25_train.rollout.trajectory import Ended, Response
from k25_train.rollout.work import Round, Work
from tests.helpers.made_groups import extended, segment

TASK = Task(
    key="t/1",
    family="t",
    messages=({"role": "user", "content": [{"type": "image", "image": "a"}, {"type": "text", "text": "?"}]},),
    media=(b"\x89PNG", b""),
    reference={"answer": [1, 2.5, None]},
    judge="answer",
    setup={"files": {"a": "b"}},
    max_turns=3,
)


def sent(message: Record) -> Record:
    return message_in(message.to_bytes())


def work() -> Work:
    response = Response()
    apply_record(extended(7, 2, 0, segment([4, 5], ends=False)), response, {})
    return Work(
        task=TASK,
        group=7,
        sample=2,
        seed=2**62 + 1,
        source="mine",
        allowed=Round(number=9, cap=30),
        response=response,
        media={"d1": b"one", "d2": b""},
    )


def test_work_arrives_as_it_was() -> None:
    before = work()
    after = work_of(sent(work_message(5, before)))
    assert after.task == before.task and after.allowed == before.allowed and after.media == before.media
    assert (after.group, after.sample, after.seed, after.source) == (7, 2, 2**62 + 1, "mine")
    (one,), (other,) = before.response.branches, after.response.branches
    assert one.token_ids.tolist() == other.token_ids.tolist() and one.versions.dtype == other.versions.dtype
    assert one.logprobs.tolist() == other.logprobs.tolist()
    assert after.response.open_branch == 0 and after.response.num_segments == 1
    assert not after.response.is_finished


def test_work_that_has_ended_arrives_with_its_verdict() -> None:
    before = work()
    before.response.ended, before.response.verdict = Ended.TURNS, scored(0.5, {"accuracy": 0.5})
    after = work_of(sent(work_message(5, before))).response
    assert after.ended is Ended.TURNS and after.verdict == before.response.verdict


def test_every_number_of_a_response_arrives() -> None:
    numbers = {
        each.name: 3 + place
        for place, each in enumerate(fields(Response))
        if each.name not in ("branches", "ended", "verdict")
    }
    before = replace(work(), response=Response(**numbers))
    after = work_of(sent(work_message(5, before))).response
    assert {name: getattr(after, name) for name in numbers} == numbers


def test_a_response_may_go_on_where_it_arrived() -> None:
    after = work_of(sent(work_message(5, work())))
    record = extended(7, 2, 1, replace(segment([6], after=segment([]).after)))
    apply_record(sent(record_message(5, record)) and record, after.response, after.media)
    assert after.response.num_segments == 2


def test_records_requests_and_answers_arrive() -> None:
    record = extended(7, 2, 1, segment([6]))
    again = record_of(sent(record_message(5, record)))
    assert dict(again.header) == dict(record.header)
    assert all((again.arrays[name] == array).all() for name, array in record.arrays.items())
    request = Request(
        key="k",
        prompt_ids=(1, 2),
        images=(b"x", b"yy"),
        response_ids=(3,),
        sampling=Sampling(max_tokens=4, temperature=1.0, seed=2**62, stop_ids=(9,), forbidden_ids=(7, 8)),
    )
    assert request_of(sent(request_message(3, request))) == request
    generated = Generated(
        prompt_ids=np.array([1], np.int32),
        token_ids=np.array([2, 3], np.int32),
        logprobs=np.array([-1, -2], np.float32),
        spans=(VersionSpan(4, 0, 2),),
        finish_reason=FinishReason.stop,
    )
    found = generated_of(sent(generated_message(3, generated)))
    assert found.spans == generated.spans and found.finish_reason is FinishReason.stop
    assert found.token_ids.tolist() == [2, 3] and found.logprobs.dtype == np.float32


@pytest.mark.parametrize("data", [b"", b"nonsense", work_message(1, work()).to_bytes()[:-1]])
def test_what_is_no_message_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(ValueError, match="no message"):
        message_in(data)
