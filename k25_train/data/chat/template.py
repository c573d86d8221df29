"""Kimi K2.5's chat template: from a conversation to special tokens, text and media, and what is learned.

    <|im_system|>tool_declare<|im_middle|>…<|im_end|>                          only with tools
    <|im_user|>user<|im_middle|>…<|im_end|>
    <|im_assistant|>assistant<|im_middle|><think>…</think>…
        <|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:0
        <|tool_call_argument_begin|>{…}<|tool_call_end|><|tool_calls_section_end|><|im_end|>
    <|im_system|>tool<|im_middle|>## Return of functions.NAME:0⏎…<|im_end|>

There are no blanks or line ends between the parts, except one line end after every image and video.
Source: `chat_template.jinja` of moonshotai/Kimi-K2.5 since 2026-01-29, without a default system message;
`preserve_thinking` is K2.6's.

What is learned is what the assistant generates: all that follows the generation prompt, `<|im_end|>`
included. That prompt ends with `<think>` where it is asked to think, else with `<think></think>`. How
Moonshot masks its own fine-tuning is not disclosed.

The template shows earlier exchanges without their reasoning, so a conversation with reasoning in several
exchanges is several documents: each as the model sees it when it generates, and every turn is learned in one.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from k25_train.data.chat.messages import Conversation, MediaPart, Message
from k25_train.data.chat.tool_schema import declare_tools

_OPENINGS = {"user": "<|im_user|>", "assistant": "<|im_assistant|>"}
_OTHER_OPENING = "<|im_system|>"


@dataclass(frozen=True, slots=True)
class Special:
    """A special token by its name."""

    name: str
    learned: bool


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, whatever is written in it."""

    text: str
    learned: bool


Piece = Special | Text | MediaPart
Document = tuple[Piece, ...]
"""Pieces in reading order; no two texts follow one another."""


def render(conversation: Conversation) -> tuple[Document, ...]:
    """The documents of a conversation, at least one; each shows all that comes before what it teaches."""
    messages = conversation.messages
    answers = [position for position, message in enumerate(messages) if message.is_answer]
    ends = sorted({*answers, len(messages) - 1})
    if conversation.preserve_thinking or conversation.thinking is False:
        learned = {position for position, message in enumerate(messages) if message.learned}
        return (_lay_out(conversation, messages, -1, learned),)

    # Exchanges without reasoning look the same later on, so the next document may learn them, too.
    documents = []
    waiting: set[int] = set()
    shown_from = 0
    for end in ends:
        exchange = range(shown_from, end + 1)
        waiting |= {position for position in exchange if messages[position].learned}
        has_reasoning = any(messages[position].reasoning for position in exchange)
        if waiting and (has_reasoning or end == ends[-1]):
            documents.append(_lay_out(conversation, messages[: end + 1], shown_from - 1, waiting))
            waiting = set()
        shown_from = end + 1
    return tuple(documents)


def _lay_out(
    conversation: Conversation, messages: tuple[Message, ...], last_without: int, learned: Collection[int]
) -> Document:
    """One document; messages up to `last_without` are shown without their reasoning."""
    pieces: list[Piece] = []
    if conversation.tools:
        declared = Text(declare_tools(conversation.tools), False)
        pieces += [*_heading("system", "tool_declare"), declared, Special("<|im_end|>", False)]
    for position, message in enumerate(messages):
        pieces += _heading(message.role, message.name)
        if message.role == "assistant":
            keeps = position > last_without and conversation.thinking is not False
            reasoning = message.reasoning if keeps else ""
            thinks = bool(message.reasoning) if conversation.thinking is None else conversation.thinking
            pieces += _generated(message, reasoning, thinks, position in learned)
        else:
            if message.role == "tool":
                pieces.append(Text(f"## Return of {message.tool_call_id}\n", False))
            pieces += _content(message)
            pieces.append(Special("<|im_end|>", False))
    return tuple(_joined(pieces))


def _heading(role: str, name: str) -> list[Piece]:
    opening = _OPENINGS.get(role, _OTHER_OPENING)
    return [Special(opening, False), Text(name, False), Special("<|im_middle|>", False)]


def _generated(message: Message, reasoning: str, thinks: bool, learned: bool) -> Iterator[Piece]:
    """A turn of the assistant behind its heading; `thinks`: its prompt ends with an open thought."""
    yield Special("<think>", False)
    yield Text(reasoning, learned)
    yield Special("</think>", learned and thinks)
    for part in message.content:
        if isinstance(part, str):
            yield Text(part, learned)
    if message.tool_calls:
        yield Special("<|tool_calls_section_begin|>", learned)
        for call in message.tool_calls:
            yield Special("<|tool_call_begin|>", learned)
            yield Text(call.id, learned)
            yield Special("<|tool_call_argument_begin|>", learned)
            yield Text(call.arguments, learned)
            yield Special("<|tool_call_end|>", learned)
        yield Special("<|tool_calls_section_end|>", learned)
    yield Special("<|im_end|>", learned)


def _content(message: Message) -> Iterator[Piece]:
    for part in message.content:
        if isinstance(part, str):
            yield Text(part, False)
        else:
            yield part
            yield Text("\n", False)


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    """The pieces without empty texts, neighbours as one since tokens may cross their seam."""
    waiting: Text | None = None
    for piece in pieces:
        if isinstance(piece, Text):
            before = waiting.text if waiting is not None else ""
            waiting = Text(before + piece.text, piece.learned)
            continue
        if waiting is not None and waiting.text:
            yield waiting
        waiting = None
        yield piece
    if waiting is not None and waiting.text:
        yield waiting
