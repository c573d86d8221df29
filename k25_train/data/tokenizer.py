"""Text to token ids: a byte-level BPE trained on the data, or a real Kimi `tiktoken` vocabulary file.

Both split text with the pattern that Moonshot publishes with Kimi K2 (`tokenization_kimi.py`): runs of Han
characters, words with their contraction, digits in groups of at most three, punctuation, whitespace. Special
tokens have their meaning only where the code places their ids; written out in a text they are plain text.
"""

import base64
import binascii
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from k25_train.data.folder import read_file
from k25_train.data.kimi_tokens import (
    CHAT_TOKENS,
    KIMI_NUM_SPECIAL_TOKENS,
    KIMI_SPECIAL_OFFSETS,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
)
from k25_train.data.long_runs import MAX_RUN, PanicErrors, cut_long_runs
from k25_train.data.text_parts import cut_at_boundaries
from k25_train.errors import DataError


class Tokenizer(ABC):
    """Encodes text; knows the ids of the tokens that structure a sequence."""

    def __init__(self, data: bytes, special_ids: dict[str, int]) -> None:
        """`data`: of the vocabulary file; `special_ids`: special token -> id, at least `SPECIAL_TOKENS`."""
        self.sha256 = hashlib.sha256(data).hexdigest()
        """Hex SHA-256 of the vocabulary file, by which a shard set recognises its tokenizer."""
        self.bos = special_ids["[BOS]"]
        self.eos = special_ids["[EOS]"]
        self.pad = special_ids["[PAD]"]
        self.media_begin = special_ids["<|media_begin|>"]
        self.media_content = special_ids["<|media_content|>"]
        self.media_end = special_ids["<|media_end|>"]
        self.media_pad = special_ids["<|media_pad|>"]
        self.chat_ids = {token: special_ids[token] for token in CHAT_TOKENS if token in special_ids}
        """Special token of conversations -> id; empty in a vocabulary without them."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; every id is smaller."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without any special token. Half of a surrogate pair counts as U+FFFD."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens written out."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without any special token."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def parts(self, text: str) -> list[str]:
        """The text in parts whose tokens, in order, are its own; cheap compared with encoding it."""

    def part_tokens(self, text: str) -> tuple[int, ...]:
        """Number of tokens of each part; they sum to that of the text."""
        return tuple(len(tokens) for tokens in self.encode_batch(self.parts(text)))


class TrainedTokenizer(Tokenizer):
    """A byte-level BPE in the file format of the `tokenizers` library."""

    def __init__(self, path: str, data: bytes) -> None:
        """Load what `train_tokenizer` wrote to `path`. Raises DataError if it is nothing such."""
        try:
            with PanicErrors():
                self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path}: not a tokenizer file ({error}). Build the shard set again.") from error
        vocabulary = self._tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise DataError(
                f"{path}: has no special token {', '.join(missing)}; no vocabulary of this project."
            )
        self._tokenizer.encode_special_tokens = True
        self._has_boundaries = _splits_as_trained_here(data)
        known = {*SPECIAL_TOKENS, *CHAT_TOKENS} & vocabulary.keys()
        super().__init__(data, {token: vocabulary[token] for token in known})

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._tokenizer.get_vocab_size()

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without any special token."""
        with PanicErrors():
            encodings = self._tokenizer.encode_batch_fast([_whole_characters(text) for text in texts])
        return [encoding.ids for encoding in encodings]

    def parts(self, text: str) -> list[str]:
        """Parts between boundaries of the pattern; all of the text for a vocabulary with another pattern."""
        return list(cut_at_boundaries(text)) if self._has_boundaries else [text]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens written out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


class KimiTokenizer(Tokenizer):
    """A `tiktoken.model` file as Moonshot ships it: base64 token and rank in every line."""

    def __init__(self, path: str, data: bytes) -> None:
        """Load a file's content; special tokens get the ids above its own. Raises DataError if malformed."""
        ranks = _parse_ranks(path, data)
        names = {len(ranks) + offset: token for token, offset in KIMI_SPECIAL_OFFSETS.items()}
        ids = range(len(ranks), len(ranks) + KIMI_NUM_SPECIAL_TOKENS)
        special_ids = {names.get(i, f"<|reserved_token_{i}|>"): i for i in ids}
        self._encoding = tiktoken.Encoding(
            name=path.rpartition("/")[2],
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=special_ids,
        )
        super().__init__(data, special_ids)

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._encoding.n_vocab

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without any special token; the same as the release's tokenizer gives."""
        encode = self._encoding.encode_ordinary
        return [
            encode(text)
            if len(text) <= MAX_RUN
            else [token for part in cut_long_runs(text) for token in encode(part)]
            for text in texts
        ]

    def parts(self, text: str) -> list[str]:
        """Parts between boundaries of the pattern, within those that the release cuts itself."""
        # Boundaries are between what is blank and what is not, so runs are counted from the same places.
        return [part for stretch in cut_long_runs(text) for part in cut_at_boundaries(stretch)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens written out."""
        return self._encoding.decode(ids)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a `tokenizer.json` (trained here) or a Kimi `*.model` file, distinguished by the file's name, from
    a path or any fsspec URL.

    Raises DataError if the file does not exist, has another suffix or is malformed.
    """
    path = str(path)
    data = read_file(path, "tokenizer", "data.tokenizer")
    if path.endswith(".json"):
        return TrainedTokenizer(path, data)
    if path.endswith(".model"):
        return KimiTokenizer(path, data)
    raise DataError(f"{path}: a tokenizer is a .json file (trained) or a .model file (Kimi's tiktoken).")


def train_tokenizer(texts: Iterable[str], vocab_size: int, path: Path, *, chat_tokens: bool = False) -> None:
    """Train a byte-level BPE of exactly `vocab_size` ids, the special tokens last, and write it to `path`.

    With `chat_tokens` it has those of conversations, too, behind the others. Equal texts give an equal file.
    Raises DataError if the texts do not yield that many tokens.
    """
    special_tokens = SPECIAL_TOKENS + (CHAT_TOKENS if chat_tokens else ())
    # 1. Text is split by Moonshot's pattern, then taken byte by byte.
    tokenizer = tokenizers.Tokenizer(models.BPE())
    pre_tokenizer: Any = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()

    # 2. Merges are learned from the 256 bytes on; special tokens get the last ids.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(list(special_tokens))
    if tokenizer.get_vocab_size() != vocab_size:
        raise DataError(
            f"vocabulary of {vocab_size} asked for, but the texts yield {tokenizer.get_vocab_size()} tokens "
            f"(256 bytes and {len(special_tokens)} special tokens always). Set --vocab-size to that."
        )
    tokenizer.save(str(path), pretty=False)


def _splits_as_trained_here(data: bytes) -> bool:
    """Whether a `tokenizer.json` splits text by our pattern alone, so that parts may be encoded."""
    content = json.loads(data)
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers") or []
    kinds = [step.get("type") for step in steps]
    if content.get("normalizer") or content.get("post_processor") or kinds != ["Split", "ByteLevel"]:
        return False
    split, to_bytes = steps
    return (
        split.get("pattern") == {"Regex": SPLIT_PATTERN}
        and split.get("behavior") == "Isolated"
        and not (
            split.get("invert") or to_bytes.get("add_prefix_space", True) or to_bytes.get("use_regex", True)
        )
    )


def _whole_characters(text: str) -> str:
    """The text with U+FFFD for halves of surrogate pairs, which have no UTF-8; as tiktoken does it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parse_ranks(path: str, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(f"{path}, line {number}: not `<base64 token> <rank>` ({error}).") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < KIMI_NUM_SPECIAL_TOKENS:
        raise DataError(f"{path}: ranks are not 0 … n-1 with each of the 256 bytes; the file is cut short.")
    return ranks
