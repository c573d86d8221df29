"""What is no conversation to learn from, each with its reason."""

import json
from typing import Any

import pytest

from k25_train.data.chat.messages import parse_conversation
from k25_train.data.formats.sample_json import SampleError

USER = {"role": "user", "content": "u"}
ASSISTANT = {"role": "assistant", "content": "a"}


def part(**fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": [fields]}


def called(function: object, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "x", "function": function}], **fields}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "its `messages` are empty"),
        ([USER], "no message of the assistant is left to learn from"),
        ([USER, {**ASSISTANT, "loss": False}], "no message of the assistant is left to learn from"),
        ("u", "`messages` of the conversation is a string, not a list"),
        (["u"], "message 0 is a string, not an object"),
        ([{"content": "u"}, ASSISTANT], "message 0 has no `role`; it needs a string"),
        ([{"role": "human", "content": "u"}, ASSISTANT], "message 0 has the role 'human'; known ones"),
        ([{"role": "user"}, ASSISTANT], "message 0 has no `content`"),
        ([{"role": "user", "content": 3}, ASSISTANT], "the `content` of message 0 is a int, not"),
        ([USER, {"role": "assistant"}], "message 1 has neither `content` nor `tool_calls`"),
        ([part(type="audio"), ASSISTANT], "message 0, part 0 has the type 'audio'; known ones: text, image"),
        ([part(type="text"), ASSISTANT], "message 0, part 0 has no `text`"),
        ([part(type="image", image={}), ASSISTANT], "message 0, part 0 is of type image and names no file"),
        ([{**part(type="image", image="x"), "role": "assistant"}], "is the assistant's and has media"),
        ([USER, {**ASSISTANT, "content": "<think>t</think>a"}], "put that into `reasoning_content`"),
        (
            [{**USER, "loss": True}, ASSISTANT],
            "message 0 is not the assistant's, whose words alone are learned",
        ),
        ([USER, {**ASSISTANT, "loss": 1}], "`loss` of message 1 is a whole number, not true or false"),
        ([USER, {**ASSISTANT, "weight": 0.5}], "`weight` of message 1 is 0.5; it may be 0 or 1"),
        ([{**USER, "reasoning_content": "t"}, ASSISTANT], "which only the assistant has"),
        ([USER, {**ASSISTANT, "function_call": {"name": "f"}}], "write `tool_calls`"),
        ([USER, called("f")], "`function` of message 1, tool call 0 is a string, not an object"),
        ([USER, called({"name": "f"})], "arguments of message 1, tool call 0 are neither"),
        (
            [USER, {"role": "tool", "content": "r", "tool_call_id": "y"}, ASSISTANT],
            "message 1 is the result of call 'y', which nobody has made",
        ),
        ([USER, {"role": "tool", "content": "r"}, ASSISTANT], "message 1 has no `tool_call_id`"),
        ([USER, {**ASSISTANT, "content": ""}], "message 1 is an empty answer"),
        ([USER, {**ASSISTANT, "content": " \n", "reasoning_content": "t"}], "message 1 is an empty answer"),
        ([USER, {**ASSISTANT, "content": []}], "message 1 is an empty answer"),
        (
            [USER, called({"name": "f", "arguments": "{'x': 1}"})],
            "the arguments of message 1, tool call 0 are not valid JSON",
        ),
        ([USER, called({"name": "f", "arguments": ""})], "tool call 0 are not valid JSON"),
        ([USER, called({"name": "f", "arguments": "[1]"})], "tool call 0 are JSON, but no object"),
        ([USER, {**ASSISTANT, "finish_reason": "length"}], "message 1 was cut off at a limit of tokens"),
        ([USER, {**ASSISTANT, "finish_reason": 3}], "`finish_reason` of message 1 is a whole number"),
    ],
)
def test_no_conversation(messages: object, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse_conversation(json.dumps({"messages": messages}).encode())
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "is not valid JSON"),
        (b'{"messages": []} x', "is not valid JSON"),
        (b'{"messages": NaN}', "NaN is not JSON"),
        (b'{"messages": [], "messages": []}', "key 'messages' is there twice"),
        (b"[]", "its JSON is a list, not an object"),
        (b'{"messages": "\xff"}', "its JSON is not UTF-8"),
        (b'{"messages": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"conversations": []}', "the conversation has no `messages`"),
        (b'{"messages": [{"role": "assistant", "content": "a"}], "tools": {}}', "its `tools` are a dict"),
        (
            b'{"messages": [{"role": "assistant", "content": "a"}], "tools": "["}',
            "text that is not valid JSON",
        ),
        (b'{"messages": [{"role": "assistant", "content": "a"}], "tools": [1]}', "tool 0 is a whole number"),
        (
            b'{"messages": [{"role": "assistant", "content": "a"}], "tools": [{"type": "function"}]}',
            "tool 0 has no `function`",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "a"}], "chat_template_kwargs": {"thinking": 1}}',
            "`thinking` of `chat_template_kwargs` is a whole number, not true or false",
        ),
    ],
)
def test_no_line_of_conversation(line: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        parse_conversation(line)
    assert reason in caught.value.reason


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "to be conti", "finish_reason": "length"},
        called({"name": "f", "arguments": "{'x'"}),
    ],
)
def test_what_is_only_shown_may_be_anything(message: dict[str, Any]) -> None:
    shown = {**message, "loss": False}
    conversation = parse_conversation(json.dumps({"messages": [USER, shown, ASSISTANT]}).encode())
    assert [each.learned for each in conversation.messages] == [False, False, True]


def test_null_is_as_good_as_nothing_and_other_keys_are_passed_over() -> None:
    message = {**ASSISTANT, "refusal": None, "tool_calls": None, "reasoning_content": None, "name": None}
    plain = parse_conversation(json.dumps({"messages": [USER, ASSISTANT]}).encode())
    assert parse_conversation(json.dumps({"messages": [USER, message], "id": 3}).encode()) == plain


def test_tools_may_be_text() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    as_text = json.dumps({"messages": [USER, ASSISTANT], "tools": json.dumps(tools)}).encode()
    assert list(parse_conversation(as_text).tools) == tools
