"""Pages for reading: passages of the texts, set in real fonts on pages of many sizes."""

import io
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from k25_train.data.smoke_set.sources.base import Archives, Media, Sample, Source, Text, pick
from k25_train.data.smoke_set.sources.writing import DJANGO_ARCHIVE, PLAYS_ARCHIVE, django_files, scenes

PAGE_SIZES_PX = (
    *((224, 112), (280, 140), (196, 196), (168, 252), (336, 168), (252, 252), (420, 112)),
    *((308, 210), (364, 140), (448, 196), (140, 336), (420, 595), (595, 842)),
)
"""Strips, squares, and A5 and A4 at 72 dots an inch."""
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif-Italic.ttf",
    "DejaVuSans-Bold.ttf",
)
INKS_ON_PAPERS = (("black", "white"), ("#222222", "#f5efe0"), ("#10306a", "white"), ("white", "#202020"))
CHARACTERS_ON_A_PAGE = 420
"""Font sizes grow with the page so that about this many characters fit: legible also on shrunk pages."""
MIN_FONT_PX = 11
MARGIN_FRACTION = 0.05
LINE_HEIGHT = 1.3
MIN_CHARACTERS = 40
_MARKUP = re.compile(r"[*_#\\]")


@cache
def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size_px)


def set_page(words: list[str], key: str) -> tuple[bytes, str]:
    """Set as many of `words` as fit on a page; `key` fixes size, font and colours. Returns PNG and text."""
    width, height = pick(f"size {key}", PAGE_SIZES_PX)
    font_px = max(MIN_FONT_PX, round(math.sqrt(width * height / (0.6 * LINE_HEIGHT * CHARACTERS_ON_A_PAGE))))
    font = _font(pick(f"font {key}", FONTS), font_px)
    ink, paper = pick(f"ink {key}", INKS_ON_PAPERS)
    margin = max(4, round(MARGIN_FRACTION * width))
    line_px = round(font_px * LINE_HEIGHT)
    lines = break_lines(words, font, width - 2 * margin, (height - 2 * margin) // line_px)
    page = Image.new("RGB", (width, height), paper)
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((margin, margin + number * line_px), line, fill=ink, font=font)
    out = io.BytesIO()
    page.quantize(32, Image.Quantize.FASTOCTREE).save(out, "png")
    return out.getvalue(), "\n".join(lines)


def break_lines(words: list[str], font: ImageFont.FreeTypeFont, width_px: float, max_lines: int) -> list[str]:
    """Fill lines greedily with whole words; what does not fit into `max_lines` is left out.

    A word wider than a line ends the page before it.
    """
    lines: list[str] = []
    line = ""
    for word in words:
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width_px:
            line = longer
            continue
        if line:
            lines.append(line)
        line = word
        if len(lines) == max_lines or font.getlength(word) > width_px:
            return lines[:max_lines]
    return [*lines, line][:max_lines] if line else lines


def _passages(archives: Archives) -> Iterator[tuple[str, str]]:
    for group, text in scenes(archives):
        yield group, text.partition("\n\n_")[2] or text
    for group, text in django_files(archives, ".txt"):
        # Paragraphs with markup in them would not read as they are set.
        prose = [
            p for p in text.split("\n\n") if p[:1].isalpha() and len(p) > 80 and not re.search("[`=]|::", p)
        ]
        if prose:
            yield group, " ".join(prose)


def _pages(archives: Archives) -> Iterator[Sample]:
    for position, (group, passage) in enumerate(_passages(archives)):
        words = _MARKUP.sub("", passage).split()
        png, text = set_page(words, f"{position} {group}")
        if len(text) < MIN_CHARACTERS:
            continue
        yield Sample(
            key=f"page-{position:04d}",
            group=group,
            kind="ocr",
            source="pages",
            parts=(Media(type="image", data=png, format="png"), Text(text=text)),
        )


PAGES = Source(
    name="pages",
    archives=(PLAYS_ARCHIVE, DJANGO_ARCHIVE),
    licence="LicenseRef-public-domain AND BSD-3-Clause AND Bitstream-Vera",
    attribution="Passages of the plays and of Django's documentation, set here in the DejaVu fonts.",
    samples=_pages,
)
