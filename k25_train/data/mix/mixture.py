"""Which weights hold at a step, by the configuration and its schedule. Pure."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from k25_train.config.data import DataConfig


@dataclass(frozen=True, slots=True)
class MixtureAt:
    """The weights of a stretch of steps."""

    first_step: int
    """First step, counted from 1, that is drawn so."""
    weights: Mapping[str, float]
    """Source -> weight, of all sources in the order of `data.sources`; 0 draws nothing."""
    vision_ratio: float | None
    """Share of the tokens in sequences with media; None leaves it to the weights."""

    def shares(self, with_media: Collection[str]) -> dict[str, float]:
        """Source -> its share of the tokens, while none has ended.

        Args:
            with_media: sources with images or video, which get `vision_ratio` together.
        """
        groups = [
            [name for name in self.weights if (name in with_media) == is_vision]
            for is_vision in (False, True)
        ]
        totals = [sum(self.weights[name] for name in group) for group in groups]
        parts = [total / sum(totals) for total in totals]
        if self.vision_ratio is not None and all(totals):
            parts = [1 - self.vision_ratio, self.vision_ratio]
        return {
            name: self.weights[name] / total * part
            for group, total, part in zip(groups, totals, parts, strict=True)
            for name in group
            if total
        } | {name: 0.0 for group, total in zip(groups, totals, strict=True) for name in group if not total}


def mixtures(data: DataConfig) -> list[MixtureAt]:
    """The mixtures of a run in the order of their first steps; each holds until the next begins."""
    weights = {name: source.weight for name, source in data.sources.items()}
    found = [MixtureAt(1, weights, data.vision_ratio)]
    for change in sorted(data.schedule.values(), key=lambda change: change.from_step):
        before = found[-1]
        ratio = before.vision_ratio if change.vision_ratio is None else change.vision_ratio
        found.append(MixtureAt(change.from_step, {**before.weights, **change.weights}, ratio))
    # One from the first step on leaves nothing of what the sources say.
    return found[1:] if len(found) > 1 and found[1].first_step == 1 else found


def first_weights(data: DataConfig) -> dict[str, float]:
    """Source -> its first positive weight, or 0 if it has none in any step."""
    found = dict.fromkeys(data.sources, 0.0)
    for mixture in mixtures(data):
        found = {name: weight or mixture.weights[name] for name, weight in found.items()}
    return found


def planned_tokens(
    data: DataConfig, with_media: Collection[str], num_steps: int, tokens_after: Callable[[int], int]
) -> dict[str, float]:
    """Source -> tokens that a run of `num_steps` draws from it, while none ends and nothing is padding;
    `tokens_after` gives those of the first so many steps."""
    tokens = dict.fromkeys(data.sources, 0.0)
    found = mixtures(data)
    ends = [*(each.first_step - 1 for each in found[1:]), num_steps]
    for each, end in zip(found, ends, strict=True):
        start, end = each.first_step - 1, min(end, num_steps)
        num_tokens = tokens_after(end) - tokens_after(start) if end > start else 0
        for name, share in each.shares(with_media).items():
            tokens[name] += num_tokens * share
    return tokens
