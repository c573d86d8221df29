"""With zero vision a planted image is refused by name, nothing can decode, and what is decoded is counted."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from k25_train.compose.resolve import compose
from k25_train.config.data import DataConfig
from k25_train.config.sources import SourceConfig, SourceFormat
from k25_train.data.__main__ import main
from k25_train.data.commands.indexing import index_source
from k25_train.data.decode.items import plan_media
from k25_train.data.decode.media import MediaReader
from k25_train.data.formats.dataset import load_dataset
from k25_train.data.loader import DataLoader
from k25_train.data.open_sources import open_sources
from k25_train.data.storage.counts import COUNTS, PIXELS
from k25_train.data.zero_vision import NoPixels
from k25_train.errors import ConfigError, DataError
from k25_train.plan.assumptions import as_configured
from tests.helpers.chat_goldens import write_kimi_vocabulary
from tests.helpers.smoke_mix import mix, shard_sources
from tests.helpers.tiny_shards import (
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
    write_tiny_shard_set,
)

FROZEN = ("optim.vision_tower.trained=false", "optim.mm_projector.trained=false")
TEXT = tuple(mix(text=1.0))
TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard set with texts and images."""
    return write_tiny_shard_set(tmp_path_factory.mktemp("data") / "tiny")


def chats(folder: Path, *, planted: bool) -> DataConfig:
    """Forty conversations in two files; with `planted`, the last of the second one shows an image."""
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (40, 20), (9, 90, 200)).save(picture, "PNG")
    (folder / "p.png").write_bytes(picture.getvalue())
    shown = json.loads(json.dumps(TALK))
    shown["messages"][0]["content"] = [{"type": "image", "image": "p.png"}]
    for name in ("a", "b"):
        talks = [TALK] * 20
        if planted and name == "b":
            talks[-1] = shown
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in talks))
    vocabulary = write_kimi_vocabulary(folder / "tiktoken.model")
    source = SourceConfig(format=SourceFormat.chat, path="*.jsonl")
    data = replace(
        tiny_data_config(folder), tokenizer=str(vocabulary), sources={"talks": source}, zero_vision=True
    )
    index_source("talks", data, str(vocabulary), 0, lambda *_: None)
    return data


def test_a_planted_image_is_refused_by_name(tmp_path: Path) -> None:
    train = replace(tiny_train_config(), seq_len=64)
    with DataLoader(chats(tmp_path / "sound", planted=False), train, tiny_vision_config()) as loader:
        assert isinstance(loader.sources["talks"].media_reader, NoPixels)
    data = chats(tmp_path / "planted", planted=True)
    with pytest.raises(DataError, match=r"sources\.talks: .*/b\.jsonl, sample 39 has an image") as caught:
        DataLoader(data, train, tiny_vision_config())
    assert "data.zero_vision is true" in str(caught.value)
    with DataLoader(replace(data, zero_vision=False), train, tiny_vision_config()) as loader:
        assert not isinstance(loader.sources["talks"].media_reader, NoPixels)


def test_the_index_command_refuses_it_before_there_is_a_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = chats(tmp_path / "planted", planted=True)
    sources = {"talks": {"format": "chat", "path": "*.jsonl"}}
    given = {
        "dir": data.dir, "tokenizer": data.tokenizer, "zero_vision": True, "sources": sources,
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(given))
    for _ in range(2):  # also where there is an index already
        assert main(["index", f"data={tmp_path}/mine.yaml"]) == 2
        assert "sample 39 has an image" in " ".join(capsys.readouterr().err.split())


def test_shard_sets_are_looked_into_as_well(tiny: Path) -> None:
    data = replace(tiny_data_config(tiny), zero_vision=True, sources=shard_sources(text=1.0))
    opened = open_sources(data, tiny_vision_config())
    reader = opened.sources["text"].media_reader
    assert isinstance(reader, NoPixels)
    picture = next(record for record in load_dataset(str(tiny)).splits["train"] if record.media)
    media = plan_media(picture.media[0], tiny_vision_config())
    with pytest.raises(DataError, match=r"sources\.text: pixels were asked for"):
        reader.load(media)
    everything = replace(data, sources={"all": SourceConfig(format=SourceFormat.shards, path=".")})
    with pytest.raises(DataError, match=r"sources\.all: .*sample caption-0 has an image"):
        open_sources(everything, tiny_vision_config())


def test_pixels_are_counted_where_they_are_decoded(tiny: Path) -> None:
    dataset, vision = load_dataset(str(tiny)), tiny_vision_config()
    pictures = [each.media[0] for each in dataset.splits["train"] if each.media][:3]
    reader = MediaReader(dataset.reader, vision)
    COUNTS.take()
    for media in pictures:
        planned = plan_media(media, vision)
        reader.load(planned)
        num_patches = sum(item.num_patches for item in planned.items)
        assert COUNTS.take((PIXELS,)) == {PIXELS: num_patches * vision.patch_size**2}
    broken = plan_media(replace(pictures[0], crc32="00000000"), vision)
    assert reader.load(broken).failure is not None
    assert COUNTS.take() == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (TEXT, "optim.vision_tower.trained=True must be false with data.zero_vision"),
        ((*TEXT, FROZEN[0]), "optim.mm_projector.trained=True must be false"),
        ((*TEXT, "data.vision_ratio=0.5"), "data.vision_ratio=0.5 must be null with data.zero_vision"),
        (
            (*TEXT, "data.schedule.late={from_step: 5, vision_ratio: 0.5}"),
            "data.schedule.late.vision_ratio=0.5 must be null",
        ),
        (FROZEN, "data.sources.caption.kinds=['caption'] has images or video"),
    ],
)
def test_settings_that_need_pixels_are_refused(more: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=smoke", "data.zero_vision=true", *more])
    assert message in " ".join(str(caught.value).split())


def test_plans_know_that_there_are_no_images() -> None:
    config = compose(["experiment=sft_smoke"])
    assert as_configured(config).vision_share == 0.0
    assert not config.optim.vision_tower.trained and not config.optim.mm_projector.trained
