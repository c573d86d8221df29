"""What images cost in memory: the peak of the first pipeline stage, with more and more images in
micro-batches of equally many tokens, with the tower coupled, decoupled upfront and in bubbles.

    python -m tests.bench.dep_memory        # prints a table, draws runs/dep_memory.png

Four ranks, pp=4, train 8 micro-batches per step, each one sample of some images and text. Coupled, the first
stage keeps the tower's activations of all images of the micro-batches in flight, which are pp. Decoupled, a
rank keeps those of one chunk of at most `dep.max_patches_per_chunk` patches, here two images, and features
within `dep.feature_buffer_gib`, here smaller than the features of a step.

- Peak: the most resident memory of the first stage's process (VmHWM) from when a step's inputs are read until
  its optimizer runs, less what is resident at the beginning. That leaves out weights, the optimizer's state
  and pixels. The language model's activations are in it; the row without images is nothing else. Freed blocks
  go back to the system at once. The step with the smallest peak counts: what only grows once, such as buffers
  of the network, is no part of a step.
- On the CPU "device" and "host" are the same memory: features that do not fit in the buffer are resident
  as well. What would be on a device is counted by the engines (`vision_peak_feature_bytes`) and shown in
  addition.
- In bubbles that count covers all features and gradients that a rank has, including its share as an encoder,
  1/pp of a replica's features of the step, which upfront does not count. On gloo a message is in flight until
  somebody has waited for it.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run
from tests.helpers.smoke_mix import mix
from tests.helpers.tiny_shards import Sample, make_image, make_text, write_shard_set

NUM_RANKS = 4
SEQ_LEN, NUM_SEQUENCES = 384, 8
IMAGES = (1, 2, 4, 8)
"""Images per micro-batch, by row of the table."""
IMAGE_PIXELS = 168
PATCHES, TOKENS = 144, 36
"""Patches and tokens of an image."""
TOKENS_PER_WORD, CHAT_TOKENS = 3, 56
"""A little more than the tokenizer's mean, and than the chat format adds around images and text."""
FEATURE_BYTES = 128 * 4
"""Bytes of a vision token's features: `model.hidden_size` float32 numbers."""
BUFFER_KIB = 300
STEPS = 3
WORK = (
    f"train.seq_len={SEQ_LEN} train.global_batch_size={NUM_SEQUENCES} train.micro_batch_size=1 "
    f"train.steps={STEPS} optim=adamw optim.warmup=1 optim.decay=1 data.prefetch_steps=0 "
    "model.num_layers=8 model.hidden_size=128 model.num_attention_heads=4 model.q_lora_rank=64 "
    "model.kv_lora_rank=32 model.expert_ffn_hidden_size=256 model.dense_ffn_hidden_size=768 "
    "model.vision.num_layers=12 model.vision.hidden_size=64 model.vision.ffn_hidden_size=256 "
    f"model.vision.image_patch_limit={PATCHES} dep.max_patches_per_chunk={2 * PATCHES} "
    f"dep.feature_buffer_gib={BUFFER_KIB / 2**20}"
).split()
WITH_IMAGES = mix(caption=1)
TEXT_ONLY = mix(text=1)
MODES = {
    "coupled": ["dep.mode=coupled"],
    "upfront": ["dep.schedule=upfront"],
    "bubbles": ["dep.schedule=bubbles"],
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of `mallopt`. Source: malloc.h of glibc."""


class Peak(NamedTuple):
    """Of the first stage."""

    resident_bytes: int
    """The most in a step above its beginning."""
    feature_bytes: int
    """The most features, or gradients of features, that lie on a device; 0 if the tower is coupled."""


def resident_bytes(field: str) -> int:
    """A figure of this process: `VmRSS` now, `VmHWM` the most since it was reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(field)]
    return 1024 * int(line.split()[1])


def peak(context: RankContext, arguments: Sequence[str]) -> Peak:
    """The smallest peak of a rank's steps after the first one."""
    from k25_train.training.step import train_step

    libc = ctypes.CDLL(None)
    # Once set, these do not adapt: larger blocks are mapped, and unmapped when they are freed.
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    libc.mallopt(M_TRIM_THRESHOLD, 2**16)
    run = start_run(context, arguments)
    read_step, update, found, start = run.reader.step, run.optimizer.step, list[int](), [0]

    def read_then_reset(step: int) -> object:
        inputs = read_step(step)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        start[0] = resident_bytes("VmRSS")
        return inputs

    def note_then_update() -> object:
        found.append(resident_bytes("VmHWM") - start[0])
        return update()

    run.reader.step, run.optimizer.step = read_then_reset, note_then_update
    features = 0
    with run.data:
        for step in range(1, STEPS + 1):
            vision = train_step(run, step).vision
            features = max(features, getattr(vision, "peak_feature_bytes", 0))
    return Peak(min(found[1:]), features)


def write_samples(directory: Path, num_images: int) -> Path:
    """A shard set whose samples each fill most of a sequence, so that one comes alone: some with so many
    images, and some with none."""
    image = make_image(IMAGE_PIXELS, IMAGE_PIXELS, "png", seed=1)
    num_words = (SEQ_LEN - num_images * TOKENS - CHAT_TOKENS) // TOKENS_PER_WORD
    samples = []
    for seed in range(NUM_SEQUENCES):
        samples.append(Sample(f"text-{seed}", "text", [make_text(SEQ_LEN // TOKENS_PER_WORD, seed)]))
        media = [image] * num_images
        samples.append(Sample(f"caption-{seed}", "caption", [*media, make_text(num_words, seed)]))
    return write_shard_set(directory, {"train": samples, "heldout": samples})


def main() -> None:
    """Measure, print a table and draw it."""
    found: dict[str, list[Peak]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        for num_images in IMAGES:
            data = write_samples(Path(folder, f"shards-{num_images}"), num_images)
            common = overrides(data, run, *layout(pp=NUM_RANKS), *WORK)
            if num_images == IMAGES[0]:
                text = first_stage([*common, *TEXT_ONLY, *MODES["coupled"]])
            for mode, choice in MODES.items():
                found[mode].append(first_stage([*common, *WITH_IMAGES, *choice]))
    Console(width=120).print(table(text, found))
    draw(text, found, Path("runs/dep_memory.png"))


def first_stage(arguments: Sequence[str]) -> Peak:
    """The peak of the first stage's rank, which is the first one."""
    return run_ranks(peak, NUM_RANKS, list(arguments), timeout_s=300.0)[0]


def table(text: Peak, found: dict[str, list[Peak]]) -> Table:
    """Peaks by number of images."""
    decoupled = [mode for mode in MODES if mode != "coupled"]
    rows = Table(
        "images",
        "vision tokens",
        *(f"peak {mode}, MiB" for mode in MODES),
        "features of a step, KiB",
        *(f"on a device {mode}" for mode in decoupled),
        title=f"first stage of a pipeline of {NUM_RANKS}; a buffer of {BUFFER_KIB} KiB for features",
    )
    rows.add_row("0", "0%", f"{mib(text):.0f}")
    for place, num_images in enumerate(IMAGES):
        all_bytes = num_images * NUM_SEQUENCES * TOKENS * FEATURE_BYTES
        rows.add_row(
            str(num_images),
            f"{num_images * TOKENS / SEQ_LEN:.0%}",
            *(f"{mib(found[mode][place]):.0f}" for mode in MODES),
            f"{all_bytes / 2**10:.0f}",
            *(f"{found[mode][place].feature_bytes / 2**10:.0f}" for mode in decoupled),
        )
    return rows


def mib(peak: Peak) -> float:
    """Resident memory."""
    return peak.resident_bytes / 2**20


def draw(text: Peak, found: dict[str, list[Peak]], path: Path) -> None:
    """Peaks over the number of images."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for mode, peaks in found.items():
        axes.plot((0, *IMAGES), [mib(each) for each in (text, *peaks)], marker="o", label=mode)
    axes.set_title(f"first stage of a pipeline of {NUM_RANKS}: peak memory of a step above its beginning")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("images in a micro-batch, tokens equal")
    axes.set_ylabel("MiB")
    axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
