"""Whether the tool calls in a response are whole: Kimi's tokens in their order, and arguments that are JSON.

<|tool_calls_section_begin|>
    <|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}<|tool_call_end|> …
<|tool_calls_section_end|>
"""

import json
import re

_TOKEN = re.compile(r"<\|tool_call(?:s_section_begin|s_section_end|_begin|_argument_begin|_end)\|>")
_SECTION = re.compile(r"<\|tool_calls_section_begin\|>(.*?)<\|tool_calls_section_end\|>", re.DOTALL)
_CALL = re.compile(
    r"\s*<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)<\|tool_call_end\|>\s*", re.DOTALL
)
_ID = re.compile(r"functions\.[^\s:]+:\d+")


def malformed_call(text: str) -> str:
    """What is wrong with the first tool call that is malformed; empty where all are well-formed, or none.

    `text`: of a response that the model has ended, special tokens by name.
    """
    if not _TOKEN.search(text):
        return ""
    if _TOKEN.search(_SECTION.sub("", text)):
        return "a token of tool calls outside of a section that begins and ends"
    for section in _SECTION.findall(text):
        position = 0
        while position < len(section):
            call = _CALL.match(section, position)
            if call is None:
                return f"no call at {section[position : position + 40]!r}"
            if wrong := _wrong_with(call[1].strip(), call[2]):
                return wrong
            position = call.end()
        if not position:
            return "a section without a call"
    return ""


def _wrong_with(name: str, arguments: str) -> str:
    if not _ID.fullmatch(name):
        return f"the call {name!r} is not named functions.NAME:NUMBER"
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError) as error:
        return f"the arguments of {name} are no JSON ({error})"
    return "" if isinstance(values, dict) else f"the arguments of {name} are no JSON object"
