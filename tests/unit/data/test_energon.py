"""Folders that megatron-energon prepared: splits, exclusions and field maps are its own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from k25_train.data.folder import DataFolder
from k25_train.data.formats import braces
from k25_train.data.formats.braces import expand_braces
from k25_train.data.formats.sample_json import SampleError
from k25_train.data.tar.energon import layout_of, load_energon
from k25_train.data.tar.layouts import StemLayout, Text, place_media
from k25_train.errors import DataError

# As `energon prepare` of megatron-energon 7.4.1 wrote them for three shards of four samples each, with
# --split-parts train:shard_[01].tar --split-parts val:shard_2.tar --sample-type VQASample.
INFO = """{
  "energon_version": "7.4.1",
  "shard_counts": {
    "shard_0.tar": 4,
    "shard_1.tar": 4,
    "shard_2.tar": 4
  }
}"""
SPLIT = """split_parts:
  train:
  - shard_{0..1}.tar
  val:
  - shard_2.tar
exclude: []
"""
DATASET = """sample_type:
  __module__: megatron.energon
  __class__: VQASample
field_map:
  image: jpg
  context: json[question]
  answers: json[answers]
"""
WITH_LOADER = """sample_type:
  __module__: megatron.energon
  __class__: CaptioningSample
sample_loader: sample_loader.py:sample_loader
part_filter: sample_loader.py:part_filter
"""
CRUDE = """__module__: megatron.energon
__class__: CrudeWebdataset
"""
FILES = {".info.json": INFO, "split.yaml": SPLIT, "dataset.yaml": DATASET}


@pytest.fixture
def prepared(tmp_path: Path) -> Callable[..., DataFolder]:
    def write(**changes: str | None) -> DataFolder:
        meta = tmp_path / ".nv-meta"
        meta.mkdir(exist_ok=True)
        for name, text in {
            **FILES,
            **{key.replace("__", "."): text for key, text in changes.items()},
        }.items():
            (meta / name).unlink(missing_ok=True)
            if text is not None:
                (meta / name).write_text(text)
        return DataFolder(str(tmp_path))

    return write


def test_splits_are_those_that_energon_wrote(prepared: Callable[..., DataFolder]) -> None:
    shards = load_energon(prepared()).shards

    assert [(each.name, each.split, each.num_samples) for each in shards] == [
        *(("shard_0.tar", "train", 4), ("shard_1.tar", "train", 4), ("shard_2.tar", "heldout", 4))
    ]


def test_older_files_and_exclusions(prepared: Callable[..., DataFolder]) -> None:
    split = SPLIT.replace("[]", "['shard_0.tar', 'shard_{1..2}.tar/a/{x,y}']")
    folder = prepared(
        **{
            ".info__json": None,
            ".info__yaml": "shard_counts: {shard_0.tar: 4, shard_1.tar: 4, shard_2.tar: 4}",
        },
        split__yaml=split,
        dataset__yaml=CRUDE,
    )

    found = load_energon(folder)

    excluded = frozenset({"a/x", "a/y"})
    assert [(each.name, each.excluded) for each in found.shards] == [
        *(("shard_1.tar", excluded), ("shard_2.tar", excluded))
    ]
    assert isinstance(found.layout, StemLayout)


REFUSED: dict[str, tuple[dict[str, str | None], str]] = {
    "not prepared": ({".info__json": None}, "not prepared. Run `energon prepare .*format=webdataset"),
    "code": ({"dataset__yaml": WITH_LOADER}, r"sample_loader.*is not run. State a field_map"),
    "no types": ({"dataset__yaml": "field_map: {image: jpg}"}, "samples of type None are not read"),
    "no field map": ({"dataset__yaml": DATASET.partition("field_map")[0]}, "has no field_map"),
    "no such type": (
        {"dataset__yaml": DATASET.replace("VQA", "SimilarityInterleaved")},
        "samples of type SimilarityInterleavedSample are not read; those of CaptioningSample",
    ),
    "a field is missing": ({"dataset__yaml": DATASET.replace("context:", "other:")}, "has no context"),
    "words in pickle": (
        {"dataset__yaml": DATASET.replace("json[question]", "pyd")},
        "context is read from .pyd, which is neither .txt nor .json",
    ),
    "tags": ({"dataset__yaml": "!!python/object/apply:os.system [ls]"}, "malformed"),
    "in both splits": ({"split__yaml": SPLIT.replace("_2.", "_1.")}, "shard_1.tar is named twice"),
    "a stale info": (
        {"split__yaml": SPLIT.replace("_2.", "_3.")},
        "names shard_3.tar, which .info.json does",
    ),
    "outside": (
        {".info__json": INFO.replace("shard_2", "../s"), "split__yaml": SPLIT.replace("shard_2", "../s")},
        "names files in its folder",
    ),
    "no shards": ({"split__yaml": "split_parts: {test: [shard_0.tar]}"}, "no shard in train or val"),
    "no lists": ({"split__yaml": "split_parts: 3"}, "malformed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_with_a_remedy(name: str, prepared: Callable[..., DataFolder]) -> None:
    changes, reason = REFUSED[name]
    with pytest.raises(DataError, match=reason):
        load_energon(prepared(**changes))


ANSWERS = {"question": "q", "answers": ["a", "b"], "answer_weights": [0.1, 0.9]}
SAMPLES: dict[str, tuple[dict[str, str], dict[str, Any], list[Any]]] = {
    "CaptioningSample": (
        {"image": "png,jpg", "caption": "txt,json[t][0]"},
        {"json": {"t": ["a"]}},
        [("jpg", "image"), Text("a")],
    ),
    "OCRSample": ({"image": "jpg", "text": "txt"}, {"txt": "a"}, [("jpg", "image"), Text("a")]),
    "VQASample": (
        {"image": "jpg", "context": "json[question]", "answers": "json[answers]"},
        {"json": ANSWERS},
        [("jpg", "image"), Text("q", loss=False), Text("a")],
    ),
    "VidQASample": (
        {
            "video": "jpg",
            "context": "q.txt",
            "answers": "json[answers]",
            "answer_weights": "json[answer_weights]",
        },
        {"json": ANSWERS, "q.txt": "what"},
        [("jpg", "video"), Text("what", loss=False), Text("b")],
    ),
    "MultiChoiceVQASample": (
        {"image": "jpg", "context": "txt", "choices": "json[c]", "correct_choice_idx": "json[i]"},
        {"json": {"c": ["a", "b"], "i": 1}, "txt": "q"},
        [("jpg", "image"), Text("q", loss=False), Text("b")],
    ),
    "InterleavedSample": (
        {"sequence": "json"},
        {"json": ["a", {"type": "image", "member": "jpg"}, "b"]},
        [Text("a"), ("jpg", "image"), Text("b")],
    ),
    "TextSample": ({"text": "json[x]"}, {"json": {"x": "a"}}, [Text("a")]),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_fields_of_each_type(name: str) -> None:
    field_map, words, expected = SAMPLES[name]
    layout = layout_of("dataset.yaml", {"sample_type": {"__class__": name}, "field_map": field_map})
    data = {
        suffix: (text if isinstance(text, str) else json.dumps(text)).encode()
        for suffix, text in words.items()
    }

    chosen = layout.words_of(("jpg", *data, "cls"))

    assert chosen == tuple(data)
    assert place_media(layout.parts(data), "stem", ["jpg"]) == expected
    with pytest.raises(SampleError, match=r"not a string|none of its choices|no list"):
        layout.parts({})


def test_braces() -> None:
    assert list(expand_braces("a{0..2}b{x,y{8..9}}")) == [
        f"a{number}b{end}" for number in range(3) for end in ("x", "y8", "y9")
    ]
    assert list(expand_braces("s-{008..010}.tar")) == ["s-008.tar", "s-009.tar", "s-010.tar"]
    assert list(expand_braces("plain")) == ["plain"]
    for wrong in ("{a", "{0..99999999999}"):
        with pytest.raises(ValueError, match=r"not closed|more than"):
            list(expand_braces(wrong))


def test_braces_that_multiply_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(braces, "MAX_NAMES", 1000)

    assert len(list(expand_braces("{0..9}{0..9}{0..9}"))) == 1000
    with pytest.raises(ValueError, match="more than 1000 names"):
        list(expand_braces("{a,b}" * 40))
