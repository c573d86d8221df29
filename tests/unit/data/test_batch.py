"""Documents and micro-batches: layout, loss mask and labels, written out by hand for small samples."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from k25_train.data.batch import MicroBatch, MicroBatchAssembler, mask_failed
from k25_train.data.decode.frames import MediaInfo
from k25_train.data.decode.media import MediaReader
from k25_train.data.formats.dataset import load_dataset
from k25_train.data.micro_batches import read_micro_batches
from k25_train.data.mix.documents import DocumentBuilder
from k25_train.data.mix.plan import PlannedPiece, SequencePlan
from k25_train.data.skip_log import SkipLog
from k25_train.data.tokenizer import load_tokenizer
from k25_train.data.units import ReadHere, Result, Unit, WordsUnit
from k25_train.errors import DataError
from tests.helpers.tiny_shards import (
    Media,
    Prompt,
    Sample,
    all_words,
    make_image,
    make_text,
    make_video,
    open_source_of,
    tiny_vision_config,
    words_reader,
    write_shard_set,
)

SEQ_LEN = 64
IMAGE = make_image(40, 28, "png", seed=1)  # grid 2x4: 2 tokens
VIDEO = make_video(
    28, 28, "gif", num_frames=12, fps=4, seed=2
)  # at 2 fps: chunks of 4 and 2 frames, 1 token each
BROKEN = Media(
    "video",
    "mp4",
    b"broken",
    MediaInfo(width=28, height=28, num_frames=8, duration_s=4.0, frame_times="1/2 1x8"),
)


class Rig:
    """A shard set of the given samples, and what assembles micro-batches from it."""

    def __init__(self, directory: Path, samples: Sequence[Sample], max_skipped_samples: int = 0) -> None:
        write_shard_set(directory, {"train": samples})
        self.dataset = load_dataset(str(directory))
        self.tokenizer = load_tokenizer(self.dataset.tokenizer_path)
        self.documents = DocumentBuilder(
            words_reader(self.dataset, self.tokenizer), self.tokenizer, tiny_vision_config()
        )
        self.skip_log = SkipLog(max_skipped_samples)
        self.media = MediaReader(self.dataset.reader, tiny_vision_config())
        source = open_source_of(self.dataset, self.documents, self.media)
        self.assembler = MicroBatchAssembler(
            vision=tiny_vision_config(),
            seq_len=SEQ_LEN,
            pad_token=self.tokenizer.pad,
            media_pad=self.tokenizer.media_pad,
            skip_log=self.skip_log,
            sources={"text": source, "caption": source},
        )

    def assemble(self, *rows: Sequence[int], with_pixels: bool = True) -> MicroBatch:
        """A micro-batch with the samples of the given positions, one sequence a row."""
        sequences = tuple(SequencePlan(source="caption", pieces=tuple(map(self.piece, row))) for row in rows)
        return self.read(sequences, with_pixels)

    def read(self, sequences: tuple[SequencePlan, ...], with_pixels: bool) -> MicroBatch:
        """A micro-batch of planned sequences."""
        reading = ReadHere(self._read_unit)
        reads = all_words(with_pixels=with_pixels)
        (batch,) = read_micro_batches([sequences], reads, reading, self.assembler, self.skip_log)
        return batch

    def _read_unit(self, unit: Unit) -> Result:
        if isinstance(unit, WordsUnit):
            return self.assembler.assemble(unit.sequences, unit.reads)
        return self.media.load(unit.media, unit.positions)

    def piece(self, position: int) -> PlannedPiece:
        record = self.dataset.splits["train"][position]
        length = self.documents.num_tokens(record)
        return PlannedPiece(record=record, start=0, length=length, media=self.documents.media(record))


def test_caption_is_laid_out_as_kimi_writes_it(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [Sample("a", "caption", [Prompt("say"), IMAGE, "red blue"])])
    t = rig.tokenizer
    prompt, words, name = t.encode("say"), t.encode("red blue"), t.encode("image")
    media = [t.media_begin, *name, t.media_content, t.media_pad, t.media_pad, t.media_end]
    document = [t.bos, *prompt, *media, *words, t.eos]

    batch = rig.assemble([0])

    num_padding = SEQ_LEN - len(document)
    assert batch.tokens.tolist() == document + [t.pad] * num_padding
    assert batch.document_lengths == (len(document), num_padding)
    assert batch.padding == (1,)
    no_loss = len(prompt) + len(media)  # positions whose next token is prompt or media
    targets = [*words, t.eos]
    assert batch.loss_mask.tolist() == [0.0] * no_loss + [1.0] * len(targets) + [0.0] * (num_padding + 1)
    assert batch.labels.tolist() == [0] * no_loss + targets + [0] * (num_padding + 1)
    assert batch.source.tolist() == [1] * len(document) + [0] * num_padding
    assert batch.grid_thw == ((1, 2, 4),)
    assert batch.item_documents == (0,)
    assert batch.pixels is not None
    assert batch.pixels.shape == (8, 588)


def test_every_video_chunk_is_laid_out_after_its_timestamp(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [Sample("a", "video", [VIDEO, "red"])])
    t = rig.tokenizer
    name = t.encode("video")
    chunks = []
    for timestamp in ("00:00:00.000", "00:00:02.000"):
        chunks += [*t.encode(timestamp), t.media_begin, *name, t.media_content, t.media_pad, t.media_end]

    batch = rig.assemble([0])

    document = [t.bos, *chunks, *t.encode("red"), t.eos]
    assert batch.tokens.tolist()[: len(document)] == document
    assert batch.document_lengths[0] == len(document)
    assert batch.grid_thw == ((4, 2, 2), (2, 2, 2))
    assert batch.item_documents == (0, 0)
    assert batch.pixels is not None
    assert batch.pixels.shape == (4 * 4 + 2 * 4, 588)


def test_pieces_of_a_text_are_documents_without_loss_across_the_cut(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [Sample("a", "text", [make_text(100, seed=1)])])
    record = rig.dataset.splits["train"][0]
    whole = rig.documents.tokens(record, ()).tokens
    assert whole[0] == rig.tokenizer.bos
    assert whole[-1] == rig.tokenizer.eos

    first, second = (
        PlannedPiece(record=record, start=0, length=SEQ_LEN, media=()),
        PlannedPiece(record=record, start=SEQ_LEN, length=20, media=()),
    )
    rows = SequencePlan(source="text", pieces=(first,)), SequencePlan(source="text", pieces=(second,))
    batch = rig.read(rows, with_pixels=True)

    assert batch.document_lengths == (SEQ_LEN, 20, SEQ_LEN - 20)
    assert batch.padding == (2,)
    assert batch.tokens[: SEQ_LEN + 20].tolist() == whole[: SEQ_LEN + 20].tolist()
    assert batch.loss_mask[: SEQ_LEN + 20].tolist() == [1.0] * 63 + [0.0] + [1.0] * 19 + [0.0]
    assert batch.labels[:63].tolist() == whole[1:64].tolist()
    assert not batch.source.any()
    assert batch.pixels is not None
    assert batch.pixels.shape == (0, 588)


def test_end_of_a_document_is_no_target_where_its_last_segment_is_none(tmp_path: Path) -> None:
    rig = Rig(
        tmp_path, [Sample("a", "caption", ["red", IMAGE]), Sample("b", "caption", [IMAGE, Prompt("red")])]
    )

    batch = rig.assemble([0], [1])

    assert batch.loss_mask[:SEQ_LEN].sum() == len(rig.tokenizer.encode("red"))
    assert batch.loss_mask[SEQ_LEN:].sum() == 0


def test_pixels_are_read_only_where_asked_for(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [Sample("a", "caption", [BROKEN, IMAGE, "red"])])

    batch = rig.assemble([0], with_pixels=False)

    assert batch.pixels is None
    assert batch.failed_items == ()
    assert batch.grid_thw == ((4, 2, 2), (4, 2, 2), (1, 2, 4))
    assert rig.skip_log.skipped == {}


def test_broken_file_masks_its_document_alone_and_zeroes_its_pixels(tmp_path: Path) -> None:
    samples = [
        Sample("good", "caption", [IMAGE, "red"]),
        Sample("bad", "video", [BROKEN, "blue one"]),
        Sample("after", "caption", [IMAGE, "green"]),
    ]
    rig = Rig(tmp_path, samples, max_skipped_samples=1)

    batch = rig.assemble([0, 1], [2])

    lengths = batch.document_lengths
    assert len(lengths) == 5
    assert batch.failed_items == (1, 2)
    loss = [part.sum() > 0 for part in batch.loss_mask.split(list(lengths))]
    assert loss == [True, False, False, True, False]
    assert batch.labels.split(list(lengths))[1].sum() == 0
    assert batch.pixels is not None
    good, bad, after = batch.pixels.split([8, 32, 8])
    assert not bad.any()
    assert torch.equal(good, after)
    (name, reason), *others = rig.skip_log.skipped.items()
    assert others == []
    assert name.endswith("train-00000.tar, sample bad")
    assert "video (.mp4 at byte" in reason
    assert "does not decode" in reason


def test_other_ranks_get_the_same_mask_from_the_failed_items(tmp_path: Path) -> None:
    samples = [Sample("a", "caption", [IMAGE, "red"]), Sample("b", "video", [BROKEN, "blue one"])]
    rig = Rig(tmp_path, samples, max_skipped_samples=1)
    decoded, told = rig.assemble([0, 1]), rig.assemble([0, 1], with_pixels=False)
    assert not torch.equal(decoded.loss_mask, told.loss_mask)

    masked = mask_failed(told, decoded.failed_items)

    assert torch.equal(decoded.loss_mask, masked.loss_mask)
    assert torch.equal(decoded.labels, masked.labels)
    assert torch.equal(mask_failed(masked, decoded.failed_items).loss_mask, masked.loss_mask)
    assert mask_failed(told, ()) is told


def test_failures_past_the_limit_stop_with_all_names(tmp_path: Path) -> None:
    samples = [Sample(key, "video", [BROKEN, "blue"]) for key in ("one", "two", "three")]
    rig = Rig(tmp_path, samples, max_skipped_samples=2)
    rig.assemble([0])
    rig.assemble([0], [1])

    with pytest.raises(DataError) as caught:
        rig.assemble([2])

    message = str(caught.value)
    assert "3 samples cannot be used, data.max_skipped_samples=2 are allowed" in message
    assert all(f"sample {key}" in message for key in ("one", "two", "three"))


def test_skips_are_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(tmp_path, [Sample("bad", "video", [BROKEN, "blue"])], max_skipped_samples=1)

    rig.assemble([0])
    rig.assemble([0])

    assert [record.message.count("sample bad") for record in caplog.records] == [1]


def test_a_rank_may_count_without_logging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(tmp_path, [Sample(key, "video", [BROKEN, "blue"]) for key in ("one", "two")])
    one, two = rig.dataset.splits["train"]
    skip_log = SkipLog(1)

    skip_log.add_named(f"sample {one.key}", "of another rank", log=False)
    with pytest.raises(DataError, match=r"sample one: of another rank\n.*sample two: of another rank"):
        skip_log.add_named(f"sample {two.key}", "of another rank", log=False)

    assert len(skip_log.skipped) == 2
    assert caplog.records == []


def test_words_that_do_not_fit_the_index_keep_their_place_and_are_not_learned(tmp_path: Path) -> None:
    rig = Rig(tmp_path, [Sample("a", "text", ["red green blue"])])
    index = tmp_path / "train-00000.index.jsonl"
    num_tokens = rig.dataset.splits["train"][0].num_text_tokens
    index.write_text(index.read_text().replace(f'"num_tokens": {num_tokens}', '"num_tokens": 1'))
    record = load_dataset(str(tmp_path)).splits["train"][0]

    document = rig.documents.tokens(record, ())

    assert document.failure == f"a text has {num_tokens} tokens, the index says 1"
    assert document.tokens.tolist() == [rig.tokenizer.bos, rig.tokenizer.pad, rig.tokenizer.eos]
    assert not document.is_target.any()
