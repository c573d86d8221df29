"""Step files of made-up rollouts: groups of unequal size, branches, other versions, images, equal rewards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from k25_train.config.algorithm import OtherVersions
from k25_train.config.vision import VisionConfig
from k25_train.data.decode.file_types import media_info, sniff
from k25_train.data.decode.items import plan_media
from k25_train.data.tokenizer import Tokenizer
from k25_train.data.trajectories.rows import Trajectories, Trajectory
from k25_train.data.trajectories.step_file import segment_of, step_path, write_step_file
from k25_train.rl.advantages import advantages_of, token_weights
from tests.helpers.tiny_shards import make_image

_WORDS = np.arange(10, 200)
"""Ids of words."""


@dataclass(frozen=True, slots=True, eq=False)
class Rollouts:
    """Trajectories of a step before they are weighted, and what was earned."""

    trajectories: Sequence[Trajectory]
    rewards: np.ndarray
    groups: np.ndarray

    def weighted(
        self,
        *,
        current_version: int = 0,
        normalize: bool = False,
        other_versions: OtherVersions = OtherVersions.train,
        skip_equal_rewards: bool = False,
    ) -> Trajectories:
        """As a step file has them."""
        rows = Trajectories.of(self.trajectories)
        weights = token_weights(
            advantages_of(self.rewards, self.groups, normalize=normalize),
            self.groups,
            responses=rows.responses,
            offsets=rows.offsets,
            generated=rows.generated,
            versions=rows.versions,
            current_version=current_version,
            other_versions=other_versions,
            skip_equal_rewards=skip_equal_rewards,
        )
        return rows.weighted(weights.advantages, weights.policy_weights, weights.ratio_weights)


def image_tokens(data: bytes, tokenizer: Tokenizer, vision: VisionConfig) -> list[int]:
    """An image as Kimi writes it."""
    media_type, file_format = sniff(data, "")
    info = media_info(data, media_type, file_format)
    sizes = {"type": media_type, "format": file_format, "crc32": ""}
    sizes |= {name: getattr(info, name) for name in info.__dataclass_fields__}
    (item,) = plan_media(segment_of("", 0, 1, sizes), vision).items
    pads = [tokenizer.media_pad] * item.num_tokens
    return [
        tokenizer.media_begin,
        *tokenizer.encode("image"),
        tokenizer.media_content,
        *pads,
        tokenizer.media_end,
    ]


def make_rollouts(
    tokenizer: Tokenizer,
    vision: VisionConfig,
    *,
    seed: int,
    sizes: Sequence[int] = (4, 2, 3),
    longest: int = 24,
    num_images: int = 0,
    has_branches: bool = True,
) -> Rollouts:
    """Groups of the given `sizes`, all of whose responses earn the same in the first one; prompts of the
    first `num_images` groups have an image. Tokens are of versions 0 and 1.

    Recorded log-probabilities are near those of a model that guesses, so that some ratios lie within
    [0.5, 2] and some do not.
    """
    draw = np.random.default_rng(seed)
    trajectories: list[Trajectory] = []
    rewards, groups = [], []
    for group, size in enumerate(sizes):
        prompt, media = draw.choice(_WORDS, int(draw.integers(2, 9))).tolist(), ()
        if group < num_images:
            media = (make_image(60 + 28 * group, 50, "png", seed + group).data,)
            prompt = [*prompt[:1], *image_tokens(media[0], tokenizer, vision), *prompt[1:]]
        for sample in range(size):
            rewards.append(float(draw.integers(0, 2)) if group else 1.0)
            groups.append(group)
            first = _response(
                draw, f"task {group}, sample {sample}", len(rewards) - 1, prompt, media, longest
            )
            trajectories.append(first)
            if has_branches and sample % 2 and len(first.tokens) > len(prompt) + 4:
                trajectories.append(_branch(draw, first, len(prompt)))
    return Rollouts(trajectories, np.array(rewards), np.array(groups))


def _response(
    draw: np.random.Generator,
    name: str,
    response: int,
    prompt: list[int],
    media: tuple[bytes, ...],
    longest: int,
) -> Trajectory:
    length = int(draw.integers(1, longest))
    tokens = np.array([*prompt, *draw.choice(_WORDS, length)], dtype=np.int32)
    position = np.arange(len(tokens)) - len(prompt)
    logprobs = -np.log(320) + draw.normal(0, 0.6, len(tokens))
    return Trajectory(
        name=name,
        response=response,
        tokens=tokens,
        generated=position >= 0,
        rollout_logprobs=np.where(position >= 0, logprobs, 0).astype(np.float32),
        versions=(position >= length // 3).astype(np.int32),
        media=media,
    )


def _branch(draw: np.random.Generator, first: Trajectory, prompt: int) -> Trajectory:
    """Another end of a response; what both have in common was generated in the first trajectory."""
    kept = (len(first.tokens) + prompt) // 2
    tokens = first.tokens.copy()
    tokens[kept:] = draw.choice(_WORDS, len(tokens) - kept)
    return replace(
        first, name=f"{first.name}, branch", tokens=tokens, generated=np.arange(len(tokens)) >= kept
    )


def write_steps(folder: Path, steps: Sequence[Trajectories]) -> None:
    """The files of the first steps of a run."""
    for number, rows in enumerate(steps, start=1):
        write_step_file(step_path(folder, number), rows, {"cursor": number})
