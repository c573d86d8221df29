"""What each layout of a sample says: its words, its media in their places, and what is learned."""

from typing import Any

import pytest

from k25_train.data.formats.sample_json import SampleError
from k25_train.data.tar.layouts import StemLayout, Text, json_parts, natural_order, place_media

Placed = list[Text | tuple[str, str | None]]


def placed(content: Any, *media: str) -> Placed:
    return place_media(json_parts(content), "folder/doc", media)


IMAGES = ("10.jpg", "2.jpg", "1.jpg")
LAYOUTS: dict[str, tuple[Any, tuple[str, ...], Placed]] = {
    "caption": ({"caption": "a", "url": "b"}, ("jpg",), [("jpg", None), Text("a")]),
    "caption before text": ({"text": "b", "caption": "a"}, ("jpg",), [("jpg", None), Text("a")]),
    "question": (
        {"question": "q", "answer": "a"},
        ("jpg",),
        [("jpg", None), Text("q", loss=False), Text("a")],
    ),
    "many media": (
        {"text": "a"},
        IMAGES,
        [("1.jpg", None), ("2.jpg", None), ("10.jpg", None), Text("a")],
    ),
    "segments": (
        {
            "segments": [
                {"type": "text", "text": "a", "loss": False},
                {"type": "image", "member": "2.jpg"},
                {"type": "text", "text": "b"},
                {"type": "image", "member": "doc.1.jpg"},
                {"type": "video", "member": "x.gif"},
            ]
        },
        ("1.jpg", "2.jpg", "x.gif"),
        [Text("a", loss=False), ("2.jpg", "image"), Text("b"), ("1.jpg", "image"), ("x.gif", "video")],
    ),
    "a list of segments": (
        [{"type": "image"}, {"type": "text", "text": "a"}, {"type": "image"}],
        ("1.jpg", "2.jpg"),
        [("1.jpg", "image"), Text("a"), ("2.jpg", "image")],
    ),
    "OBELICS": (
        {"texts": [None, "a", None], "images": ["http://x/b.jpg", None, "http://x/a.jpg"]},
        ("1.jpg", "0.png"),
        [("0.png", "image"), Text("a"), ("1.jpg", "image")],
    ),
    "MMC4": (
        {
            "text_list": ["a", "b"],
            "image_info": [
                {"image_name": "1.jpg", "matched_text_index": 1},
                {"image_name": "0.jpg", "matched_text_index": 1},
            ],
        },
        ("0.jpg", "1.jpg"),
        [Text("a\n"), ("1.jpg", "image"), ("0.jpg", "image"), Text("b\n")],
    ),
    "timed": (
        {"segments": [{"start": 0, "end": 1.5, "text": " Hi "}, {"start": 61.25, "text": "Bye"}]},
        ("mp4",),
        [("mp4", None), Text("00:00:00.000 Hi\n"), Text("00:01:01.250 Bye\n")],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_json(name: str) -> None:
    content, media, expected = LAYOUTS[name]
    assert placed(content, *media) == expected


REFUSED: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "nothing known": ({"title": "a", "url": "b"}, ("jpg",), "none of caption, .*; it has title, url"),
    "a number": (3, ("jpg",), "its JSON is a int"),
    "a text that is none": ([{"type": "text", "text": 3}], (), "the text of its segment 0 is a int"),
    "a text that is missing": ([{"type": "text"}], (), "the text of its segment 0 is missing"),
    "half an emoji": ({"caption": "\ud800"}, ("jpg",), "half of a surrogate pair"),
    "loss that is none": ([{"type": "text", "text": "a", "loss": 1}], (), "loss=1 of its segment 0"),
    "an unknown segment": ([{"type": "audio"}], (), "segment 0 is of type 'audio'"),
    "a missing image": ([{"type": "image", "member": "7.jpg"}], ("1.jpg", "2.jpg"), "7.jpg and has 1.jpg, 2"),
    "too few images": (
        {"texts": [None, None], "images": ["u", "v"]},
        ("1.jpg",),
        "refers to u and has 1.jpg",
    ),
    "lists of other lengths": ({"texts": ["a"], "images": []}, (), "1 texts and 0 images"),
    "no time": ({"segments": [{"start": "1", "text": "a"}]}, ("mp4",), "start='1' of its segment 0"),
    "no matching text": (
        {"text_list": ["a"], "image_info": [{"image_name": "1.jpg", "matched_text_index": 1}]},
        ("1.jpg",),
        "image_info 0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_documents_that_cannot_be_used_are_told(name: str) -> None:
    content, media, reason = REFUSED[name]
    with pytest.raises(SampleError, match=reason):
        placed(content, *media)


def test_which_member_has_the_words() -> None:
    layout = StemLayout()
    assert layout.words_of(("jpg", "json", "txt")) == ("txt",)
    assert layout.words_of(("jpg", "json", "cls")) == ("json",)
    assert layout.words_of(("jpg", "en.txt", "txt")) == ("txt",)
    assert layout.words_of(("jpg", "caption.txt")) == ("caption.txt",)
    assert layout.words_of(("jpg",)) == ()
    with pytest.raises(SampleError, match=r"has 2 texts, de.txt and en.txt"):
        layout.words_of(("de.txt", "en.txt"))
    with pytest.raises(SampleError, match=r"its text is not UTF-8 \(byte 1\)"):
        layout.parts({"txt": b"a\xff"})


def test_numbers_in_names_are_ordered_by_value() -> None:
    ordered = ["1", "01b", "2.png", "10.png", "1" * 5000, "a", "a2²3", "a10"]

    backwards = ordered[::-1]
    assert sorted(backwards, key=natural_order) == ordered
