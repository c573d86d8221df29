"""Corpora of one sort train: one document, text alone, images alone, whether or not anything held out."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.config.sources import SourceConfig, SourceFormat
from k25_train.data.commands.indexing import index_source
from tests.helpers.chat_goldens import goldens, write_kimi_vocabulary
from tests.helpers.interrupted_runs import rows
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit, layout, overrides
from tests.helpers.smoke_mix import mix
from tests.helpers.tar_shards import picture, tar_bytes
from tests.helpers.text_corpus import prepare, texts, write_lines, write_tokenizer
from tests.helpers.tiny_shards import tiny_data_config

SHORT = "train.steps=2 train.eval_interval=2 optim.warmup=1 optim.decay=1 train.seq_len=256".split()
NOTHING = "nothing is held out, so no held-out loss is reported"


def one_document(folder: Path) -> tuple[Path, SourceConfig]:
    """A corpus that megatron-core's format has a single document of."""
    return _texts(folder, [" ".join(texts(20))]), SourceConfig(format=SourceFormat.indexed, path="text")


def one_conversation(folder: Path) -> tuple[Path, SourceConfig]:
    """A single line of a conversation without images."""
    (folder / "chat.jsonl").write_bytes(goldens()[0].line + b"\n")
    vocabulary = write_kimi_vocabulary(folder / "tiktoken.model")
    return vocabulary, SourceConfig(format=SourceFormat.chat, path="chat.jsonl")


def text_alone(folder: Path) -> tuple[Path, SourceConfig]:
    """Documents, some of them held out."""
    return _texts(folder, texts(40)), SourceConfig(format=SourceFormat.indexed, path="text", heldout=8)


def images_alone(folder: Path) -> tuple[Path, SourceConfig]:
    """Images with their captions, some of them held out."""
    pairs = [((f"{n}.jpg", picture(seed=n)), (f"{n}.txt", f"picture {n}")) for n in range(30)]
    (folder / "images.tar").write_bytes(tar_bytes([member for pair in pairs for member in pair]))
    source = SourceConfig(format=SourceFormat.webdataset, path="images.tar", heldout=6)
    return write_tokenizer(folder / "tokenizer.json"), source


def _texts(folder: Path, documents: list[str]) -> Path:
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    prepare([write_lines(folder / "in.jsonl", documents)], folder / "text", tokenizer, num_workers=0)
    for path in folder.glob("text-00000.*"):
        path.rename(folder / f"text{path.suffix}")
    return tokenizer


def fit_and_print(context: RankContext, arguments: list[str]) -> str:
    """What rank 0 prints while it trains."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fit(context, arguments)
    return printed.getvalue()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("make", "evaluated"),
    [
        (one_document, ""),
        (images_alone, "eval_caption_loss"),
        pytest.param(one_conversation, "", marks=pytest.mark.slow),
        pytest.param(text_alone, "eval_text_loss", marks=pytest.mark.slow),
    ],
)
def test_it_trains(make: Callable[[Path], tuple[Path, SourceConfig]], evaluated: str, tmp_path: Path) -> None:
    vocabulary, source = make(tmp_path)
    data = replace(tiny_data_config(tmp_path), tokenizer=str(vocabulary), sources={"own": source})
    index_source("own", data, str(vocabulary), 0, lambda *_: None)
    settings = f"format: {source.format.value}, path: {source.path}, heldout: {source.heldout}"

    printed, *_ = run_ranks(
        fit_and_print,
        1,
        [
            *overrides(tmp_path, tmp_path / "run", *mix(), *SHORT, *layout()),
            f"+data.sources.own={{{settings}}}",
            f"data.tokenizer={vocabulary}",
            "model.vocab_size=640",
        ],
    )

    # 1. Losses of each step, and a held-out one where something is held out; if not, that is said, once.
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [0, 1, 2]
    assert all(0 < row["loss"] < 20 for row in found[1:])
    names = {name for row in found for name in row if name.startswith("eval_")}
    assert names == ({evaluated, "eval_loss/own"} if evaluated else set())
    assert printed.count(NOTHING) == (not evaluated)
    # 2. Plots and summary.
    assert {"loss.png", "mix.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert ("held-out" in printed.split("training loss")[1].split("tokens served")[0]) == bool(evaluated)
