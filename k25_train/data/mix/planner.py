"""From the state of the training stream to the plan of a step and the next state.

The same on every rank, from indexes alone. A step costs what its sequences cost, however many items the
sources have; going on from a state costs one window per source, whatever the step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from k25_train.config.data import DataConfig
from k25_train.data.mix.blend import DryError, Feed, Merge
from k25_train.data.mix.mixture import mixtures
from k25_train.data.mix.plan import PieceSource, StepPlan
from k25_train.data.mix.state import LoaderState, Mix, SourcePosition
from k25_train.data.mix.stream import SourceStream, serve
from k25_train.errors import DataError


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """A source as the planner knows it."""

    stream: SourceStream
    has_media: bool
    """Whether its sequences count towards `data.vision_ratio`."""
    pieces: PieceSource
    """Makes records of what was planned."""


class Planner:
    """Plans step after step. Steps in order cost least; any other state is legal, too."""

    def __init__(
        self, sources: Sequence[PlannedSource], data: DataConfig, num_sequences: Callable[[int], int]
    ) -> None:
        """`sources` in the order of `data.sources`; `num_sequences` gives those of a step, counted from 1.

        Raises DataError for a vision ratio that the sources cannot give, at whichever step it would hold.
        """
        self._sources = sources
        self._data = data
        self._num_sequences = num_sequences
        self._pieces = [source.pieces for source in sources]
        self._mixtures = mixtures(data)
        self._state: LoaderState | None = None
        self._feed: Merge
        for mixture in self._mixtures:
            self._check_groups(self.mix_at(mixture.first_step - 1))

    def mix_at(self, step: int) -> Mix:
        """The mixture of a step, counted from 0."""
        # The configuration counts steps from 1.
        mixture = [each for each in self._mixtures if each.first_step <= step + 1][-1]
        weights = {name: weight for name, weight in mixture.weights.items() if weight}
        return Mix(weights=weights, vision_ratio=mixture.vision_ratio)

    def tokens_of_epoch(self, name: str) -> int:
        """Tokens of all items of a source; estimated by its first window."""
        (stream,) = (source.stream for source in self._sources if source.stream.name == name)
        return round(stream.mean_tokens * stream.num_items)

    def plan(self, state: LoaderState) -> tuple[StepPlan, LoaderState]:
        """The plan of the state's step, and the state behind it. Raises DataError if sources are used up."""
        # 1. The streams where the state has them, merged by the mixture of this step.
        mixed = state.with_mix(self.mix_at(state.step))
        if state is not self._state or mixed is not state:
            self._start(mixed)
        self._state = None

        # 2. As many sequences as a step has, and where each source is behind them.
        order = self._draw(state.step, mixed.mix)
        streams = [source.stream for source in self._sources]
        plan = StepPlan(
            step=state.step, source=order, sequences_of=serve(streams, order), sources=self._pieces
        )
        positions = {streams[number].name: streams[number].position for number in np.unique(order).tolist()}
        self._state = replace(mixed, step=state.step + 1, sources={**mixed.sources, **positions})
        return plan, self._state

    def _start(self, state: LoaderState) -> None:
        for source in self._sources:
            source.stream.seek(state.sources.get(source.stream.name, SourcePosition()))
        mix = state.mix
        drawn = [source for source in self._sources if source.stream.name in mix.weights]
        if mix.vision_ratio is None:
            self._feed = _merge(drawn, mix.weights)
            return
        groups = self._groups(mix)
        self._feed = Merge(
            [_merge(group, mix.weights) for group in groups],
            [1 - mix.vision_ratio, mix.vision_ratio],
            [sum(source.stream.position.tokens_of_mix for source in group) for group in groups],
            may_end=False,
        )

    def _groups(self, mix: Mix) -> list[list[PlannedSource]]:
        """The sources that are drawn: of text alone, and with media."""
        drawn = [source for source in self._sources if source.stream.name in mix.weights]
        return [[source for source in drawn if source.has_media is has_media] for has_media in (False, True)]

    def _check_groups(self, mix: Mix) -> None:
        if mix.vision_ratio is None:
            return
        for group, what in zip(self._groups(mix), ("text alone", "media"), strict=True):
            if not group:
                raise DataError(
                    f"data.vision_ratio={mix.vision_ratio}, but no source with a weight has {what}: add one, "
                    "or set data.vision_ratio=null"
                )

    def _draw(self, step: int, mix: Mix) -> np.ndarray:
        """[sequences] int64: the source of each sequence of the step, counted from 0."""
        num_sequences = self._num_sequences(step + 1)
        try:
            while self._feed.num_ready < num_sequences:
                if self._feed.more() is None:
                    raise DataError(self._used_up(step, "sources", sorted(mix.weights)))
        except DryError as error:
            what = "sources with media" if error.feed else "sources of text alone"
            names = [s.stream.name for s in self._sources if s.has_media == bool(error.feed)]
            names = [name for name in names if name in mix.weights]
            raise DataError(self._used_up(step, what, names)) from error
        return self._feed.take(num_sequences)

    def _used_up(self, step: int, what: str, names: Sequence[str]) -> str:
        caps = ", ".join(f"{name} (epochs={self._data.sources[name].epochs:g})" for name in names)
        return (
            f"step {step + 1}: all {what} are used up: {caps}. Raise data.sources.NAME.epochs or take the "
            "cap away (null), add a source, or end before: train.steps"
        )


def _merge(sources: Sequence[PlannedSource], weights: Mapping[str, float]) -> Merge:
    streams = [source.stream for source in sources]
    feeds: Sequence[Feed] = streams
    return Merge(
        feeds,
        [weights[stream.name] for stream in streams],
        [stream.position.tokens_of_mix for stream in streams],
        may_end=True,
    )
