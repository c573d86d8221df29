"""A trained vocabulary with room for the special tokens of conversations, in which all other ids stay.

A model that was trained without chat tokens has a row for each id and none to spare. So the merges learned
last, which are of least use, make room: what they wrote as one token is written as its two parts, and their
ids become those of the chat tokens. Checkpoints of the model can be used as they are.
"""

import json
from typing import Any

from k25_train.data.kimi_tokens import CHAT_TOKENS
from k25_train.errors import DataError


def with_chat_tokens(data: bytes, path: str) -> bytes:
    """The content of a `tokenizer.json` that `train_tokenizer` wrote, with `CHAT_TOKENS`.

    `path` is for messages. The number of ids is as before. Texts in which no dropped token occurs have the
    same tokens as before. A vocabulary that has the chat tokens comes back as it is. Raises DataError for
    what is no such vocabulary, and for one with too few merges.
    """
    try:
        content: dict[str, Any] = json.loads(data)
        vocabulary: dict[str, int] = content["model"]["vocab"]
        merges: list[list[str]] = content["model"]["merges"]
        special: list[dict[str, Any]] = content["added_tokens"]
        known = {each["content"] for each in special}
        template = special[0]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(f"{path}: not a tokenizer file of this project ({error!r}).") from error
    if known.issuperset(CHAT_TOKENS):
        return data
    dropped = _spare_merges(merges, len(CHAT_TOKENS))
    if len(dropped) < len(CHAT_TOKENS):
        raise DataError(
            f"{path}: only {len(dropped)} of its merges can be spared, and conversations need "
            f"{len(CHAT_TOKENS)} special tokens. Train one with --chat-tokens, or with a larger --vocab-size."
        )
    ids = sorted(vocabulary.pop("".join(merges[number])) for number in dropped)
    chat_ids = dict(zip(CHAT_TOKENS, ids, strict=True))
    content["model"]["merges"] = [pair for number, pair in enumerate(merges) if number not in dropped]
    # The library gives a special token the id that the model has for its name, else the next free one.
    content["model"]["vocab"] = dict(sorted((vocabulary | chat_ids).items(), key=lambda item: item[1]))
    special += [{**template, "id": number, "content": token} for token, number in chat_ids.items()]
    special.sort(key=lambda each: int(each["id"]))
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _spare_merges(merges: list[list[str]], count: int) -> set[int]:
    """Positions of the merges learned last whose tokens no merge that stays needs or makes, too."""
    made: dict[str, int] = {}
    for pair in merges:
        made["".join(pair)] = made.get("".join(pair), 0) + 1
    needed: set[str] = set()
    spare: set[int] = set()
    for number in reversed(range(len(merges))):
        token = "".join(merges[number])
        if len(spare) < count and token not in needed and made[token] == 1:
            spare.add(number)
        else:
            needed.update(merges[number])
    return spare
