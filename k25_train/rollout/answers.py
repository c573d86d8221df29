"""Whether what an engine has answered can be trained on: what is wrong is the engine's fault, never a reward
of 0."""

import numpy as np

from k25_train.rollout.engines.base import FinishReason, Generated, Request

ABOVE_ONE = 1e-4
"""How far a log-probability may be above 0 by rounding, in nats."""


def wrong_with(generated: Generated, request: Request, vocab_size: int) -> str:
    """What is wrong with an answer, its kind and a colon first; empty for nothing.

    `vocab_size`: ids that the model has.
    """
    tokens, logprobs = np.asarray(generated.token_ids), np.asarray(generated.logprobs)
    sampling = request.sampling
    room = sampling.max_tokens - len(request.response_ids)
    was_paused = generated.finish_reason is FinishReason.aborted
    if len(tokens) != len(logprobs):
        return f"truncated: {len(tokens)} tokens, but {len(logprobs)} log-probabilities"
    if not len(tokens) and not was_paused:
        return "empty: no token, not even one that ends it"
    if len(tokens) > room:
        return f"too_long: {len(tokens)} tokens where {room} were asked for"
    if not np.isfinite(logprobs).all() or (logprobs > ABOVE_ONE).any():
        bad = int(np.argmax(~np.isfinite(logprobs) | (logprobs > ABOVE_ONE)))
        return f"bad_logprobs: the log-probability of token {bad} is {logprobs[bad]}"
    if (tokens < 0).any() or (tokens >= vocab_size).any() or np.isin(tokens, sampling.forbidden_ids).any():
        return "bad_ids: an id that the model does not have, or that was forbidden"
    if not len(generated.prompt_ids):
        return "truncated: the ids of the prompt are missing"
    return _wrong_end(generated, sampling.stop_ids, room) or _wrong_spans(generated)


def _wrong_end(generated: Generated, stop_ids: tuple[int, ...], room: int) -> str:
    tokens, reason = generated.token_ids, generated.finish_reason
    if reason is FinishReason.stop and int(tokens[-1]) not in stop_ids:
        return f"truncated: it ended by itself, but its last id is {int(tokens[-1])}"
    if reason is FinishReason.length and len(tokens) < room:
        return f"truncated: {len(tokens)} of {room} tokens, and no id that ends it"
    return ""


def _wrong_spans(generated: Generated) -> str:
    position = 0
    for span in generated.spans:
        if span.start != position or span.stop <= span.start:
            break
        position = span.stop
    if position == len(generated.token_ids):
        return ""
    return f"bad_versions: versions of {position} tokens are known, of {len(generated.token_ids)}"
