"""What the members of a sample say: words and media in reading order, and what is learned of them.

A layout turns the members that hold words into a list of `Text`s and `Slot`s. It sees no media, so that a
reader finds the words of a sample again by reading these members alone; the indexer then puts media into the
slots. The README next to this has the layouts with an example each.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, NamedTuple, Protocol

from k25_train.data.decode.items import format_timestamp
from k25_train.data.formats.declared import UNDECLARED, Declared
from k25_train.data.formats.sample_json import SampleError, declarations, parse_json, surrogate_in

TEXT_EXTENSIONS = ("txt", "text")
CAPTION_KEYS = ("caption", "text", "answer")
"""Of a JSON object with one text that is learned: the first of these that it has."""
PROMPT_KEYS = ("prompt", "question")
"""What precedes that text and has no loss."""
FILE_KEYS = ("member", "file", "image", "video")
"""Where a segment of an interleaved document may name its file."""


class Text(NamedTuple):
    """Words of a sample."""

    text: str
    loss: bool = True
    part_tokens: tuple[int, ...] = ()
    """As `Words.part_tokens`."""
    declared: Declared = UNDECLARED
    """As `Words.declared`."""


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a media file is to be."""

    names: tuple[str, ...] = ()
    """Its member, by the whole name or what follows the stem: the first of these that there is; none for the
    next one in order."""
    type: str | None = None
    """`image` or `video`; None for what the file is."""


@dataclass(frozen=True, slots=True)
class AllMedia:
    """Where all media of the sample are, in the order of their names."""


Part = Text | Slot | AllMedia


class Layout(Protocol):
    """Which members hold words, and what these say."""

    @property
    def takes_lone_texts(self) -> bool:
        """Whether a text without media is a sample also where others have media."""

    def words_of(self, suffixes: Sequence[str]) -> tuple[str, ...]:
        """Those members that hold the words, of all members of a sample by what follows their stem.

        Raises SampleError, with the reason alone, if that cannot be told. The same for these and any others
        of the sample as for all of it.
        """

    def parts(self, words: Mapping[str, bytes]) -> list[Part]:
        """What the members say that `words_of` chose. Raises SampleError, with the reason alone."""


class StemLayout:
    """`format: webdataset`: media and one text file or one JSON file with the same stem."""

    takes_lone_texts = False

    def words_of(self, suffixes: Sequence[str]) -> tuple[str, ...]:
        """The text file, else the JSON file."""
        for extensions in (TEXT_EXTENSIONS, ("json",)):
            found = [suffix for suffix in suffixes if extension_of(suffix) in extensions]
            exact = [suffix for suffix in found if suffix.lower() in extensions]
            chosen = exact or found
            if len(chosen) > 1:
                raise SampleError(f"has {len(chosen)} texts, {' and '.join(chosen)}, and none is the one")
            if chosen:
                return tuple(chosen)
        return ()

    def parts(self, words: Mapping[str, bytes]) -> list[Part]:
        """A text file is the text of all media; JSON is one of the forms below."""
        for suffix, data in words.items():
            if extension_of(suffix) in TEXT_EXTENSIONS:
                return [AllMedia(), Text(decode_text(data))]
            return json_parts(parse_json(data))
        return [AllMedia()]


def json_parts(content: Any) -> list[Part]:
    """The document in a JSON member. Raises SampleError, with the reason alone, if none is known in it."""
    if isinstance(content, list):
        return _segments(content)
    if not isinstance(content, dict):
        raise SampleError(f"its JSON is a {type(content).__name__}, neither an object nor a list")
    segments = content.get("segments", content.get("chunks"))
    if isinstance(segments, list):
        is_timed = all(isinstance(each, dict) and "type" not in each for each in segments)
        return _timed(segments) if is_timed else _segments(segments)
    if isinstance(content.get("texts"), list) and isinstance(content.get("images"), list):
        return _parallel_lists(content["texts"], content["images"])
    if isinstance(content.get("text_list"), list) and isinstance(content.get("image_info"), list):
        return _matched_images(content["text_list"], content["image_info"])
    caption = next((key for key in CAPTION_KEYS if isinstance(content.get(key), str)), None)
    if caption is None:
        keys = ", ".join(sorted(map(str, content))[:8])
        wanted = ", ".join((*CAPTION_KEYS, "segments", "texts"))
        raise SampleError(f"its JSON has none of {wanted}; it has {keys}")
    prompts = [content[key] for key in PROMPT_KEYS if isinstance(content.get(key), str)]
    text = checked(content[caption])
    declared = declarations(content, text)
    # What is declared is the text that is learned; of the prompt, only that its words turn as well.
    turns = {"orientation": content.get("orientation") is True} if declared.is_declared else {}
    before: list[Part] = [
        Text(checked(prompt), loss=False, declared=declarations(turns, prompt)) for prompt in prompts[:1]
    ]
    return [AllMedia(), *before, Text(text, declared=declared)]


def _segments(segments: Sequence[Any]) -> list[Part]:
    """`[{"type": "text", "text": …, "loss": …}, {"type": "image", "member": "0.jpg"}]`, our own form."""
    parts: list[Part] = []
    for number, segment in enumerate(segments):
        kind = segment.get("type") if isinstance(segment, dict) else None
        if kind == "text":
            loss = segment.get("loss", True)
            if not isinstance(loss, bool):
                raise SampleError(f"loss={loss!r} of its segment {number} is neither true nor false")
            counts = segment.get("part_tokens", [])
            is_sound = isinstance(counts, list) and all(type(each) is int and each >= 0 for each in counts)
            text = checked(segment.get("text"), f"the text of its segment {number}")
            parts.append(Text(text, loss, tuple(counts) if is_sound else (), declarations(segment, text)))
        elif kind in ("image", "video"):
            name = next((segment[key] for key in FILE_KEYS if isinstance(segment.get(key), str)), None)
            parts.append(Slot((name,) if name else (), kind))
        else:
            raise SampleError(f"its segment {number} is of type {kind!r}, neither text nor image nor video")
    return parts


def _timed(segments: Sequence[Mapping[str, Any]]) -> list[Part]:
    """`[{"start": 1.5, "end": 4.0, "text": …}, …]`, in seconds: what is said in a video, and when."""
    parts: list[Part] = [AllMedia()]
    for number, segment in enumerate(segments):
        start = segment.get("start")
        if isinstance(start, bool) or not isinstance(start, int | float) or not 0 <= start < 1e6:
            raise SampleError(f"start={start!r} of its segment {number} is no time in seconds")
        text = checked(segment.get("text"), f"the text of its segment {number}")
        parts.append(Text(f"{format_timestamp(start)} {text.strip()}\n"))
    return parts


def _parallel_lists(texts: Sequence[Any], images: Sequence[Any]) -> list[Part]:
    """As in OBELICS and MINT-1T: at each position a text or an image; the other list has null there."""
    if len(texts) != len(images):
        raise SampleError(f"has {len(texts)} texts and {len(images)} images, which are to be parallel")
    parts: list[Part] = []
    for position, (text, image) in enumerate(zip(texts, images, strict=True)):
        if image is not None:
            parts.append(Slot((image,) if isinstance(image, str) else (), "image"))
        if text is not None:
            parts.append(Text(checked(text, f"its text {position}")))
    return parts


def _matched_images(texts: Sequence[Any], images: Sequence[Any]) -> list[Part]:
    """As in MMC4: sentences, and images that each precede the sentence they match."""
    before: dict[int, list[Part]] = {}
    for number, image in enumerate(images):
        name, index = (
            (image.get("image_name"), image.get("matched_text_index")) if isinstance(image, dict) else (0, 0)
        )
        if not isinstance(name, str) or type(index) is not int or not 0 <= index < len(texts):
            raise SampleError(f"its image_info {number} has no image_name or no matched_text_index")
        before.setdefault(index, []).append(Slot((name,), "image"))
    parts: list[Part] = []
    for position, text in enumerate(texts):
        parts += before.get(position, [])
        parts.append(Text(checked(text, f"its text {position}") + "\n"))
    return parts


def place_media(
    parts: Sequence[Part], stem: str, media: Sequence[str]
) -> list[Text | tuple[str, str | None]]:
    """Texts, and (suffix, stated type) of media, in reading order; `media` are those members' suffixes.

    Raises SampleError, with the reason alone, if slots and media do not fit together.
    """
    ordered = sorted(media, key=natural_order)
    slots = [part for part in parts if isinstance(part, Slot)]
    base = PurePosixPath(stem).name
    by_name = {name: suffix for suffix in media for name in (f"{stem}.{suffix}", f"{base}.{suffix}", suffix)}
    found = [next((by_name[name] for name in slot.names if name in by_name), None) for slot in slots]
    if not any(found) and len(slots) == len(ordered):
        # Addresses of the web, or no names: the files are numbered in the order of the document.
        found = list(ordered)
    missing = next((slot for slot, suffix in zip(slots, found, strict=True) if suffix is None), None)
    if missing is not None:
        names = " or ".join(missing.names)
        asked = f"refers to {names}" if names else f"has places for {len(slots)} media"
        raise SampleError(f"{asked} and has {', '.join(ordered) or 'no media'}")
    filled = iter(found)
    placed: list[Text | tuple[str, str | None]] = []
    for part in parts:
        if isinstance(part, Text):
            placed.append(part)
        elif isinstance(part, Slot):
            placed.append((str(next(filled)), part.type))
        else:
            placed += [(suffix, None) for suffix in ordered]
    return placed


def texts_of(parts: Sequence[Part]) -> list[Text]:
    """The texts alone."""
    return [part for part in parts if isinstance(part, Text)]


def decode_text(data: bytes) -> str:
    """A text file's words. Raises SampleError, with the reason alone, unless it is UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SampleError(f"its text is not UTF-8 (byte {error.start})") from error


def checked(text: object, what: str = "its text") -> str:
    """A text of JSON. Raises SampleError, with the reason alone, unless UTF-8 can hold it."""
    if not isinstance(text, str):
        raise SampleError(
            f"{what} is {'missing' if text is None else f'a {type(text).__name__}'}, not a string"
        )
    defect = surrogate_in(text)
    if defect is not None:
        raise SampleError(f"{what} has {defect}")
    return text


def extension_of(suffix: str) -> str:
    """`jpg` of `0.JPG`."""
    return suffix.rpartition(".")[2].lower()


def natural_order(name: str) -> list[tuple[int, str]]:
    """Numbers in names count as numbers, of any length: 2 is before 10."""
    pieces = [
        piece.lstrip("0") if odd % 2 else piece for odd, piece in enumerate(re.split(r"([0-9]+)", name))
    ]
    # A number with fewer digits is smaller; texts, at even places, are compared as they are.
    return [(len(piece) if odd % 2 else 0, piece) for odd, piece in enumerate(pieces)]
