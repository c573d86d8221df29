"""From messages to ids, and from drawn ids to what was said: the one place where text passes.

What the policy sees is the very beginning of the document that fine-tuning on the same messages would have
(`data/chat/template.py`), up to where the assistant begins to generate, with one `<|media_pad|>` an image.
Later messages are encoded alone and put behind what was drawn, so earlier thoughts stay in view, as with
`preserve_thinking`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from k25_train.data.chat.chat_tokens import ChatTokens, Stretch
from k25_train.data.chat.messages import parse_conversation
from k25_train.data.formats.sample_json import SampleError
from k25_train.data.tokenizer import Tokenizer
from k25_train.environments.base import Task
from k25_train.environments.environment import Action, Tool
from k25_train.environments.reply import read_reply
from k25_train.errors import RolloutError
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.turns import NoRoomError, Observed
from k25_train.rollout.vocabulary import Vocabulary

ANSWER = {"role": "assistant", "content": "."}
"""Stands for the response: all in front of it is the prompt."""
THOUGHT = {**ANSWER, "reasoning_content": "."}
Message = Mapping[str, Any]


class Prompting(Vocabulary, Protocol):
    """Between messages and ids; see `Prompts`."""

    def opening(
        self,
        task: str,
        messages: Sequence[Message],
        media: tuple[bytes, ...],
        tools: Sequence[Tool],
        *,
        thinking: bool,
    ) -> Observed:
        """What the policy sees first."""

    def following(
        self,
        task: str,
        messages: Sequence[Message],
        media: tuple[bytes, ...],
        *,
        thinking: bool,
        last_id: int | None = None,
    ) -> Observed:
        """What it sees behind a turn that it has ended."""

    def shortened(self, message: Message, max_tokens: int) -> Message:
        """A message of at most so many tokens of text."""

    def action(self, token_ids: np.ndarray | Sequence[int], *, thinking: bool) -> Action:
        """A turn that has ended, taken apart."""

    def decode(self, token_ids: np.ndarray | Sequence[int]) -> str:
        """The text of drawn ids."""


class Prompts:
    """Encodes messages with one tokenizer, and decodes what was drawn."""

    def __init__(self, tokenizer: Tokenizer, path: str, model: ServedModel, max_tokens: int) -> None:
        """Raises `DataError` if the vocabulary has no tokens of conversations.

        Args:
            path: of the tokenizer, for messages.
            model: what generates.
            max_tokens: longest prompt.
        """
        self._tokenizer = tokenizer
        self._chat = ChatTokens(tokenizer, path)
        self._model = model
        self._image_ids = tuple(tokenizer.encode("image"))
        self._max_tokens = max_tokens
        self.stop_ids = (tokenizer.chat_ids["<|im_end|>"], tokenizer.eos)
        """Ids that end a turn."""
        media = (
            tokenizer.media_begin,
            tokenizer.media_content,
            tokenizer.media_end,
            tokenizer.media_pad,
        )
        self.forbidden_ids = (*media, *range(tokenizer.vocab_size, model.vocab_size))
        """Ids that are never drawn: of media, and those that the tokenizer does not know."""

    def encode(self, task: Task) -> tuple[int, ...]:
        """Ids of the prompt of a task without tools, one placeholder for each image. Raises as `opening`."""
        return self.opening(task.key, task.messages, task.media, (), thinking=task.thinking).token_ids

    def opening(
        self,
        task: str,
        messages: Sequence[Message],
        media: tuple[bytes, ...],
        tools: Sequence[Tool],
        *,
        thinking: bool,
    ) -> Observed:
        """What the policy sees first.

        Args:
            task: key of the task, for messages.
            messages: the prompt.
            media: images of it.
            tools: that it may call.
            thinking: whether it ends with an open thought.

        Raises `RolloutError` for messages that are no conversation, `NoRoomError` for a prompt that is too
        long even without the other placeholders.
        """
        ids = self._ids(task, messages, tools, thinking=thinking)
        if len(ids) > self._max_tokens:
            raise NoRoomError(
                f"task {task}: its prompt has {len(ids)} tokens, rollout.max_prompt_tokens="
                f"{self._max_tokens}: raise it, and train.seq_len with it, or leave the task out"
            )
        return Observed(ids, media)

    def following(
        self,
        task: str,
        messages: Sequence[Message],
        media: tuple[bytes, ...],
        *,
        thinking: bool,
        last_id: int | None = None,
    ) -> Observed:
        """What the policy sees behind a turn that it has ended: results of its calls, or a user's turn.

        `last_id`: last token of the turn, which gets `<|im_end|>` where that is not it; None where it is.

        Raises `RolloutError` for messages that cannot follow.
        """
        # Results need calls before them, whose ids they have.
        calls = [
            {"id": message["tool_call_id"], "type": "function", "function": _function(message)}
            for message in messages
            if message.get("role") == "tool"
        ]
        said: dict[str, Any] = {"role": "assistant", "content": ".", "tool_calls": calls}
        ids = self._ids(task, [said, *messages], (), thinking=thinking)
        end = self.stop_ids[0]
        return Observed(ids[ids.index(end) + (last_id in (None, end)) :], media)

    def shortened(self, message: Message, max_tokens: int) -> Message:
        """The message, its longest text cut in the middle where it has more tokens than that."""
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": self._cut(content, max_tokens)}
        if not isinstance(content, list):
            return message
        parts = [
            {**part, "text": self._cut(part["text"], max_tokens)} if part.get("type") == "text" else part
            for part in content
        ]
        return {**message, "content": parts}

    def _cut(self, text: str, max_tokens: int) -> str:
        # A token has a byte at least: what is short in bytes need not be encoded.
        if len(text) <= max_tokens or len(ids := self._tokenizer.encode(text)) <= max_tokens:
            return text
        half = max_tokens // 2
        first, last = self._tokenizer.decode(ids[:half]), self._tokenizer.decode(ids[len(ids) - half :])
        return f"{first}\n[{len(ids) - 2 * half} tokens left out]\n{last}"

    def action(self, token_ids: np.ndarray | Sequence[int], *, thinking: bool) -> Action:
        """A turn that has ended, taken apart."""
        return read_reply(self.decode(token_ids), thinking=thinking)

    def decode(self, token_ids: np.ndarray | Sequence[int]) -> str:
        """The text of drawn ids, special tokens by name."""
        return self._tokenizer.decode([int(token) for token in token_ids])

    def expanded(self, token_ids: Sequence[int], images: Sequence[bytes]) -> np.ndarray:
        """[P] int32: ids with every placeholder of the images. Raises `DataError` for what is no image."""
        return self._model.expanded(token_ids, images)

    def collapsed(self, token_ids: np.ndarray) -> tuple[int, ...]:
        """Ids with one placeholder for each image: what engines get."""
        is_pad = token_ids == self._tokenizer.media_pad
        follows = np.concatenate([[False], is_pad[:-1]]) if len(is_pad) else is_pad
        return tuple(token_ids[~(is_pad & follows)].tolist())

    def num_media(self, token_ids: np.ndarray) -> int:
        """Images in ids with every placeholder."""
        return self.collapsed(token_ids).count(self._tokenizer.media_pad)

    def _ids(
        self, task: str, messages: Sequence[Message], tools: Sequence[Tool], *, thinking: bool
    ) -> tuple[int, ...]:
        """Ids of a conversation up to where the assistant begins."""
        earlier = [{**message, **_not_learned(message)} for message in messages]
        conversation: dict[str, Any] = {
            "messages": [*earlier, THOUGHT if thinking else ANSWER],
            "chat_template_kwargs": {"thinking": thinking, "preserve_thinking": True},
        }
        if tools:
            conversation["tools"] = [dict(tool) for tool in tools]
        try:
            document = self._chat.documents(parse_conversation(json.dumps(conversation).encode()))[-1]
        except SampleError as error:
            raise RolloutError(f"task {task}: its messages are no conversation: {error.reason}") from error
        ids: list[int] = []
        for part in document[:-1]:
            ids += part.tokens if isinstance(part, Stretch) else self._image()
        return tuple(ids)

    def _image(self) -> tuple[int, ...]:
        """An image with one placeholder (`data/mix/documents.py` has all of them)."""
        tokenizer = self._tokenizer
        return (
            tokenizer.media_begin,
            *self._image_ids,
            tokenizer.media_content,
            tokenizer.media_pad,
            tokenizer.media_end,
        )


def _function(message: Message) -> dict[str, str]:
    """The call that a result is of, as far as the result says it."""
    name = str(message["tool_call_id"]).removeprefix("functions.").rpartition(":")[0]
    return {"name": name or "tool", "arguments": "{}"}


def _not_learned(message: object) -> dict[str, bool]:
    """What keeps earlier turns of the assistant in the prompt."""
    is_own = isinstance(message, dict) and message.get("role") == "assistant"
    return {"loss": False} if is_own else {}
