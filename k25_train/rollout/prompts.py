"""From a task to the ids of its prompt, and from generated ids to text: the one place where text passes.

The prompt is the very beginning of the document that fine-tuning on the same messages would have
(`data/chat/template.py`), up to where the assistant begins to generate, with one `<|media_pad|>` an image.
"""

import json
from collections.abc import Sequence

import numpy as np

from k25_train.data.chat.chat_tokens import ChatTokens, Stretch
from k25_train.data.chat.messages import parse_conversation
from k25_train.data.formats.sample_json import SampleError
from k25_train.data.tokenizer import Tokenizer
from k25_train.environments.base import Task
from k25_train.errors import RolloutError

ANSWER = {"role": "assistant", "content": "."}
"""Stands for the response: all in front of it is the prompt."""
THOUGHT = {**ANSWER, "reasoning_content": "."}


class Prompts:
    """Encodes the prompts of tasks with one tokenizer, and decodes what was generated."""

    def __init__(self, tokenizer: Tokenizer, path: str, vocab_size: int, max_tokens: int) -> None:
        """Raises `DataError` if the vocabulary has no tokens of conversations.

        Args:
            path: of the tokenizer, for messages.
            vocab_size: ids that the model can generate.
            max_tokens: longest prompt.
        """
        self._tokenizer = tokenizer
        self._chat = ChatTokens(tokenizer, path)
        self._image_ids = tuple(tokenizer.encode("image"))
        self._max_tokens = max_tokens
        self.stop_ids = (tokenizer.chat_ids["<|im_end|>"], tokenizer.eos)
        """Ids that end a response."""
        media = (
            tokenizer.media_begin,
            tokenizer.media_content,
            tokenizer.media_end,
            tokenizer.media_pad,
        )
        self.forbidden_ids = (*media, *range(tokenizer.vocab_size, vocab_size))
        """Ids that are never drawn: of media, and those that the tokenizer does not know."""

    def encode(self, task: Task) -> tuple[int, ...]:
        """Ids of the prompt, one placeholder for each image.

        Raises `RolloutError` for messages that are no conversation, and for a prompt that is too long even
        without the other placeholders.
        """
        earlier = [{**message, **_not_learned(message)} for message in task.messages]
        conversation = {
            "messages": [*earlier, THOUGHT if task.thinking else ANSWER],
            "chat_template_kwargs": {"thinking": task.thinking},
        }
        try:
            document = self._chat.documents(parse_conversation(json.dumps(conversation).encode()))[-1]
        except SampleError as error:
            raise RolloutError(
                f"task {task.key}: its messages are no conversation: {error.reason}"
            ) from error
        ids: list[int] = []
        for part in document[:-1]:
            ids += part.tokens if isinstance(part, Stretch) else self._image()
        if len(ids) > self._max_tokens:
            raise RolloutError(
                f"task {task.key}: its prompt has {len(ids)} tokens, rollout.max_prompt_tokens="
                f"{self._max_tokens}: raise it, and train.seq_len with it, or leave the task out"
            )
        return tuple(ids)

    def decode(self, token_ids: np.ndarray | Sequence[int]) -> str:
        """The text of generated ids, special tokens by name."""
        return self._tokenizer.decode([int(token) for token in token_ids])

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


def _not_learned(message: object) -> dict[str, bool]:
    """What keeps earlier turns of the assistant in the prompt."""
    is_own = isinstance(message, dict) and message.get("role") == "assistant"
    return {"loss": False} if is_own else {}
