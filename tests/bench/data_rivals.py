"""Other loaders over the same shards, with the same work per image: Pillow, resize, patches, tokens, packing.

Imports nothing of this project, as megatron-energon has an environment of its own: what both share with our
loader is written down again here, as a user of theirs would write it, and the patches are computed by the
same operations.

    python tests/bench/data_rivals.py torch|energon FOLDER SEQ_LEN WORKERS NUM_WARM NUM_SEQUENCES

Prints images and tokens per second as JSON, and how many images a second of a core gave.
"""

import io
import json
import math
import os
import random
import sys
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

PATCH, PATCH_LIMIT, SIDE_LIMIT = 14, 16384, 512
_SPECIAL = ("[BOS]", "[EOS]", "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>")


@dataclass
class Document:
    """A captioned image, ready to be packed."""

    tokens: list[int]
    is_target: list[bool]
    pixels: torch.Tensor


class Encoder:
    """From an image and its caption to a document, and from documents to a sequence."""

    def __init__(self, folder: Path, seq_len: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.seq_len = seq_len
        self.bos, self.eos, self.begin, self.content, self.end, self.pad = (
            self.tokenizer.token_to_id(name) for name in _SPECIAL
        )
        self.image = self.tokenizer.encode("image", add_special_tokens=False).ids

    def document(self, image: Image.Image, caption: str) -> Document:
        """Resized as the release does, cut into patches, uint8 as our loader gives them."""
        width, height = image.size
        patches = max(1, width // PATCH) * max(1, height // PATCH)
        side = SIDE_LIMIT * PATCH
        scale = min(1.0, math.sqrt(PATCH_LIMIT / patches), side / width, side / height)
        size = min(max(1, int(width * scale)), side), min(max(1, int(height * scale)), side)
        if size != image.size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        rows, columns = -(-size[1] // 28) * 2, -(-size[0] // 28) * 2
        padded = np.zeros((rows * PATCH, columns * PATCH, 3), dtype=np.uint8)
        padded[: size[1], : size[0]] = np.asarray(image)
        cut = torch.from_numpy(padded).view(rows, PATCH, columns, PATCH, 3).permute(0, 2, 4, 1, 3)
        pixels = cut.reshape(rows * columns, 3 * PATCH * PATCH)
        words = self.tokenizer.encode(caption, add_special_tokens=False).ids
        media = [self.begin, *self.image, self.content, *[self.pad] * (rows * columns // 4), self.end]
        tokens = [self.bos, *media, *words, self.eos]
        return Document(tokens, [False] * (1 + len(media)) + [True] * (len(words) + 1), pixels)

    def sequence(self, documents: list[Document]) -> dict[str, Any]:
        """The documents in one sequence, with labels and mask."""
        tokens = torch.zeros(self.seq_len, dtype=torch.int64)
        labels = torch.zeros(self.seq_len, dtype=torch.int64)
        mask = torch.zeros(self.seq_len, dtype=torch.float32)
        position = 0
        for each in documents:
            end = position + len(each.tokens)
            tokens[position:end] = torch.tensor(each.tokens)
            target = torch.tensor(each.is_target[1:])
            labels[position : end - 1] = torch.where(target, tokens[position + 1 : end], 0)
            mask[position : end - 1] = target.to(torch.float32)
            position = end
        return {
            "tokens": tokens,
            "labels": labels,
            "mask": mask,
            "pixels": torch.cat([each.pixels for each in documents]),
            "num_images": len(documents),
            "num_tokens": position,
        }


def packed(documents: Iterator[Document], encoder: Encoder) -> Iterator[dict[str, Any]]:
    """One sequence after another, each filled until the next document does not fit."""
    waiting: list[Document] = []
    length = 0
    for document in documents:
        if length + len(document.tokens) > encoder.seq_len:
            yield encoder.sequence(waiting)
            waiting, length = [], 0
        waiting.append(document)
        length += len(document.tokens)


class Shards(IterableDataset):  # type: ignore[type-arg]
    """Tar files read from front to back by each worker, shuffled in a buffer, as webdataset does."""

    def __init__(self, folder: Path, seq_len: int, buffer: int = 100) -> None:
        self.folder, self.seq_len, self.buffer = folder, seq_len, buffer

    def __iter__(self) -> Iterator[dict[str, Any]]:
        encoder, rng = Encoder(self.folder, self.seq_len), random.Random(0)
        worker = get_worker_info()
        files = sorted(self.folder.glob("train-*.tar"))
        own = files[worker.id :: worker.num_workers] if worker else files
        return packed(self._documents(own, encoder, rng), encoder)

    def _documents(self, files: list[Path], encoder: Encoder, rng: random.Random) -> Iterator[Document]:
        waiting: list[tuple[bytes, str]] = []
        while True:
            rng.shuffle(files)
            for file in files:
                for sample in self._samples(file):
                    waiting.append(sample)
                    if len(waiting) < self.buffer:
                        continue
                    data, caption = waiting.pop(rng.randrange(len(waiting)))
                    with Image.open(io.BytesIO(data)) as image:
                        yield encoder.document(image.convert("RGB"), caption)

    @staticmethod
    def _samples(file: Path) -> Iterator[tuple[bytes, str]]:
        with tarfile.open(file, "r|") as tar:
            image = b""
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                if member.name.endswith(".json"):
                    yield image, json.loads(content.read())["segments"][1]["text"]
                else:
                    image = content.read()


def torch_batches(folder: Path, seq_len: int, workers: int) -> Any:
    """Pillow and PyTorch's DataLoader."""
    return DataLoader(
        Shards(folder, seq_len), batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None
    )


def energon_batches(folder: Path, seq_len: int, workers: int) -> Any:
    """megatron-energon's loader with its own decoding and packing."""
    from megatron.energon import DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless

    encoder = Encoder(folder, seq_len)

    class Task(DefaultTaskEncoder):  # type: ignore[misc]
        @stateless
        def encode_sample(self, sample: Any) -> Document:
            return encoder.document(sample.image, sample.caption)

        def select_samples_to_pack(self, samples: list[Document]) -> list[list[Document]]:
            packs: list[list[Document]] = [[]]
            length = 0
            for sample in samples:
                if length + len(sample.tokens) > seq_len:
                    packs.append([])
                    length = 0
                packs[-1].append(sample)
                length += len(sample.tokens)
            return packs

        @stateless
        def pack_selected_samples(self, samples: list[Document]) -> dict[str, Any]:
            return encoder.sequence(samples)

        def batch(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
            return samples[0]

    config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
    dataset = get_train_dataset(
        folder,
        batch_size=1,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        packing_buffer_size=32,
        worker_config=config,
        task_encoder=Task(),
    )
    return get_loader(dataset, worker_config=config)


def core_s() -> float:
    """Seconds that cores have worked for this process and all processes under it."""
    parents: dict[int, int] = {}
    worked: dict[int, float] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        parents[int(stat.parent.name)] = int(fields[1])
        worked[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    found = [os.getpid()]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return sum(worked[pid] for pid in found)


def main() -> None:
    """Read sequences, after some that are not counted, and print the rates."""
    torch.set_num_threads(1)
    kind, folder = sys.argv[1], Path(sys.argv[2])
    seq_len, workers, num_warm, num_sequences = map(int, sys.argv[3:7])
    open_batches = torch_batches if kind == "torch" else energon_batches
    batches = iter(open_batches(folder, seq_len, workers))
    for _ in range(num_warm):
        next(batches)
    images = tokens = 0
    start, worked_s = time.perf_counter(), core_s()
    for _ in range(num_sequences):
        batch = next(batches)
        assert batch["pixels"].dtype == torch.uint8
        images += batch["num_images"]
        tokens += batch["num_tokens"]
    elapsed_s = time.perf_counter() - start
    worked_s = core_s() - worked_s
    rates = {"images": images / elapsed_s, "tokens": tokens / elapsed_s, "work": images / worked_s}
    print(json.dumps(rates), flush=True)
    # Workers that wait to hand over more would be waited for.
    os._exit(0)


if __name__ == "__main__":
    main()
