"""megatron-energon's field maps: which member, and what of its JSON, is which field of a sample.

image: jpg,png          the first of these members that there is
caption: json[caption]  a value in the member .json
answers: json[qa][0][a]
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from k25_train.data.formats.sample_json import SampleError, parse_json
from k25_train.data.tar.layouts import (
    TEXT_EXTENSIONS,
    Part,
    Slot,
    Text,
    checked,
    decode_text,
    extension_of,
    json_parts,
)
from k25_train.errors import DataError

_ACCESS = re.compile(r"([^\[\]]+)((?:\[[^\[\]]+\])*)")


class Access(NamedTuple):
    """Where a field may be found."""

    suffix: str
    """The member."""
    keys: tuple[str, ...]
    """What to take of its JSON, from the outside inwards."""


@dataclass(frozen=True, slots=True)
class FieldLayout:
    """Samples of one of energon's types."""

    sample_type: str
    fields: Mapping[str, tuple[Access, ...]]
    """Field -> where it may be found; the first that there is."""
    takes_lone_texts: bool = True

    @classmethod
    def of(cls, path: str, sample_type: str, field_map: Mapping[str, str]) -> "FieldLayout":
        """Raises DataError, naming `path`, for a type that is not read, and for fields that cannot be."""
        if sample_type not in _TYPES:
            raise DataError(
                f"{path}: samples of type {sample_type} are not read; those of {', '.join(_TYPES)} are, and "
                "CrudeWebdataset by the rule of format=webdataset. Prepare it as one of these."
            )
        needed = _TYPES[sample_type].fields
        missing = [name for name in needed if name not in field_map]
        if missing:
            raise DataError(f"{path}: its field_map has no {' and no '.join(missing)}. Add where each is.")
        fields = {name: _accesses(path, text) for name, text in field_map.items()}
        for name in needed:
            for access in fields[name]:
                is_word = extension_of(access.suffix) in (*TEXT_EXTENSIONS, "json")
                if name not in _MEDIA_FIELDS and not is_word:
                    raise DataError(
                        f"{path}: the field {name} is read from .{access.suffix}, which is neither .txt nor "
                        ".json. Correct its field_map, or write the shards with these."
                    )
        return cls(sample_type, {name: fields[name] for name in fields})

    def words_of(self, suffixes: Sequence[str]) -> tuple[str, ...]:
        """All members that a field of words may be in."""
        used = {
            access.suffix
            for name, accesses in self.fields.items()
            if name not in _MEDIA_FIELDS
            for access in accesses
        }
        return tuple(suffix for suffix in suffixes if suffix in used)

    def parts(self, words: Mapping[str, bytes]) -> list[Part]:
        """Media, then what is given, then what is learned."""
        return _TYPES[self.sample_type].parts(_Fields(self.fields, words))


class _Fields:
    """The fields of one sample."""

    def __init__(self, fields: Mapping[str, tuple[Access, ...]], words: Mapping[str, bytes]) -> None:
        self._fields, self._words = fields, words
        self._parsed: dict[str, Any] = {}

    def slot(self, name: str, media_type: str) -> Slot:
        """The place of a media field."""
        return Slot(tuple(access.suffix for access in self._fields[name]), media_type)

    def text(self, name: str) -> str:
        """A field of words. Raises SampleError, with the reason alone, if it has none."""
        return checked(self.value(name), f"its {name}")

    def value(self, name: str) -> Any:
        """A field's value, None if the sample has none: of the first place that it is in."""
        for access in self._fields.get(name, ()):
            value = self._member(access.suffix)
            for key in access.keys:
                if isinstance(value, dict):
                    value = value.get(key)
                elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
                    value = value[int(key)]
                else:
                    value = None
            if value is not None:
                return value
        return None

    def _member(self, suffix: str) -> Any:
        if suffix not in self._words:
            return None
        if suffix not in self._parsed:
            data = self._words[suffix]
            is_text = extension_of(suffix) in TEXT_EXTENSIONS
            self._parsed[suffix] = decode_text(data) if is_text else parse_json(data)
        return self._parsed[suffix]


def _captioned(media_type: str, media: str, text: str) -> Callable[[_Fields], list[Part]]:
    return lambda fields: [fields.slot(media, media_type), Text(fields.text(text))]


def _answered(media_type: str, media: str) -> Callable[[_Fields], list[Part]]:
    """A question without a loss, and the answer of the largest weight, the first of equal ones."""

    def parts(fields: _Fields) -> list[Part]:
        answers = fields.value("answers")
        answers = answers if isinstance(answers, list) else [answers]
        weights = fields.value("answer_weights")
        is_weighted = isinstance(weights, list) and len(weights) == len(answers) > 0
        if is_weighted and not all(isinstance(weight, int | float) for weight in weights):
            raise SampleError("its answer_weights are no numbers")
        best = max(range(len(answers)), key=weights.__getitem__) if is_weighted else 0
        answer = checked(answers[best] if answers else None, "its answer")
        return [fields.slot(media, media_type), Text(fields.text("context"), loss=False), Text(answer)]

    return parts


def _chosen(fields: _Fields) -> list[Part]:
    choices, number = fields.value("choices"), fields.value("correct_choice_idx")
    number = number if number is not None else 0
    if not isinstance(choices, list) or type(number) is not int or not 0 <= number < len(choices):
        raise SampleError(f"its correct_choice_idx {number!r} is none of its choices")
    context = Text(fields.text("context"), loss=False)
    return [fields.slot("image", "image"), context, Text(checked(choices[number], "its choice"))]


def _interleaved(fields: _Fields) -> list[Part]:
    sequence = fields.value("sequence")
    if not isinstance(sequence, list):
        raise SampleError("its sequence is no list")
    return json_parts(
        [{"type": "text", "text": each} if isinstance(each, str) else each for each in sequence]
    )


class _Type(NamedTuple):
    fields: tuple[str, ...]
    """Those that a field_map has to have."""
    parts: Callable[[_Fields], list[Part]]


_MEDIA_FIELDS = ("image", "video")
_TYPES = {
    "CaptioningSample": _Type(("image", "caption"), _captioned("image", "image", "caption")),
    "OCRSample": _Type(("image", "text"), _captioned("image", "image", "text")),
    "VQASample": _Type(("image", "context", "answers"), _answered("image", "image")),
    "MultiChoiceVQASample": _Type(("image", "context", "choices"), _chosen),
    "VidQASample": _Type(("video", "context", "answers"), _answered("video", "video")),
    "InterleavedSample": _Type(("sequence",), _interleaved),
    "TextSample": _Type(("text",), lambda fields: [Text(fields.text("text"))]),
}
"""Energon's type -> what its samples are. Others have no text to learn, or need code of their own."""


def _accesses(path: str, text: str) -> tuple[Access, ...]:
    found = []
    for option in text.split(","):
        match = _ACCESS.fullmatch(option.strip())
        if match is None:
            raise DataError(f"{path}: {option!r} names no member. Write txt, or json[key].")
        found.append(Access(match[1], tuple(re.findall(r"\[([^\[\]]+)\]", match[2]))))
    return tuple(found)
