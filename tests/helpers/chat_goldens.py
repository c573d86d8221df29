"""Conversations with what the released template makes of them, and a vocabulary in Kimi's format.

`tests/golden/chat/conversations.json` was made with `chat_template.jinja` and `tool_declaration_ts.py` of
moonshotai/Kimi-K2.5 (those since 2026-01-29), rendered as transformers does: for each turn of the assistant
the messages before it with the generation prompt, then what it generates, between ⟦ and ⟧.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.tiny_shards import encode_image, make_picture

_GOLDEN = Path(__file__).parents[1] / "golden" / "chat" / "conversations.json"
OPEN, CLOSE = "⟦", "⟧"
VIDEO_PLACEHOLDER = "<|kimi_k25_video_placeholder|>"
"""What the template writes for a video, before the release's processor puts its chunks in its place."""
KIMI_RANKS = [
    *(bytes([i]) for i in range(256)),
    *(
        b"as",
        b"si",
        b"ta",
        b"er",
        b"us",
        b"th",
        b"  ",
        b"\n\n",
        b"00",
        b"12",
        b"im",
        b"ag",
        b"imag",
        b"image",
    ),
]
"""Tokens of the vocabulary below, by rank."""


@dataclass(frozen=True, slots=True)
class Golden:
    """One conversation."""

    name: str
    conversation: dict[str, Any]
    documents: list[str]
    """Rendered, with what is learned between `OPEN` and `CLOSE`."""

    @property
    def line(self) -> bytes:
        """As a line of a file."""
        return json.dumps(self.conversation, ensure_ascii=False).encode()


def goldens() -> list[Golden]:
    """All of them."""
    return [Golden(**each) for each in json.loads(_GOLDEN.read_text(encoding="utf-8"))]


def without_mask(document: str) -> str:
    """The document as the model sees it."""
    return document.replace(OPEN, "").replace(CLOSE, "")


def write_kimi_vocabulary(path: Path) -> Path:
    """A small `tiktoken.model`: the bytes, and merges of pairs of letters, blanks and digits."""
    lines = [base64.b64encode(token) + f" {rank}".encode() for rank, token in enumerate(KIMI_RANKS)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def write_chat_source(folder: Path) -> list[str]:
    """Two files of conversations, of texts and images; returns their documents, masks drawn."""
    (folder / "chat").mkdir()
    write_kimi_vocabulary(folder / "tiktoken.model")
    for name, file_format in (("a.png", "png"), ("b.jpg", "jpg")):
        (folder / "chat" / name).write_bytes(encode_image(make_picture(56, 28, 1), file_format))
    chosen = [golden for golden in goldens() if golden.name != "video"]
    lines = [golden.line for golden in chosen]
    (folder / "chat" / "1.jsonl").write_bytes(b"\n".join([*lines[:4], b"{", *lines[4:]]))
    (folder / "chat" / "2.jsonl").write_bytes(lines[0] + b"\n" + lines[-1])
    return [text for golden in [*chosen, chosen[0], chosen[-1]] for text in golden.documents]
