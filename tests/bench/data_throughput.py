"""Images/s and tokens/s of our loader next to others, over the same tar shards on two cores.

    python -m tests.bench.data_throughput [--images 600] [--decoder pillow] [--energon PYTHON]

All read, decode, resize, cut into uint8 patches, tokenise and pack photographs of 200 to 800 pixels
a side with two worker processes each, in turns of a few seconds; the median of each counts. megatron-energon
7.4.1 runs in an environment of its own, made the first time. Ends non-zero unless ours is ahead of both in
images/s and tokens/s.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from k25_train.compose.resolve import compose
from k25_train.data.batch import Reads
from k25_train.data.reading_process import ReadingProcess
from k25_train.data.share_reader import Share
from tests.bench.data_rivals import core_s
from tests.helpers.runs import layout, overrides
from tests.helpers.tiny_shards import Media, Sample, encode_image, make_text, write_shard_set

SEQ_LEN = 4096
SEQUENCES_PER_STEP = 4
WORKERS = 2
NUM_WARM, NUM_STEPS = 2, 10
RIVALS = Path(__file__).with_name("data_rivals.py")
ENERGON = ("megatron-energon==7.4.1", "tokenizers>=0.23,<0.24", "pillow>=13,<14")
_SMOKE = Path("datasets/smoke")
UNITS = {"images": "images/s", "tokens": "tokens/s", "work": "images per core second"}
Rates = dict[str, float]


def main() -> int:
    """Print the rates of all three, and the ratios last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decoder", choices=("pillow", "dali"), default="pillow")
    parser.add_argument("--energon", help="Python of an environment with megatron-energon", default=None)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    energon = arguments.energon or _energon_python()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_shards(folder, arguments.images)
        _prepare(folder, energon)
        found: dict[str, list[Rates]] = {"ours": [], "torch": [], "energon": []}
        for number in range(arguments.rounds):
            found["ours"].append(_ours(folder, arguments.decoder))
            found["torch"].append(_rival(sys.executable, "torch", folder))
            found["energon"].append(_rival(energon, "energon", folder))
            for loader, rates in found.items():
                print(f"round {number}: {loader}: {_text(rates[-1])}", flush=True)
    medians = {
        loader: {
            unit: statistics.median(each[unit] for each in rates) for unit in ("images", "tokens", "work")
        }
        for loader, rates in found.items()
    }
    is_ahead = True
    for loader, rates in medians.items():
        print(f"{loader} (median of {arguments.rounds}): {_text(rates)}")
    for loader in ("torch", "energon"):
        for unit in ("images", "tokens", "work"):
            # Of each round by itself: what else the machine does changes from one to the next.
            pairs = zip(found["ours"], found[loader], strict=True)
            ratio = statistics.median(own[unit] / other[unit] for own, other in pairs)
            is_ahead &= ratio > 1
            missed = "" if ratio > 1 else " MISSED: must be above 1"
            print(f"ours/{loader} {UNITS[unit]} ratio={ratio:.3f}{missed}")
    return 0 if is_ahead else 1


def _text(rates: Rates) -> str:
    return ", ".join(f"{rates[unit]:.1f} {name}" for unit, name in UNITS.items())


def _write_shards(folder: Path, num_images: int) -> None:
    """Captioned photographs: parts of those of the smoke set where there is one, else of generated ones."""
    photos, rng = _photos(), random.Random(1)
    samples = []
    for number in range(num_images):
        photo = photos[number % len(photos)]
        width, height = rng.randint(200, 800), rng.randint(200, 800)
        left = rng.randint(0, max(0, photo.width - width))
        top = rng.randint(0, max(0, photo.height - height))
        part = photo.crop((left, top, left + width, top + height))
        media = Media("image", "jpg", encode_image(part, "jpg"))
        samples.append(
            Sample(f"photo-{number:05d}", "caption", [media, make_text(rng.randint(5, 60), number)])
        )
    write_shard_set(folder, {"train": samples, "heldout": samples[:8]}, samples_per_shard=num_images // 8)


def _photos() -> list[Image.Image]:
    photos = []
    for path in sorted(_SMOKE.glob("*.tar")) if _SMOKE.exists() else ():
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if member.name.endswith(".jpg") and file is not None:
                    with Image.open(file) as image:
                        photos.append(image.convert("RGB").resize((1400, 1100)))
    if not photos:
        coarse = np.random.default_rng(0).integers(0, 256, (110, 140, 3), dtype=np.uint8)
        photos = [Image.fromarray(coarse).resize((1400, 1100), Image.Resampling.BICUBIC)]
    return photos


def _ours(folder: Path, decoder: str) -> Rates:
    """As the trainer reads: the reading process, its workers, arrays in shared memory."""
    config = compose(
        [
            *overrides(folder, folder / "run", *layout()),
            *("data.read_in=process", f"data.workers={WORKERS}", "data.prefetch_steps=2", "dep.mode=coupled"),
            *(
                f"train.seq_len={SEQ_LEN}",
                f"train.global_batch_size={SEQUENCES_PER_STEP}",
                "train.steps=1000",
            ),
            *(
                "model.vision.image_patch_limit=16384",
                "model.vision.side_patch_limit=512",
                "model.rope.scaling_factor=16",
            ),
            *(f"data.decoder={decoder}", "~data.sources.text", "~data.sources.ocr", "~data.sources.video"),
        ]
    )
    share = Share(rank=0, dp_rank=0, dp_size=1, reads=Reads(tokens=True, labels=True, pixels=True))
    with ReadingProcess(config) as source:
        source.open()
        source.take(share)
        for step in range(NUM_WARM):
            source.step(step)
        images = tokens = 0
        start, worked_s = time.perf_counter(), core_s()
        for step in range(NUM_WARM, NUM_WARM + NUM_STEPS):
            inputs = source.step(step)
            assert not inputs.failures and inputs.batches.pixels.dtype is torch.uint8
            images += sum(len(each.grid_thw) for each in inputs.batches.documents)
            tokens += sum(each.num_tokens for each in inputs.served.values())
            del inputs
        elapsed_s, worked_s = time.perf_counter() - start, core_s() - worked_s
    return {"images": images / elapsed_s, "tokens": tokens / elapsed_s, "work": images / worked_s}


def _rival(python: str, kind: str, folder: Path) -> Rates:
    numbers = (SEQ_LEN, WORKERS, NUM_WARM * SEQUENCES_PER_STEP, NUM_STEPS * SEQUENCES_PER_STEP)
    command = [python, str(RIVALS), kind, str(folder), *map(str, numbers)]
    found = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    rates: Rates = json.loads(found.stdout.strip().splitlines()[-1])
    return rates


def _energon_python() -> str:
    """An environment with megatron-energon, made once in the folder for temporary files."""
    folder = Path(tempfile.gettempdir()) / "energon_env"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *ENERGON], check=True)
    return str(python)


def _prepare(folder: Path, python: str) -> None:
    """What megatron-energon needs next to the shards."""
    subprocess.run(
        [
            *(
                str(Path(python).with_name("energon")),
                "prepare",
                str(folder),
                "--non-interactive",
                "--no-progress",
            ),
            *(
                "--num-workers",
                "1",
                "--exclude",
                "heldout.*",
                "--split-ratio",
                "1,0,0",
                "--skip-dataset-yaml",
            ),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text(
        "__module__: megatron.energon\n__class__: CaptioningWebdataset\n"
        "field_map: {image: 0.jpg, caption: 'json[segments][1][text]'}\n"
        "decoder: {__module__: megatron.energon, __class__: SampleDecoder, image_decode: pilrgb}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
