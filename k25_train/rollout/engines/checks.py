"""Is this an answer? What an engine says of a response is checked before anybody trains on it.

A wrong answer becomes an `EngineError`, never a number: tokens of another prompt, ids that the model does not
have, log-probabilities that are missing, NaN or above 0, versions that do not cover the tokens, or an end
that they do not bear out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from k25_train.errors import DataError
from k25_train.rollout.engines.base import FinishReason, Generated, Request, VersionSpan
from k25_train.rollout.engines.faults import FaultKind, FaultLog
from k25_train.rollout.engines.served_model import ServedModel

MOST_ROUNDING = 1e-5
"""Above 0 by less, a log-probability is 0 that was rounded."""
LEAST_LOGPROB = -9000.0
"""Below it no float32 model gets: vLLM writes -9999 for NaN and minus infinity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back for a request, as it came."""

    prompt_ids: Sequence[int]
    """Everything the engine continued: prompt and earlier response, placeholders expanded."""
    token_ids: Sequence[int]
    """New tokens."""
    logprobs: Sequence[float]
    """Of each."""
    spans: Sequence[VersionSpan]
    """Versions of each."""
    finish_reason: FinishReason
    """Why it ended."""


class AnswerCheck:
    """Checks the answers of one engine."""

    def __init__(self, faults: FaultLog, model: ServedModel) -> None:
        """`faults` names the engine; `model` is what it serves."""
        self._faults = faults
        self._model = model

    def generated(self, request: Request, answer: Answer, versions: tuple[int, int]) -> Generated:
        """The answer to a request as the protocol has it.

        Args:
            request: what was asked.
            answer: what came.
            versions: first and last version that the engine had between question and answer.

        Raises `EngineError` for the first thing that is wrong with it.
        """
        prompt_ids = self.asked(request.key, request.prompt_ids, request.images)
        self._prompt(request, prompt_ids, answer.prompt_ids)
        self._tokens(request, answer.token_ids)
        logprobs = self.logprobs(request.key, answer.logprobs, len(answer.token_ids))
        self._spans(request, answer, versions)
        self._end(request, answer)
        return Generated(
            prompt_ids=prompt_ids,
            token_ids=np.asarray(answer.token_ids, dtype=np.int32),
            logprobs=logprobs,
            spans=tuple(answer.spans),
            finish_reason=answer.finish_reason,
        )

    def asked(self, subject: str, token_ids: Sequence[int], images: Sequence[bytes]) -> np.ndarray:
        """The ids with every placeholder. Raises `EngineError` for a request that no engine could answer."""
        try:
            return self._model.expanded(token_ids, images)
        except DataError as error:
            raise self._faults.error(
                FaultKind.request, subject, str(error), "correct the task whose request this is"
            ) from error

    def nothing(self, request: Request) -> Generated:
        """For a request without a new token: it has ended already, or a pause ends it before it is sent.
        Raises `EngineError` for a request that no engine could answer."""
        last, reason = request.response_ids[-1:], FinishReason.aborted
        if last and last[0] in request.sampling.stop_ids:
            reason = FinishReason.stop
        elif len(request.response_ids) >= request.sampling.max_tokens:
            reason = FinishReason.length
        return Generated(
            prompt_ids=self.asked(request.key, request.prompt_ids, request.images),
            token_ids=np.zeros(0, dtype=np.int32),
            logprobs=np.zeros(0, dtype=np.float32),
            spans=(),
            finish_reason=reason,
        )

    def expanded(self, subject: str, expected: np.ndarray, got: Sequence[int]) -> None:
        """Raises `EngineError` unless the engine saw these ids, every placeholder included."""
        if len(got) == len(expected) and np.array_equal(np.asarray(got), expected):
            return
        where = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), len(got))
        raise self._faults.error(
            FaultKind.prompt,
            subject,
            f"continues {len(got)} ids where {len(expected)} were asked, the first other one at {where}",
            "the engine resizes images, or turns ids into text and back, otherwise than training: serve the "
            "folder of `k25-convert export`, whose preprocessor_config.json has the limits of images",
        )

    def logprobs(self, subject: str, values: Sequence[float], count: int) -> np.ndarray:
        """[count] float32, checked: one for each token, finite, not above 0."""
        if len(values) != count:
            raise self._logprob_fault(subject, f"{len(values)} log-probabilities for {count} tokens")
        for index, value in enumerate(values):
            is_number = isinstance(value, int | float) and math.isfinite(value)
            if not is_number or not LEAST_LOGPROB < value <= MOST_ROUNDING:
                raise self._logprob_fault(subject, f"log-probability {value} of token {index}")
        return np.asarray(values, dtype=np.float32)

    def _logprob_fault(self, subject: str, answered: str) -> Exception:
        return self._faults.error(
            FaultKind.logprobs,
            subject,
            answered,
            "weights or activations are not finite, or the engine is broken: push weights again, and compare "
            "its log-probabilities with the trainer's",
        )

    def _prompt(self, request: Request, prompt_ids: np.ndarray, got: Sequence[int]) -> None:
        earlier = np.asarray(request.response_ids, dtype=np.int32)
        self.expanded(request.key, np.concatenate([prompt_ids, earlier]), got)

    def _tokens(self, request: Request, token_ids: Sequence[int]) -> None:
        size, forbidden = self._model.vocab_size, set(request.sampling.forbidden_ids)
        for index, token in enumerate(token_ids):
            if isinstance(token, int) and 0 <= token < size and token not in forbidden:
                continue
            rule = "is forbidden" if token in forbidden else f"is not 0 to {size - 1}"
            raise self._faults.error(
                FaultKind.tokens,
                request.key,
                f"token {index} is {token!r}, which {rule}",
                "the engine serves another model than the trainer's, or ignores the bias of forbidden ids",
            )

    def _spans(self, request: Request, answer: Answer, versions: tuple[int, int]) -> None:
        position, version, found = 0, versions[0], answer.spans
        for span in found:
            fits = span.start == position and span.stop > span.start
            if not fits or not version <= span.version <= versions[1]:
                break
            position, version = span.stop, span.version
        else:
            if position == len(answer.token_ids):
                return
        text = ", ".join(f"version {span.version} at {span.start} to {span.stop}" for span in found) or "none"
        raise self._faults.error(
            FaultKind.versions,
            request.key,
            f"spans of versions: {text}; it has {len(answer.token_ids)} tokens, and versions "
            f"{versions[0]} to {versions[1]} were committed meanwhile",
            "another trainer pushes to this engine, or it has not taken the last weights: rebuild it",
        )

    def _end(self, request: Request, answer: Answer) -> None:
        tokens, stops = list(answer.token_ids), set(request.sampling.stop_ids)
        room = request.sampling.max_tokens - len(request.response_ids)
        ended = [index for index, token in enumerate(tokens) if token in stops]
        is_whole = not ended or ended == [len(tokens) - 1]
        fits = {
            FinishReason.stop: bool(ended),
            FinishReason.length: not ended and len(tokens) == room,
            FinishReason.aborted: not ended,
        }[answer.finish_reason]
        if is_whole and fits and len(tokens) <= room:
            return
        raise self._faults.error(
            FaultKind.end,
            request.key,
            f"{answer.finish_reason.value} after {len(tokens)} of at most {room} tokens"
            + (f", an end at {ended[0]}" if ended else ""),
            "let the engine take sequences as long as prompt and response (serve: --max-model-len), and end "
            "at the given ids alone",
        )
