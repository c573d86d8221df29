"""The chat set: its sources, its splits, and that it is built once."""

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.config.sources import SourceConfig, SourceFormat
from k25_train.data.chat.messages import parse_conversation
from k25_train.data.chat_set import build
from k25_train.data.chat_set.build import ChatSetOptions, build_chat_set
from k25_train.data.chat_set.sources import CODE, DIALOGUES, ChatSource, Talk
from k25_train.data.commands.indexing import index_source
from k25_train.data.loader import DataLoader
from k25_train.data.open_source import open_source
from k25_train.data.smoke_set.sources.archive import ArchiveReader
from k25_train.data.smoke_set.sources.base import Archives
from k25_train.data.smoke_set.sources.writing import django_files
from k25_train.data.tokenizer import load_tokenizer
from k25_train.data.traces.conversation import TraceOptions
from k25_train.errors import DataError
from tests.helpers.tiny_shards import (
    tiny_data_config,
    tiny_train_config,
    tiny_vision_config,
    write_tiny_shard_set,
)

FUNCTION = '''
class Box:
    @property
    # seen
    def width(self) -> int:
        """The width of the box, which is never negative.

        In pixels.
        """
        # The right edge is outside.
        return self.right - self.left

    def short(self):
        """Too short."""
        return 1

    def described(self):
        """Only a docstring, which asks for nothing at all."""
'''


def archives(package: str, **members: str) -> Archives:
    """An opened archive of a package with these members, `/` written as `__`."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    reader = ArchiveReader.__new__(ArchiveReader)
    reader.path, reader._zip, reader._contents = Path(package), zipfile.ZipFile(data), {}
    return {package: reader}


def test_dialogues_are_whole_exchanges_each_once() -> None:
    text = """
conversations:
- [Hi, " Hello ", Fine]
- [Hi, Hello]
- [Year, 1963]
- [Alone]
- [Hi, ""]
"""
    found = archives(
        "chatterbot-corpus",
        corpus__data__english__a_dot_yml=text,
        corpus__data__french__a_dot_yml="conversations: [[Salut, Bonjour]]",
    )
    talks = list(DIALOGUES.talks(found))
    assert [each.turns for each in talks] == [("Hi", "Hello"), ("Year", "1963")]
    with pytest.raises(DataError, match=r"member corpus/data/english/a\.yml has no conversations"):
        list(DIALOGUES.talks(archives("chatterbot-corpus", corpus__data__english__a_dot_yml="[1]")))


def test_functions_are_asked_for_by_their_docstrings() -> None:
    found = archives(
        "django",
        django5__django__shapes_dot_py=FUNCTION + "# " + "x" * 200,
        django5__tests__a_dot_py=FUNCTION,
    )
    [talk] = CODE.talks(found)
    asked, code = talk.turns
    request, _, described = asked.partition("\n\n")
    assert request == "Write the function `width(self)` of `django/shapes.py`."
    assert described == "The width of the box, which is never negative.\n\nIn pixels."
    assert code == (
        "```python\n@property\n# seen\ndef width(self) -> int:\n"
        "    # The right edge is outside.\n    return self.right - self.left\n```"
    )
    # What the smoke set holds out is held out here: groups have the same names.
    assert [group for group, _ in django_files(found, ".py")] == [talk.group]


def few(archives: Archives) -> Iterator[Talk]:
    for number in range(60):
        yield Talk(f"group {number // 2}", (f"Say {number}", f"It is {number}", "More", "No"))
    yield Talk("long", ("Say", "word " * 2_000))


FEW = ChatSource(name="few", archives=(), licence="0BSD", attribution="Nobody.", talks=few)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> ChatSetOptions:
    """What a small set is made from."""
    folder = tmp_path_factory.mktemp("chat")
    return ChatSetOptions(
        smoke=write_tiny_shard_set(folder / "smoke"),
        out=folder / "chat",
        downloads=folder / "downloads",
        num_traces=4,
        workers=0,
        sources=(FEW,),
    )


@pytest.fixture(scope="module")
def built(options: ChatSetOptions) -> Path:
    """It."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "HELDOUT", 0.3)
        patch.setattr(build, "MAX_TOKENS", 4_000)
        patch.setattr(build, "TRACES", TraceOptions(families=("darkest_quarter",), heldout=0.5, slips=0.0))
        assert build_chat_set(options, lambda line: None)
        assert not build_chat_set(options, lambda line: None)
    return options.out


def test_the_set_has_two_splits_that_share_no_group(built: Path) -> None:
    said = {}
    for split in ("train", "heldout"):
        lines = (built / split / "few.jsonl").read_bytes().splitlines()
        found = [parse_conversation(line).messages for line in lines]
        assert all([each.role for each in messages] == ["user", "assistant"] * 2 for messages in found)
        said[split] = {int(str(messages[0].content[0]).split()[1]) // 2 for messages in found}
    assert said["train"] and said["heldout"]
    assert not said["train"] & said["heldout"]
    facts = json.loads((built / "chat.json").read_text())["sources"]
    assert facts["few"]["train"] + facts["few"]["heldout"] == 60
    assert facts["few"]["too_long"] == 1
    assert facts["few"]["licence"] == "0BSD"
    assert facts["traces"]["train"] + facts["traces"]["heldout"] == 4
    assert facts["traces"]["thrown_away"] == 0
    assert "0BSD" in (built / "LICENSES.md").read_text()


def test_what_it_is_made_from_decides_whether_it_is_built_again(
    built: Path, options: ChatSetOptions, tmp_path: Path
) -> None:
    asked = replace(options, out=tmp_path / "again", num_traces=1, sources=())
    assert build_chat_set(asked, lambda line: None)
    assert not build_chat_set(asked, lambda line: None)
    assert build_chat_set(replace(asked, num_traces=2), lambda line: None)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(DataError, match="is there but is no chat set"):
        build_chat_set(replace(asked, out=tmp_path / "other"), lambda line: None)


def test_files_called_heldout_are_a_split_of_their_own(built: Path) -> None:
    source = SourceConfig(format=SourceFormat.chat, path="*/few.jsonl")
    data = replace(tiny_data_config(built), tokenizer=str(built / "tokenizer.json"), sources={"few": source})
    index_source("few", data, str(data.tokenizer), 0, lambda *_: None)
    opened = open_source("few", data, load_tokenizer(built / "tokenizer.json"), checks_shards=True)
    num_train, num_heldout = (
        len((built / split / "few.jsonl").read_text().splitlines()) for split in ("train", "heldout")
    )
    assert opened.items_of("train") == (0, num_train)
    assert opened.items_of("heldout") == (num_train, num_train + num_heldout)
    train = replace(tiny_train_config(), seq_len=128, eval_sequences=2)
    with DataLoader(data, train, tiny_vision_config()) as loader:
        trained = {piece.record.shard for each in loader.plan(0).sequences for piece in each.pieces}
    assert trained == {"train/few.jsonl"}

    # A number of conversations to hold out, too, or nothing to train on, is refused.
    twice = replace(data, sources={"few": replace(source, heldout=3)})
    with pytest.raises(DataError, match=r"sources\.few\.heldout is 3, but its files say what is held out"):
        index_source("few", twice, str(data.tokenizer), 0, lambda *_: None)
    with pytest.raises(DataError, match=r"sources\.few\.heldout=3, but the names of its files"):
        DataLoader(twice, train, tiny_vision_config())
    (built / "all" / "heldout").mkdir(parents=True)
    (built / "all" / "heldout" / "a.jsonl").write_bytes((built / "heldout" / "few.jsonl").read_bytes())
    alone = replace(data, sources={"few": replace(source, path="all/*/a.jsonl")})
    with pytest.raises(DataError, match="all of its files are held out by their names"):
        index_source("few", alone, str(data.tokenizer), 0, lambda *_: None)
