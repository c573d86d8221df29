"""Held-out sequences: the same in every run, however many ranks it has."""

from collections.abc import Mapping, Sequence

import numpy as np

from k25_train.config.data import DataConfig
from k25_train.config.training import TrainConfig
from k25_train.config.vision import VisionConfig
from k25_train.data.mix.blend import Merge
from k25_train.data.mix.mixture import first_weights
from k25_train.data.mix.plan import StepPlan
from k25_train.data.mix.sequences import Sequences
from k25_train.data.mix.stream import SourceStream, serve
from k25_train.data.mix.windows import Windows
from k25_train.data.shuffled_media import with_shuffled_media
from k25_train.data.skip_log import SkipLog
from k25_train.data.sources import OpenSource, SourceDocuments, heldout_documents
from k25_train.errors import DataError

EVAL_SEED = 0
"""Seed of the held-out order, the same in every run: shuffled, so that few sequences represent all."""


class EvaluationPlanner:
    """Plans evaluations of the sources that hold something out."""

    def __init__(
        self,
        sources: Mapping[str, OpenSource],
        data: DataConfig,
        train: TrainConfig,
        vision: VisionConfig,
        skip_log: SkipLog,
    ) -> None:
        self._sources = sources
        self._data = data
        self._train = train
        self._vision = vision
        self._skip_log = skip_log

    def plan(self, num_sequences: int, shuffle_media_seed: int | None) -> StepPlan:
        """The first `num_sequences` held-out sequences.

        Half are of sources of text alone and half of sources with media, in the proportions of their weights;
        where only one of the two holds something out, all are. With `data.limit_samples` they are the train
        samples, which are then meant to be memorized. `shuffle_media_seed` gives every sample the image or
        video of another of its source; as lengths change, the samples may then be packed differently. Raises
        DataError if nothing is held out.
        """
        # 1. What each source holds out.
        limit, seq_len = self._data.limit_samples, self._train.seq_len
        documents: list[SourceDocuments] = []
        for source in self._sources.values():
            if shuffle_media_seed is not None and source.has_media:
                source = with_shuffled_media(source, limit, shuffle_media_seed)
            documents.append(heldout_documents(source, limit, self._vision, seq_len, self._skip_log))
        weights = first_weights(self._data)
        numbers = [n for n, each in enumerate(documents) if each.num_items and weights[each.name]]
        if not numbers:
            raise DataError(
                "data.sources: none of those that are trained on holds anything out, so there is nothing to "
                "evaluate on\n  -> train with data.sources.NAME.heldout=N, which keeps N items of a source "
                "for that, or with a shard set that has a split 'heldout'"
            )

        # 2. Half of the sequences from each group, in turn.
        halves = [[n for n in numbers if documents[n].source.has_media is has] for has in (False, True)]
        groups = [half for half in halves if half]
        counts = [(num_sequences + number) // len(groups) for number in reversed(range(len(groups)))]
        drawn = [
            self._draw([(n, documents[n], weights[documents[n].name]) for n in group], count)
            for group, count in zip(groups, counts, strict=True)
        ]
        turns = np.concatenate([np.arange(count) for count in counts])
        order = np.argsort(turns, kind="stable")
        return StepPlan(
            step=0,
            source=np.concatenate([of for of, _ in drawn])[order],
            sequences_of=Sequences.joined([sequences for _, sequences in drawn]).chosen(order),
            sources=documents,
        )

    def _draw(
        self, group: Sequence[tuple[int, SourceDocuments, float]], count: int
    ) -> tuple[np.ndarray, Sequences]:
        """The sources [count] of the first sequences of a group, and these."""
        streams = [
            SourceStream(
                number,
                documents,
                Windows(documents.num_items, EVAL_SEED, documents.name, shuffle=True),
                self._train.seq_len,
                None,
            )
            for number, documents, _ in group
        ]
        merge = Merge(streams, [weight for *_, weight in group], [0] * len(group), may_end=True)
        while merge.num_ready < count:
            merge.more()
        order = merge.take(count)
        return order, serve(streams, order)
