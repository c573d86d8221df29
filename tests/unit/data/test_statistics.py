"""Statistics of sources, against sums and quantiles by hand; and what is drawn of them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from k25_train.data.overview import statistics as module
from k25_train.data.overview.plots import draw
from k25_train.data.overview.statistics import SourceStatistics, statistics
from k25_train.data.overview.table import lengths_of, media_table, sources_table


def source(name: str, num_items: int = 1000, *, with_media: bool = False) -> SourceStatistics:
    draws = np.random.default_rng(7)
    num_media = 2 * num_items if with_media else 0
    return SourceStatistics(
        name=name,
        format="webdataset" if with_media else "indexed",
        num_items=num_items,
        num_tokens=123_456_789,
        num_media=num_media,
        num_shards=3,
        num_bytes=5 * 10**9,
        text_tokens=np.arange(num_items),
        media_per_item=np.full(num_items if with_media else 0, 2),
        width=draws.integers(20, 4000, num_media),
        height=draws.integers(20, 4000, num_media),
        is_video=np.arange(num_media) % 4 == 0,
        duration_s=draws.uniform(0.5, 60, num_media // 4),
        formats=(("jpg", num_media // 2), ("mp4", num_media // 2)) if with_media else (),
    )


def test_lengths_are_quantiles_and_the_longest() -> None:
    assert lengths_of(source("web", 1001)) == (50, 500, 950, 1000)
    assert lengths_of(source("none", 0)) == (0, 0, 0, 0)


def test_tables_name_every_source_with_its_counts() -> None:
    console = Console(width=160, force_terminal=False)
    with console.capture() as captured:
        console.print(sources_table([source("web"), source("photos", with_media=True)], 160))
        console.print(media_table([source("web"), source("photos", with_media=True)], 160))
    lines = captured.get().splitlines()
    [web] = [line.split() for line in lines if line.strip().startswith("web")]
    assert web == "web indexed 1.0K 123.5M 0 0 3 5 49 499 949 999".split()
    [photos, sizes] = [line for line in lines if line.strip().startswith("photos")]
    assert photos.split()[4:6] == ["1.5K", "500"], "three of four media are images"
    assert "jpg 50%, mp4 50%" in sizes


@pytest.mark.parametrize("width", [80, 120])
def test_a_narrow_terminal_shows_fewer_columns_and_says_which(width: int) -> None:
    console = Console(width=width, force_terminal=False)
    sources = [source("a_source_with_a_name", with_media=True)]
    with console.capture() as captured:
        console.print(sources_table(sources, width))
        console.print(media_table(sources, width))
    text = captured.get()
    assert "…" not in text
    for figure in ("1.0K", "123.5M", "1.5K", "499", "999", "a_source_with_a_name"):
        assert figure in text
    assert ("no room for shards" in text) == (width == 80)


def test_a_picture_has_panels_for_what_there_is(tmp_path: Path) -> None:
    for name, sources in {
        "text": [source("web")],
        "both": [source("web"), source("photos", with_media=True)],
        "many": [source(f"source_{number}", 5) for number in range(30)],
        "empty": [source("nothing", 0)],
    }.items():
        draw(sources, tmp_path / f"{name}.png", name)
    sizes = {path.stem: Image.open(path).size for path in tmp_path.glob("*.png")}
    assert sizes["both"][1] > 1.8 * sizes["text"][1]
    assert set(sizes) == {"text", "both", "many", "empty"}


def test_a_large_corpus_is_sampled_evenly() -> None:
    numbers = module._spread(10 * module.SAMPLED + 3)
    assert len(numbers) == module.SAMPLED
    assert numbers[0] == 0
    assert set(np.diff(numbers)) <= {10, 11}
    assert list(module._spread(3)) == [0, 1, 2]
    assert callable(statistics)
