"""Corpora of JSON lines and Parquet in a moment, and what `k25-data prepare` makes of them."""

import base64
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from k25_train.data.prepare.job import Options, Preparation, Result
from k25_train.data.prepare.skips import Skips
from k25_train.data.tokenizer import train_tokenizer

_WORDS = "alpha beta gamma delta don't 12345 x += y; 你好 世界 — naïve\n\n  indented\ttab \0 🙂".split(" ")


class NoView:
    """Shows nothing."""

    def start(self, stage: str, total: int, done: int) -> None:
        """A stage begins."""

    def show(self, done: int, skips: Skips, tokens: int) -> None:
        """It goes on."""

    def stop(self) -> None:
        """It is over."""


def texts(num: int, seed: int = 0) -> list[str]:
    """Texts of all sorts of characters, NUL among them."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(1, 60))) for _ in range(num)]


def write_lines(path: Path, values: Sequence[str]) -> Path:
    """A JSON-lines file with these texts."""
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(values)))
    return path


def write_tokenizer(path: Path) -> Path:
    """A trained `tokenizer.json`, or a made-up vocabulary in Kimi's format if it is a `.model`."""
    if path.suffix == ".json":
        train_tokenizer(texts(50), 300, path)
        return path
    tokens = [bytes([i]) for i in range(256)] + [b"al", b"ha", b"12", b"123"]
    tokens += [b"\xff" + i.to_bytes(3) for i in range(66_000 - len(tokens))]
    path.write_text("".join(f"{base64.b64encode(token).decode()} {i}\n" for i, token in enumerate(tokens)))
    return path


def prepare(inputs: Sequence[Path | str], out: Path | str, tokenizer: Path, **options: object) -> Result:
    """Run a preparation in this process, or on `num_workers` others, on small units."""
    given = {"unit_bytes": 2000, "max_skipped": 0.0, **options}
    values = [str(each) for each in inputs]
    return Preparation(Options(inputs=values, out=str(out), tokenizer=str(tokenizer), **given)).run(NoView())  # type: ignore[arg-type]


def read_documents(prefix: Path) -> list[list[int]]:
    """Ids of all documents of a shard, as megatron-core's format has them; read without megatron-core."""
    data = Path(f"{prefix}.idx").read_bytes()
    num = int.from_bytes(data[18:26], "little")
    dtype = {8: "<u2", 4: "<i4"}[data[17]]
    lengths = np.frombuffer(data, "<i4", num, 34)
    starts = np.frombuffer(data, "<i8", num, 34 + 4 * num)
    ids = np.fromfile(f"{prefix}.bin", dtype)
    size = np.dtype(dtype).itemsize
    return [
        ids[start // size : start // size + length].tolist()
        for start, length in zip(starts, lengths, strict=True)
    ]


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
