"""Trajectories of a step's file as documents: what plans, micro-batches and decoders read of them.

The engine has seen the images and counted the placeholders; here both are held against what the trainer makes
of them. A difference of one token would shift every feature behind it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from k25_train.config.data import DataConfig
from k25_train.config.vision import VisionConfig
from k25_train.data.decode.items import PlannedMedia, plan_media
from k25_train.data.decode.media import MediaPatches, MediaReader, Wanted
from k25_train.data.formats.records import SampleRecord
from k25_train.data.mix.documents import DocumentTokens
from k25_train.data.mix.plan import PlannedPiece
from k25_train.data.policy_rows import NO_RESPONSE, POLICY_COLUMNS, PolicyRows
from k25_train.data.storage.ranges import Range
from k25_train.data.trajectories.reading import StepFile
from k25_train.errors import DataError

NAME = "rollouts"
"""The source that trajectories are of, in addition to those of `data.sources`."""


class OpenFile:
    """The file that is read now, behind an interface that lasts for the run."""

    def __init__(self, folder: Path) -> None:
        self.directory = str(folder)
        """For messages."""
        self._file: StepFile | None = None

    @property
    def file(self) -> StepFile:
        """The file of the step that is planned and read."""
        assert self._file is not None, "no step was planned"
        return self._file

    def turn_to(self, file: StepFile) -> None:
        """Read this one from now on."""
        self._file = file

    def read(self, shard: str, offset: int, num_bytes: int) -> bytes:
        """See `formats.reader.Files`; `shard` is the open file."""
        return self.file.read_media(offset, num_bytes)

    def plan(self, ranges: Iterable[Range]) -> None:
        """See `formats.reader.Files`: nothing is fetched."""

    def close(self) -> None:
        """See `formats.reader.Files`: nothing waits."""


class SeenMedia(MediaReader):
    """Images and videos that an engine has seen: one that does not decode is no sample to skip."""

    def load_all(self, wanted: Sequence[Wanted]) -> list[MediaPatches]:
        """See `MediaReader`. Raises `DataError` for what does not decode."""
        found = super().load_all(wanted)
        for each in found:
            if each.failure is not None:
                raise DataError(f"what an engine was shown cannot be decoded: {each.failure}")
        return found


class TrajectoryDocuments:
    """`readable_source.Documents` of the open file."""

    def __init__(self, opened: OpenFile, media_pad: int) -> None:
        """`media_pad`: the placeholder of a vision token."""
        self._opened = opened
        self._media_pad = media_pad

    def tokens(
        self, record: SampleRecord, media: tuple[PlannedMedia, ...], start: int = 0, stop: int | None = None
    ) -> DocumentTokens:
        """See `readable_source.Documents`. Raises `DataError` for one that is damaged, or has other
        placeholders than its images."""
        rows = self._opened.file.rows(record.offset)
        self._check_placeholders(record, media, rows.tokens)
        stop = len(rows.tokens) if stop is None else stop
        return DocumentTokens(rows.tokens[start:stop].astype(np.int64), rows.generated[start:stop], None)

    def num_targets(
        self, record: SampleRecord, media: tuple[PlannedMedia, ...], start: int, stop: int
    ) -> int:
        """See `readable_source.Documents`. A trajectory is never cut, and its first token never generated."""
        return int(self._opened.file.num_generated[record.offset])

    def placeholders(self, record: SampleRecord, media: tuple[PlannedMedia, ...]) -> np.ndarray:
        """See `readable_source.Documents`; they are in the tokens. Raises as `tokens`."""
        tokens = self._opened.file.rows(record.offset).tokens
        self._check_placeholders(record, media, tokens)
        return np.flatnonzero(tokens == self._media_pad)

    def _check_placeholders(
        self, record: SampleRecord, media: tuple[PlannedMedia, ...], tokens: np.ndarray
    ) -> None:
        # There are other tokens between any two items.
        places = np.flatnonzero(tokens == self._media_pad)
        starts = np.flatnonzero(np.diff(places, prepend=-2) > 1)
        found = np.diff(starts, append=len(places)).tolist()
        expected = [item.num_tokens for each in media for item in each.items]
        if found != expected:
            raise DataError(
                f"{self._opened.file.path}: trajectory {record.key} has runs of {found} placeholders, but "
                f"its images and videos have {expected} vision tokens: the engine prepares images in another "
                "way than model.vision says"
            )


class Rollouts:
    """The trajectories of the open file as a source: `ReadableSource`, `PieceSource` and `PolicySource`."""

    num_columns = len(POLICY_COLUMNS)

    def __init__(self, folder: Path, data: DataConfig, vision: VisionConfig, media_pad: int) -> None:
        """`folder` is where step files are. Raises `ConfigError` for a decoder that is not installed."""
        self.name = NAME
        self._opened = OpenFile(folder)
        self._vision = vision
        self.documents = TrajectoryDocuments(self._opened, media_pad)
        self.media_reader = SeenMedia(self._opened, vision, data.decoder)
        self.policy_scale = 1.0
        """What the weights of the file are multiplied by in this batch."""
        self.ptx_weight = 0.0
        """Weight of the next-token loss on sequences of other sources in this batch."""

    @property
    def reader(self) -> OpenFile:
        """See `ReadableSource`."""
        return self._opened

    def turn_to(self, file: StepFile) -> None:
        """Plan and read this file from now on."""
        self._opened.turn_to(file)

    def weigh(self, policy_scale: float, ptx_weight: float) -> None:
        """Weigh trajectories, and sequences of other sources, so from now on."""
        self.policy_scale, self.ptx_weight = policy_scale, ptx_weight

    def grids(self) -> list[np.ndarray]:
        """[R], each [I, 3] int32: patches of the vision items of every trajectory of the open file."""
        found = []
        for number in range(self._opened.file.num_trajectories):
            items = [item for media in self.planned(self.record(number)) for item in media.items]
            found.append(np.array([item.grid_thw for item in items], dtype=np.int32).reshape(-1, 3))
        return found

    def where(self, record: SampleRecord) -> str:
        """See `ReadableSource`."""
        return f"{self._opened.directory}/{record.shard}, trajectory {record.key}"

    def record(self, item: int) -> SampleRecord:
        """See `PieceSource`; an item is the number of a trajectory in the file."""
        file = self._opened.file
        segments = file.segments(item)
        return SampleRecord(
            shard=file.path.name,
            key=file.names[item],
            kind="trajectory",
            source=NAME,
            offset=item,
            num_bytes=0,
            segments=segments,
        )

    def media(self, record: SampleRecord, item: int, epoch: int) -> tuple[PlannedMedia, ...]:
        """See `PieceSource`; nothing is changed at random: the engine has seen it as it is."""
        return self.planned(record)

    def planned(self, record: SampleRecord) -> tuple[PlannedMedia, ...]:
        """The images and videos of a trajectory with their items."""
        return tuple(plan_media(segment, self._vision) for segment in record.media)

    def fill(self, rows: PolicyRows, labels: slice, source: str, piece: PlannedPiece) -> None:
        """See `PolicySource`."""
        if source != NAME:
            rows.columns[POLICY_COLUMNS.index("ptx_weights"), labels] = self.ptx_weight
            return
        number = piece.record.offset
        file = self._opened.file
        of = file.rows(number)
        rows.columns[0, labels] = of.rollout_logprobs[1:]
        rows.columns[1, labels] = of.advantages[1:]
        rows.columns[2, labels] = of.policy_weights[1:] * np.float32(self.policy_scale)
        rows.columns[3, labels] = of.ratio_weights[1:] * np.float32(self.policy_scale)
        rows.responses[labels] = np.where(of.generated[1:], number, NO_RESPONSE)
