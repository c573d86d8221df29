"""Tokens per second of a core of `k25-data prepare`, against what people would do otherwise.

    python -m tests.bench.data_prepare [--megabytes 20]

The same JSON lines are tokenised with a vocabulary of the `tokenizers` library and one in tiktoken's format:

- by `prepare`, on all cores, from files to files, its start and the shards included;
- by the library alone in one process, text by text, from memory: nothing parsed, checked or written;
- as Megatron-LM's preprocessing does it (`tools/preprocess_data.py`): a `multiprocessing` pool over lines
  (`imap`, 32 at a time), each parsed and encoded by itself, ids sent back and appended to a megatron-core
  `IndexedDatasetBuilder` by the one process that owns it. It has as many processes.

What counts is the time that cores worked (user and system, children included), which other work on the
machine changes little; each way has its best of the rounds. Bars: `prepare` has at least 0.7 of the rate of
the library alone, though it parses, checks and writes, and is ahead of the pool.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from k25_train.data.prepare.job import Options, Preparation
from k25_train.data.tokenizer import KimiTokenizer, Tokenizer, load_tokenizer
from tests.helpers.project_sources import REPO
from tests.helpers.text_corpus import NoView

ROUNDS = 2
LINES_AT_ONCE = 32
"""Lines that a process of Megatron-LM's pool gets at a time (`pool.imap(encoder.encode, fin, 32)`)."""
BARS = {"library": 0.7, "pool": 1.0}
"""Least ratios: see above."""
_encoder: Tokenizer


def write_corpus(path: Path, num_bytes: int) -> list[str]:
    """Lines made of the words of this project's own files, in documents of 50 to 1,500 words."""
    sources = sorted([*REPO.glob("*.md"), *REPO.glob("k25_train/**/*.py")])
    lines = [line for source in sources for line in source.read_text(encoding="utf-8").splitlines(True)]
    rng = random.Random(0)
    texts = []
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < num_bytes:
            texts.append("".join(rng.choices(lines, k=rng.randint(5, 150))))
            file.write(json.dumps({"id": len(texts), "text": texts[-1]}) + "\n")
    return texts


def write_kimi_vocabulary(path: Path, trained: Path) -> Path:
    """The trained vocabulary's merges in tiktoken's format."""
    import base64

    from tokenizers import pre_tokenizers

    content = json.loads(trained.read_text(encoding="utf-8"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    to_byte = {character: value for value, character in enumerate(_bytes_of(alphabet))}
    special = {each["content"] for each in content["added_tokens"]}
    ordered = sorted(content["model"]["vocab"].items(), key=lambda each: each[1])
    tokens = [bytes(to_byte[c] for c in token) for token, _ in ordered if token not in special]
    singles = [bytes([value]) for value in range(256)]
    ranked = singles + [token for token in tokens if len(token) > 1]
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(ranked)))
    return path


def _bytes_of(alphabet: list[str]) -> list[str]:
    """Character of each byte in the byte-level form, as GPT-2 introduced it."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in kept]
    found = {value: chr(value) for value in kept} | {value: chr(256 + i) for i, value in enumerate(others)}
    assert sorted(found.values()) == alphabet
    return [found[value] for value in range(256)]


def plain(tokenizer: Path, texts: list[str]) -> Callable[[], int]:
    """The library alone: encodes all texts; returns the number of tokens."""
    if tokenizer.suffix == ".model":
        found = load_tokenizer(tokenizer)
        assert isinstance(found, KimiTokenizer)
        encode = found._encoding.encode_ordinary
        return lambda: sum(len(encode(text)) for text in texts)
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(tokenizer))
    # Special tokens that a text mentions are text.
    library.encode_special_tokens = True
    return lambda: sum(len(library.encode(text, add_special_tokens=False).ids) for text in texts)


def _start_encoder(tokenizer: str) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = load_tokenizer(tokenizer)


def _encode_line(line: str) -> list[int]:
    return _encoder.encode(json.loads(line)["text"])


def pool(corpus: Path, tokenizer: Path, out: Path) -> int:
    """Megatron-LM's way; returns the number of tokens."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    vocab_size = load_tokenizer(tokenizer).vocab_size
    builder = IndexedDatasetBuilder(f"{out}.bin", DType.optimal_dtype(vocab_size))
    num_tokens = 0
    context = multiprocessing.get_context("fork")
    with (
        corpus.open(encoding="utf-8") as lines,
        context.Pool(num_cores(), _start_encoder, (str(tokenizer),)) as processes,
    ):
        for ids in processes.imap(_encode_line, lines, LINES_AT_ONCE):
            builder.add_document(torch.tensor(ids), [len(ids)])
            num_tokens += len(ids)
        processes.close()
        processes.join()
    builder.finalize(f"{out}.idx")
    return num_tokens


def prepared(corpus: Path, tokenizer: Path, out: Path) -> int:
    """This project's way; returns the number of tokens."""
    options = Options(
        inputs=[str(corpus)],
        out=str(out),
        tokenizer=str(tokenizer),
        num_workers=num_cores(),
        unit_bytes=2 * 2**20,
        restart=True,
    )
    return int(Preparation(options).run(NoView()).record["num_tokens"])


def _core_s() -> float:
    """Seconds that cores have worked for this process and for those of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def measure(name: str, folder: Path) -> int:
    """One way in a process of its own, that no other has left threads in; prints tokens and seconds."""
    way, tokenizer = name.split(":")
    corpus, vocabulary = folder / "corpus.jsonl", folder / tokenizer
    run: Callable[[], int]
    if way == "library":
        with corpus.open(encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line in file]
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        run = plain(vocabulary, texts)
    elif way == "pool":
        import torch  # noqa: F401  its import is no part of the time
        from megatron.core.datasets import indexed_dataset  # noqa: F401

        run = lambda: pool(corpus, vocabulary, folder / "pool")  # noqa: E731
    else:
        run = lambda: prepared(corpus, vocabulary, folder / "prepared")  # noqa: E731
    started_s = _core_s()
    num_tokens = run()
    print(json.dumps([num_tokens, _core_s() - started_s]))
    return 0


def main() -> int:
    """Measure and print; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FOLDER"), help="measure one way; used by itself")
    options = parser.parse_args()
    if options.one:
        return measure(options.one[0], Path(options.one[1]))
    ways = (*BARS, "prepare")
    table = Table("vocabulary", *ways, title="tokens per second of a core")
    worst: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_corpus(folder / "corpus.jsonl", int(options.megabytes * 1e6))
        trained = folder / "tokenizer.json"
        trained.write_bytes((REPO / "datasets/smoke/tokenizer.json").read_bytes())
        write_kimi_vocabulary(folder / "tiktoken.model", trained)
        for tokenizer in ("tokenizer.json", "tiktoken.model"):
            rates = dict.fromkeys(ways, 0.0)
            counts = set()
            for _ in range(ROUNDS):
                for way in ways:
                    num_tokens, took_s = _in_a_process(f"{way}:{tokenizer}", folder)
                    counts.add(num_tokens)
                    rates[way] = max(rates[way], num_tokens / took_s)
            assert len(counts) == 1, f"ways differ in the number of tokens: {counts}"
            table.add_row(tokenizer, *(f"{rates[way]:,.0f}" for way in ways))
            for way in ways[:-1]:
                worst[way] = min(worst.get(way, 1e9), rates["prepare"] / rates[way])
    Console().print(table)
    print(
        f"worst ratio of prepare on {num_cores()} cores to "
        + ", ".join(f"{way}: {worst[way]:.2f} (bar {bar:g})" for way, bar in BARS.items())
    )
    return int(any(worst[way] < bar for way, bar in BARS.items()))


def _in_a_process(name: str, folder: Path) -> tuple[int, float]:
    command = [sys.executable, "-m", "tests.bench.data_prepare", "--one", name, str(folder)]
    done = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True)
    num_tokens, took_s = json.loads(done.stdout.splitlines()[-1])
    return int(num_tokens), float(took_s)


if __name__ == "__main__":
    sys.exit(main())
