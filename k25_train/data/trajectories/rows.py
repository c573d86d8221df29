"""Trajectories of one step as arrays: prompts with their responses, and what is known of each token.

Shapes: R trajectories, T tokens of all of them, L tokens of one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from k25_train.data.mix.ragged import offsets_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectory:
    """One document of a policy: a prompt and a response, or a branch of a response."""

    name: str
    """How messages call it, e.g. its task and sample."""
    response: int
    """Number of the response in the step; trajectories that are branches of one response share it."""
    tokens: np.ndarray
    """[L] int32, ids of the engine, with every placeholder of media."""
    generated: np.ndarray
    """[L] bool: whether the policy drew the token. Not the first one, which nothing predicts, and not what
    another branch of the response has already."""
    rollout_logprobs: np.ndarray
    """[L] float32, nats: log-probability of the token when it was drawn; not looked at elsewhere."""
    versions: np.ndarray
    """[L] int32: version of the weights that drew it; not looked at elsewhere."""
    media: tuple[bytes, ...] = ()
    """Image and video files, in the order of their placeholders."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the file keeps of it, as JSON has it: reward and its parts, why it ended."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trajectories:
    """The trajectories of a step, end to end."""

    names: tuple[str, ...]
    """[R], as `Trajectory.name`."""
    responses: np.ndarray
    """[R] int64."""
    offsets: np.ndarray
    """[R + 1] int64: where each begins."""
    tokens: np.ndarray
    """[T] int32."""
    generated: np.ndarray
    """[T] bool."""
    rollout_logprobs: np.ndarray
    """[T] float32; 0 where nothing was drawn."""
    versions: np.ndarray
    """[T] int32; -1 where nothing was drawn."""
    advantages: np.ndarray
    """[T] float32; 0 where nothing was drawn."""
    policy_weights: np.ndarray
    """[T] float32: of the term with the advantage (`rl/advantages.py`); 0 where nothing was drawn."""
    ratio_weights: np.ndarray
    """[T] float32: of the penalty on the ratio; 0 where nothing was drawn."""
    media: tuple[tuple[bytes, ...], ...]
    """[R]: files of each."""
    facts: tuple[Mapping[str, Any], ...]
    """[R]: facts of each."""

    @classmethod
    def of(cls, trajectories: Sequence[Trajectory]) -> "Trajectories":
        """All of them, without weights yet (`weighted`). At least one."""
        generated = np.concatenate([each.generated for each in trajectories]).astype(np.bool_)
        logprobs = np.concatenate([each.rollout_logprobs for each in trajectories]).astype(np.float32)
        versions = np.concatenate([each.versions for each in trajectories]).astype(np.int32)
        nothing = np.zeros(len(generated), dtype=np.float32)
        return cls(
            names=tuple(each.name for each in trajectories),
            responses=np.array([each.response for each in trajectories], dtype=np.int64),
            offsets=offsets_of(np.array([len(each.tokens) for each in trajectories], dtype=np.int64)),
            tokens=np.concatenate([each.tokens for each in trajectories]).astype(np.int32),
            generated=generated,
            rollout_logprobs=np.where(generated, logprobs, np.float32(0)),
            versions=np.where(generated, versions, np.int32(-1)),
            advantages=nothing,
            policy_weights=nothing,
            ratio_weights=nothing,
            media=tuple(each.media for each in trajectories),
            facts=tuple(each.facts for each in trajectories),
        )

    def weighted(
        self, advantages: np.ndarray, policy_weights: np.ndarray, ratio_weights: np.ndarray
    ) -> "Trajectories":
        """The same with what it is trained for, [T] each."""
        return replace(
            self,
            advantages=advantages.astype(np.float32),
            policy_weights=policy_weights.astype(np.float32),
            ratio_weights=ratio_weights.astype(np.float32),
        )

    @property
    def lengths(self) -> np.ndarray:
        """[R] int64: tokens of each."""
        return np.diff(self.offsets)
