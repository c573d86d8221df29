"""YAML files whose scalars stay texts until the schema says what they are, and YAML that is written.

YAML 1.1 takes 2024_07 for a number, 1:30 for 90 and `no` for false; here a file gives what it says, to the
letter. Tags, which can name code to run, are refused, and so are keys that are there twice.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.resolver import BaseResolver

from k25_train.compose.references import OPENS
from k25_train.compose.values import MISSING, quote
from k25_train.errors import ConfigError

MOST_LEVELS = 30
MOST_NODES = 20_000
"""Of a file, each alias counted as often as it is used: hundreds of times a configuration."""
_KNOWN_TAGS = frozenset(
    (
        BaseResolver.DEFAULT_SCALAR_TAG,
        BaseResolver.DEFAULT_SEQUENCE_TAG,
        BaseResolver.DEFAULT_MAPPING_TAG,
    )
)

if TYPE_CHECKING:
    from upath import UPath


class _Texts(
    yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer, BaseResolver
):
    """Composes the nodes of a document without guessing at types."""

    def __init__(self, stream: str) -> None:
        yaml.reader.Reader.__init__(self, stream)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        BaseResolver.__init__(self)
        self.depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        """The next node. Raises YAMLError where lists and mappings lie deeper in each other than any do."""
        self.depth += 1
        if self.depth > MOST_LEVELS:
            raise yaml.YAMLError("is nested too deeply")
        node: Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes texts such that they are read back literally."""

    def text(self, text: str) -> ScalarNode:
        style = "'" if text == MISSING or OPENS in text else None
        return self.represent_scalar(BaseResolver.DEFAULT_SCALAR_TAG, text, style=style)


_Dumper.add_representer(str, _Dumper.text)


def dump(values: dict[str, Any]) -> str:
    """The values as YAML, in ASCII, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


RUN_CONFIG = "the config.yaml of a run folder"


def read_file(path: "Path | UPath", expected: str = RUN_CONFIG) -> dict[str, Any]:
    """The mapping that a file holds: names to texts as typed, None, lists and mappings.

    A scalar in quotes is in quotes here too (`values.quote`); one that is empty is None.

    Raises:
        ConfigError: the file cannot be read, is not YAML, holds a tag or a key twice, or is not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: cannot be read as a configuration: is not UTF-8 ({error})") from error
    return read_text(text, str(path), expected)


def read_text(text: str, where: str, expected: str = RUN_CONFIG) -> dict[str, Any]:
    """As `read_file`, of a text that came from `where`."""
    try:
        node = _Texts(text).get_single_node()
        values = _Reader().value(node) if node is not None else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: cannot be read as a configuration: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: is not a configuration but {_kind(values)}; expected {expected}")
    return values


def _kind(values: object) -> str:
    return "empty" if values is None else "a list" if isinstance(values, list) else "a single value"


class _Reader:
    """Turns nodes into values, up to `MOST_NODES` of them; an alias may be within what it names."""

    def __init__(self) -> None:
        self.num_nodes = 0

    def value(self, node: Node, level: int = 0) -> Any:
        """A text, None, a list or a mapping."""
        self.num_nodes += 1
        if level > MOST_LEVELS:
            raise yaml.YAMLError("is nested too deeply")
        if self.num_nodes > MOST_NODES:
            raise yaml.YAMLError(f"has more than {MOST_NODES} values")
        if node.tag not in _KNOWN_TAGS:
            raise yaml.YAMLError(
                f"line {_line(node)}: the tag {node.tag} is not read; write the value without it"
            )
        if isinstance(node, SequenceNode):
            return [self.value(item, level + 1) for item in node.value]
        if isinstance(node, MappingNode):
            return self.mapping(node, level)
        assert isinstance(node, ScalarNode)
        if node.style is not None:
            return quote(node.value)
        return node.value or None

    def mapping(self, node: MappingNode, level: int) -> dict[str, Any]:
        """A mapping, each key once."""
        values: dict[str, Any] = {}
        for key, item in node.value:
            if not isinstance(key, ScalarNode):
                raise yaml.YAMLError(f"line {_line(key)}: a key is a single word")
            if key.value in values:
                raise yaml.YAMLError(
                    f"line {_line(key)}: the key {key.value} is there twice; remove one of them"
                )
            values[key.value] = self.value(item, level + 1)
        return values


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1
