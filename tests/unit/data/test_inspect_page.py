"""The page of a batch, of a tiny set, and what a real browser makes of it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from k25_train.config.sources import SourceConfig, SourceFormat
from k25_train.data.batch import Reads
from k25_train.data.commands.indexing import index_source
from k25_train.data.loader import DataLoader
from k25_train.data.overview.page import PageTop, page
from k25_train.data.overview.shown import ShownSequence, show
from k25_train.data.tokenizer import train_tokenizer
from tests.helpers.browser import opened
from tests.helpers.tiny_shards import (
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
    write_tiny_shard_set,
)

EVERYTHING = Reads(tokens=True, labels=True, pixels=True)
SEQ_LEN = 128
SCRIPT = """
const seen = [...document.querySelectorAll("section")].map(section => ({
  documents: section.querySelectorAll("article").length,
  parts: [...section.querySelector(".bar").children].map(part => part.getBoundingClientRect().width),
  targets: section.querySelectorAll(".tokens .t").length,
  images: [...section.querySelectorAll("img")].filter(image => image.naturalWidth > 0).length,
  pictures: section.querySelectorAll("figure").length,
}));
const one = document.querySelector(".tokens .t"), colour = getComputedStyle(one).backgroundColor;
const other = getComputedStyle(document.querySelector(".tokens .s")).backgroundColor;
document.querySelector("#dim").click();
const dimmed = getComputedStyle(document.querySelector(".tokens .s")).opacity;
document.body.innerHTML = `<pre id="seen">${JSON.stringify({seen, colour, other, dimmed})}</pre>`;
"""
"""Looks at the page as it is laid out, and leaves what it saw in the place of it."""


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[ShownSequence]:
    """The sequences of a step that has text, images and video."""
    folder = write_tiny_shard_set(tmp_path_factory.mktemp("set") / "set")
    train = replace(tiny_train_config(), seq_len=SEQ_LEN)
    with DataLoader(tiny_data_config(folder), train, tiny_vision_config()) as loader:
        found = []
        for sequence in loader.plan(0).sequences:
            [batch] = loader.read_sequences([sequence], EVERYTHING)
            found.append(show(sequence, batch, loader.tokenizer, tiny_vision_config(), sequence.source))
            assert sum(each.num_targets for each in found[-1].documents) == int(batch.loss_mask.sum())
            ids = [
                each for document in found[-1].documents for token in document.tokens for each in token.ids
            ]
            assert ids == batch.tokens[: len(ids)].tolist(), "every token is shown once, in order"
            assert len(ids) + found[-1].padding == SEQ_LEN
        return found


def written(folder: Path, sequences: list[ShownSequence]) -> Path:
    path = folder / "page.html"
    top = PageTop(title="Step <1>", facts={"given": "a & b"}, shares={"text": 0.75, "caption": 0.25})
    path.write_text(page(top, sequences, SEQ_LEN), encoding="utf-8")
    return path


def test_media_are_shown_as_the_tower_sees_them(shown: list[ShownSequence]) -> None:
    images = [image for each in shown for document in each.documents for image in document.images]
    assert images
    assert all(image.pixels.dtype == np.uint8 and image.pixels.shape[0] % 28 == 0 for image in images)
    assert all(
        len(document.images) == sum("×" in token.text and token.is_special for token in document.tokens)
        for each in shown
        for document in each.documents
    )


def test_nothing_of_a_sample_is_taken_for_markup(shown: list[ShownSequence], tmp_path: Path) -> None:
    text = written(tmp_path, shown).read_text(encoding="utf-8")
    assert "Step &lt;1&gt;" in text
    assert "a &amp; b" in text
    assert not re.search(r"https?://", text), "the page needs no network"


def test_a_browser_shows_documents_mask_and_media(shown: list[ShownSequence], tmp_path: Path) -> None:
    document = opened(written(tmp_path, shown), SCRIPT, tmp_path / "profile")
    found = re.search(r'<pre id="seen">(.*)</pre>', document, re.DOTALL)
    assert found is not None, document[-2000:]
    seen = json.loads(found[1])
    assert [each["documents"] for each in seen["seen"]] == [len(each.documents) for each in shown]
    for each, expected in zip(seen["seen"], shown, strict=True):
        assert each["targets"] == sum(t.is_target for d in expected.documents for t in d.tokens)
        assert each["images"] == each["pictures"] == sum(len(d.images) for d in expected.documents)
        widths, lengths = each["parts"], [d.length for d in expected.documents]
        lengths += [expected.padding] if expected.padding else []
        assert len(widths) == len(lengths)
        assert np.allclose(np.array(widths) / sum(widths), np.array(lengths) / sum(lengths), atol=0.03)
    assert seen["colour"] != seen["other"]
    assert float(seen["dimmed"]) < 0.5


def test_turns_of_a_conversation_are_told_apart(tmp_path: Path) -> None:
    texts = ["the quick brown fox jumps over the lazy dog"] * 9
    train_tokenizer(texts, 300, tmp_path / "tokenizer.json", chat_tokens=True)
    call = {"id": "functions.look:0", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Where is <b>it</b>?"},
        {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "functions.look:0", "content": "a dog"},
        {"role": "assistant", "content": "Here."},
    ]
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 3)
    data = replace(
        tiny_data_config(tmp_path),
        tokenizer=str(tmp_path / "tokenizer.json"),
        sources={"chat": SourceConfig(format=SourceFormat.chat, path="a.jsonl", heldout=1)},
    )
    index_source("chat", data, str(data.tokenizer), 0, lambda *_: None)
    train, vision = replace(tiny_train_config(), seq_len=2 * SEQ_LEN), tiny_vision_config()
    with DataLoader(data, train, vision) as loader:
        sequence = loader.plan(0).sequences[0]
        [batch] = loader.read_sequences([sequence], EVERYTHING)
        found = show(sequence, batch, loader.tokenizer, vision, "chat")
    text = written(tmp_path, [found]).read_text(encoding="utf-8")
    [article, *_] = re.findall("<article.*?</article>", text, re.DOTALL)
    turns = re.findall(r'<div class="turn (\w+)"><b>(\w+)</b> <small>(.*?)</small>', article)
    assert [turn[:2] for turn in turns] == [
        ("user", "user"),
        ("assistant", "assistant"),
        ("system", "tool"),
        ("assistant", "assistant"),
    ]
    assert ["learned" in told for *_, told in turns] == [False, True, False, True]
    assert "<b>it" not in article
    assert '<span class="t" title="' in article
    first = article[article.index("turn user") : article.index("turn assistant")]
    assert 'class="t"' not in first
