"""The tokens of a conversation, in stretches that are learned or not, with its media between them."""

from collections.abc import Sequence
from dataclasses import dataclass

from k25_train.data.chat.messages import Conversation, MediaPart
from k25_train.data.chat.template import Document, Piece, Special, Text, render
from k25_train.data.decode.items import format_timestamp
from k25_train.data.formats.sample_json import SampleError, surrogate_in
from k25_train.data.kimi_tokens import CHAT_TOKENS
from k25_train.data.tokenizer import Tokenizer
from k25_train.errors import DataError

_FIRST_TIMESTAMP = format_timestamp(0)
"""What every video begins with."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens that follow one another, all of them learned or none."""

    tokens: tuple[int, ...]
    learned: bool


ChatDocument = tuple[Stretch | MediaPart, ...]
"""Stretches and media in reading order."""


class ChatTokens:
    """Encodes conversations with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, path: str) -> None:
        """`path`: of the tokenizer, for messages. Raises DataError if its vocabulary has no chat tokens."""
        missing = [token for token in CHAT_TOKENS if token not in tokenizer.chat_ids]
        if missing:
            raise DataError(
                f"{path}: has no {', '.join(missing)}, which conversations are written with. Use Kimi's "
                "tiktoken.model, or a vocabulary trained with --chat-tokens; sources of format chat need one."
            )
        self._ids = tokenizer.chat_ids
        self._tokenizer = tokenizer

    def documents(self, conversation: Conversation) -> tuple[ChatDocument, ...]:
        """The documents of a conversation; see `template.render`.

        Raises SampleError, with the reason alone, for half of a surrogate pair and what cannot be encoded.
        """
        return tuple(self._encode(document) for document in render(conversation))

    def _encode(self, document: Document) -> ChatDocument:
        texts = [piece.text for piece in document if isinstance(piece, Text)]
        for text in texts:
            defect = surrogate_in(text)
            if defect is not None:
                raise SampleError(f"a text in it has {defect}")
        try:
            encoded = iter(self._tokenizer.encode_batch(texts))
        except RuntimeError as error:
            raise SampleError(str(error)) from error
        found: list[Stretch | MediaPart] = []
        stretch: list[int] = []
        learned = False
        for piece, following in zip(document, (*document[1:], None), strict=True):
            is_learned = not isinstance(piece, MediaPart) and piece.learned
            if stretch and (isinstance(piece, MediaPart) or is_learned != learned):
                found.append(Stretch(tuple(stretch), learned))
                stretch = []
            learned = is_learned
            if isinstance(piece, MediaPart):
                found.append(piece)
            elif isinstance(piece, Special):
                stretch.append(self._ids[piece.name])
            else:
                stretch += self._before(following, piece.text, next(encoded))
        return (*found, Stretch(tuple(stretch), learned)) if stretch else tuple(found)

    def _before(self, following: Piece | None, text: str, tokens: Sequence[int]) -> Sequence[int]:
        """Tokens of a text, given what follows: a video begins with its time, which the release encodes
        together with the text, so that blanks before it split otherwise. Where a token would cover both (the
        text ends with a digit), they stay apart."""
        if not isinstance(following, MediaPart) or following.type != "video":
            return tokens
        time = self._tokenizer.encode(_FIRST_TIMESTAMP)
        together = self._tokenizer.encode(text + _FIRST_TIMESTAMP)
        return together[: -len(time)] if together[-len(time) :] == time else tokens
