"""Callers may go at any moment, from another thread, and take no engine with them."""

from concurrent.futures import Future

from k25_train.rollout.engines.base import EngineError, FinishReason, Generated, Request, Sampling
from k25_train.rollout.engines.in_process.responses import Response, Sequence

SAMPLING = Sampling(max_tokens=3, temperature=1.0, seed=0, stop_ids=(), forbidden_ids=())


class JustGone(Future[Generated]):
    """Is cancelled right behind the last look at it."""

    def done(self) -> bool:
        return False


def test_a_caller_that_goes_as_its_response_ends_is_no_failure() -> None:
    gone = JustGone()
    assert gone.cancel()
    request = Request(key="task", prompt_ids=(1, 2), sampling=SAMPLING)
    response = Response(request, Sequence([1, 2], [], ()), gone, [1, 2])
    response.finish(FinishReason.aborted)
    response.fail(EngineError("generating failed"))
    assert gone.cancelled()
