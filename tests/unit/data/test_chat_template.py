"""Conversations as text: equal to the released template, with the mask on what is generated alone."""

import json
from typing import Any

import pytest

from k25_train.data.chat.messages import MediaPart, parse_conversation
from k25_train.data.chat.template import Document, Special, render
from k25_train.data.chat.tool_schema import declare_tools
from tests.helpers.chat_goldens import CLOSE, OPEN, VIDEO_PLACEHOLDER, Golden, goldens

_IMAGE = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"
_PARAMETERS = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


def drawn(document: Document) -> str:
    """A document with marks around what is learned."""
    text, learned = "", False
    for piece in document:
        is_learned = not isinstance(piece, MediaPart) and piece.learned
        if is_learned != learned:
            text += OPEN if is_learned else CLOSE
            learned = is_learned
        if isinstance(piece, MediaPart):
            text += _IMAGE if piece.type == "image" else VIDEO_PLACEHOLDER
        else:
            text += piece.name if isinstance(piece, Special) else piece.text
    return text + (CLOSE if learned else "")


def rendered(*messages: dict[str, Any], **others: Any) -> list[str]:
    """The documents of a conversation."""
    line = json.dumps({"messages": messages, **others}).encode()
    return [drawn(document) for document in render(parse_conversation(line))]


@pytest.mark.parametrize("golden", goldens(), ids=lambda golden: golden.name)
def test_is_what_the_released_template_writes_and_learns_what_is_generated(golden: Golden) -> None:
    documents = render(parse_conversation(golden.line))
    assert [drawn(document) for document in documents] == golden.documents


def test_every_turn_is_learned_in_one_document() -> None:
    user, masked = {"role": "user", "content": "u"}, {"role": "assistant", "content": "no", "weight": 0}
    plain = {"role": "assistant", "content": "plain"}
    thought = {"role": "assistant", "content": "said", "reasoning_content": "thought"}
    documents = rendered(user, plain, user, thought, user, masked, user, plain, user, thought, user, masked)
    learned = [part.partition(CLOSE)[0] for document in documents for part in document.split(OPEN)[1:]]
    said = "thought</think>said<|im_end|>"
    assert learned == ["plain<|im_end|>", said, "plain<|im_end|>", said]
    assert len(documents) == 2 and all(document.count("thought") == 1 for document in documents)


def test_calls_are_named_as_the_model_names_them() -> None:
    def call(identity: str) -> dict[str, Any]:
        return {"id": identity, "function": {"name": "f", "arguments": "{}"}}

    (document,) = rendered(
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "", "tool_calls": [call("call_x"), call("call_y")]},
        {"role": "tool", "content": "r", "tool_call_id": "call_y"},
        {"role": "assistant", "content": "", "tool_calls": [call("functions.f:7")]},
    )
    parts = document.split("<|tool_call_begin|>")
    assert [part.partition("<|")[0] for part in parts[1:]] == [
        "functions.f:0",
        "functions.f:1",
        "functions.f:7",
    ]
    assert "## Return of functions.f:1\nr" in document


def test_tools_without_a_form_as_types_are_declared_as_json() -> None:
    tools = [
        {
            "type": "function",
            "function": {"parameters": {"properties": {"x": {"$ref": "#/other"}}}, "name": "é"},
        }
    ]
    expected = (
        '[{"function":{"name":"é","parameters":{"properties":{"x":{"$ref":"#/other"}}}},"type":"function"}]'
    )
    assert declare_tools(tools) == expected


def test_schemas_are_declared_as_types() -> None:
    parameters = {
        "$defs": {"Point": {**_PARAMETERS, "description": "Where.\n\nIn pixels."}},
        "type": "object",
        "required": ["z", "list"],
        "additionalProperties": False,
        "properties": {
            "z": {"type": "integer", "minimum": 0, "description": "Depth"},
            "list": {"type": "array", "minItems": 1, "items": {"type": "string", "description": "A word"}},
            "at": {"$ref": "#/$defs/Point"},
            "how": {"anyOf": [{"enum": ["a", 1, None]}, {"type": ["array", "null"]}, {}]},
            "b": {"type": "boolean", "default": True},
            "any": True,
            "deep": {"type": "object", "additionalProperties": {"type": "number"}},
            "me": {"type": "array", "items": {"$ref": "#/$defs/Point"}, "default": ["é"]},
        },
    }
    tool = {"type": "function", "function": {"name": "f", "description": "Does.", "parameters": parameters}}
    expected = """# Tools

## functions
namespace functions {
// Where.

// In pixels.
interface Point {
  a: string
}
// Does.
type f = (_: {
  // minItems: 1
  list: Array<
    // A word
    string
  >,
  // Depth
  // minimum: 0
  z: number,
  any?: any,
  at?: Point,
  // Default: True
  b?: boolean,
  deep?: {
    [k: string]: number
  },
  how?: "a" | 1 | None | Array<any> | null | any,
  // Default: ["é"]
  me?: Array<Point>,
  [k: string]: never
}) => any;
}
"""
    assert declare_tools([{"type": "plugin"}, tool]) == expected


def test_a_schema_may_refer_to_itself() -> None:
    parameters = {"type": "object", "properties": {"next": {"$ref": "#"}, "a": {"type": "null"}}}
    declared = declare_tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    types = "interface parameters {\n  a?: null,\n  next?: parameters\n}\ntype f = (_: parameters) => any;\n"
    assert declared.endswith("{\n" + types + "}\n")
