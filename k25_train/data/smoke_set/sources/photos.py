"""Photographs with the descriptions that scikit-image's authors wrote of them."""

import ast
import re
from collections.abc import Iterator

from k25_train.data.smoke_set.sources.archive import Archive
from k25_train.data.smoke_set.sources.base import Archives, Media, Sample, Source, Text

SKIMAGE_ARCHIVE = Archive(
    package="scikit-image",
    version="0.26.0",
    file_name="scikit_image-0.26.0-cp312-cp312-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="7df650e79031634ac90b11e64a9eedaf5a5e06fcd09bcd03a34be01745744466",
)
_SECTION = re.compile(r"\n(Parameters|Returns|Notes|References|Raises)\n-+\n")
_NOT_ABOUT_THE_IMAGE = re.compile(
    r"http|download|copyright|CC0|public\s+domain|useful|can be used|used to|illustrat|courtesy|dataset",
    re.IGNORECASE,
)
_LEFT_OUT = ("camera", "text", "motorcycle_left", "motorcycle_right")
"""Images whose docstrings say what the file is for, not what it shows."""
MAX_SENTENCES = 2


def describe(docstring: str) -> str:
    """What a docstring says of its image: the first sentences that are not about its origin or purpose."""
    text = " ".join(_SECTION.split(docstring)[0].split())
    sentences = re.split(r"(?<=[.:])\s+(?=[A-Z])", text)
    kept = [s for i, s in enumerate(sentences) if i == 0 or not _NOT_ABOUT_THE_IMAGE.search(s)]
    return " ".join(kept[:MAX_SENTENCES])


def _photos(archives: Archives) -> Iterator[Sample]:
    archive = archives[SKIMAGE_ARCHIVE.package]
    available = set(archive.names)
    for node in ast.parse(archive.read("skimage/data/_fetchers.py")).body:
        docstring = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        if docstring is None or not isinstance(node, ast.FunctionDef):
            continue
        constants = [
            n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)
        ]
        for file in dict.fromkeys(c for c in constants if re.fullmatch(r"data/\w+\.(png|jpg)", c)):
            stem, _, extension = file.removeprefix("data/").partition(".")
            if f"skimage/{file}" not in available or stem in _LEFT_OUT:
                continue
            yield Sample(
                key=f"photo-{stem}",
                group=f"photo {node.name}",
                kind="caption",
                source="photos",
                parts=(
                    Media(type="image", data=archive.read(f"skimage/{file}"), format=extension),
                    Text(text=describe(docstring)),
                ),
            )


PHOTOS = Source(
    name="photos",
    archives=(SKIMAGE_ARCHIVE,),
    licence="BSD-3-Clause AND CC0-1.0 AND LicenseRef-public-domain",
    attribution="Sample images of scikit-image, each free by the note in its docstring; captions from there.",
    samples=_photos,
)
