"""Settings for the mixture of the smoke set's kinds of sample."""

from k25_train.config.sources import SAMPLE_KINDS, SourceConfig, SourceFormat


def mix(**weights: float) -> list[str]:
    """Settings that give the named sources of `data=smoke` these weights, and take the others away."""
    absent = [f"~data.sources.{kind}" for kind in SAMPLE_KINDS if kind not in weights]
    return [*(f"data.sources.{kind}.weight={weight}" for kind, weight in weights.items()), *absent]


def shard_sources(**weights: float) -> dict[str, SourceConfig]:
    """A source for each named kind of a shard set in `data.dir`, with its weight."""
    return {
        kind: SourceConfig(format=SourceFormat.shards, path=".", kinds=[kind], weight=weight)
        for kind, weight in weights.items()
    }
