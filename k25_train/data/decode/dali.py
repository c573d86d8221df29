"""Images decoded and resized by NVIDIA DALI, in batches.

Measured with DALI 2.4.0 and nvImageCodec 0.9 on the CPU, against Pillow 13 (`tests.bench.data_decoders` does
it again): images of the kinds that `routing.py` lets through decode to the same bytes, so those within the
patch limits, which are not resized, are the reference's to the bit. Resized ones differ by rounding, since
Pillow rounds and clips between its two passes and DALI does not: `MAX_DIFFERENCE` and `MAX_MEAN_DIFFERENCE`.
nvJPEG's own transform differs, too, so the backend is part of the facts.

What made an earlier measurement drop DALI is answered: transparency, GIF and grey with alpha never reach it
(`routing.py`); a pipeline belongs to the process that made it, and another one is told so instead of hanging;
it works on batches, which halves its costs per image; it is made where it decodes, in processes that read,
and costs the ranks nothing. Its "dynamic mode" was measured as well (1.0 and 13.7 ms per JPEG of 250x200 and
1000x800, in batches of 16 with resizing) against a pipeline with external sources (0.7 and 10.1 ms), and
takes 3.7 s to import.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from k25_train.config.vision import VisionConfig
from k25_train.data.decode.items import PlannedMedia, patch_limit_of, resized_size
from k25_train.data.decode.patches import patchify
from k25_train.errors import ConfigError

DALI = "dali"
MAX_DIFFERENCE = 40
"""Most that a value of a resized image may differ from the reference's, of 255: at single pixels of hard
edges, where Pillow clips the overshoot of its first pass. Photographs stay within 8."""
MAX_MEAN_DIFFERENCE = 1.0
"""Most that the values of a resized picture may differ on average; of pixels that are black or white at
random, which no picture is, 4."""
BATCH_IMAGES = 16
"""Images of one run of the pipeline: more gain nothing measurable. Our choice."""
BATCH_PIXELS = 2**24
"""Most pixels of one run, unless it is one image: 48 MiB decoded. Our choice."""
_PACKAGES = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")


class DaliImages:
    """Decodes images; one pipeline, made at the first use by the process that uses it."""

    def __init__(self, vision: VisionConfig) -> None:
        """Raises `ConfigError` where DALI is not installed."""
        dali_versions()
        self._vision = vision
        self._pipelines: dict[bool, Any] = {}
        """Whether it resizes -> the pipeline: resampling to the same size would cost as much as decoding."""
        self._pid = 0

    def decode(self, files: Sequence[tuple[bytes, PlannedMedia]]) -> list[Tensor | None]:
        """The patches of each file, as `load_patches` gives them; None for one that DALI refuses.

        Raises RuntimeError in a process forked from one that has decoded: DALI's threads are not there.
        """
        if self._pid not in (0, os.getpid()):
            raise RuntimeError(
                f"a DALI pipeline of process {self._pid} was used in process {os.getpid()}, forked from it, "
                "where its threads do not exist: make the decoder after the fork"
            )
        found: dict[int, Tensor | None] = {}
        resizes = [self._size(media) != (media.segment.height, media.segment.width) for _, media in files]
        for does_resize in (False, True):
            numbers = [number for number, resized in enumerate(resizes) if resized is does_resize]
            for batch in _batches([files[number] for number in numbers]):
                here, numbers = numbers[: len(batch)], numbers[len(batch) :]
                found.update(zip(here, self._run(batch, does_resize), strict=True))
        return [found[number] for number in range(len(files))]

    def _size(self, media: PlannedMedia) -> tuple[int, int]:
        """Height and width after resizing."""
        segment, vision = media.segment, self._vision
        width, height = resized_size(segment.width, segment.height, patch_limit_of(segment, vision), vision)
        return height, width

    def _run(self, batch: Sequence[tuple[bytes, PlannedMedia]], does_resize: bool) -> list[Tensor | None]:
        # 1. Its input: bytes that are not copied, and sizes.
        if does_resize not in self._pipelines:
            self._pipelines[does_resize], self._pid = _build(_device_id(), does_resize), os.getpid()
        pipeline = self._pipelines[does_resize]
        pipeline.feed_input("files", [np.frombuffer(data, dtype=np.uint8) for data, _ in batch])
        if does_resize:
            sizes = [np.array(self._size(media), dtype=np.float32) for _, media in batch]
            pipeline.feed_input("sizes", sizes)

        # 2. One bad file fails the run, and the pipeline with it: each of several is then tried alone.
        try:
            (pictures,) = pipeline.run()
        except RuntimeError:
            del self._pipelines[does_resize]
            if len(batch) == 1:
                return [None]
            return [patches for file in batch for patches in self._run([file], does_resize)]
        pictures = pictures.as_cpu()
        return [
            patchify(np.asarray(pictures.at(number)), media.items[0].grid_thw[1:], self._vision.patch_size)
            for number, (_, media) in enumerate(batch)
        ]


def _batches(files: Sequence[tuple[bytes, PlannedMedia]]) -> Iterator[list[tuple[bytes, PlannedMedia]]]:
    """The files in order, in batches of bounded memory."""
    batch: list[tuple[bytes, PlannedMedia]] = []
    num_pixels = 0
    for file in files:
        pixels = file[1].segment.width * file[1].segment.height
        if batch and (len(batch) == BATCH_IMAGES or num_pixels + pixels > BATCH_PIXELS):
            yield batch
            batch, num_pixels = [], 0
        batch.append(file)
        num_pixels += pixels
    if batch:
        yield batch


def _build(device_id: int | None, does_resize: bool) -> Any:
    """The pipeline: decode, then resize as the release does, on a GPU unless `device_id` is None."""
    # Imported here: it takes a second, and only processes that decode with it need it.
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(
        batch_size=BATCH_IMAGES,
        num_threads=1,  # readers are processes; together they have a node's cores
        device_id=device_id,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
    )
    with pipeline:
        files = fn.external_source(name="files", no_copy=True, dtype=types.UINT8, ndim=1)
        on_gpu: dict[str, Any] = (
            {} if device_id is None else {"device": "mixed", "jpeg_fancy_upsampling": True}
        )
        # Turned images are the reference's.
        pictures = fn.decoders.image(files, output_type=types.RGB, adjust_orientation=False, **on_gpu)
        if does_resize:
            sizes = fn.external_source(name="sizes", dtype=types.FLOAT, ndim=1)
            cubic = types.INTERP_CUBIC
            pictures = fn.resize(
                pictures, size=sizes, interp_type=cubic, antialias=True, subpixel_scale=False
            )
        pipeline.set_outputs(pictures)
    pipeline.build()
    return pipeline


def dali_versions() -> str:
    """DALI and what decodes with it. Raises `ConfigError` where it is not installed."""
    for package in _PACKAGES:
        try:
            dali = version(package)
        except PackageNotFoundError:
            continue
        codec = version(f"nvidia-nvimgcodec-cu{package[-3:-1]}")
        backend = "the CPU" if _device_id() is None else "nvJPEG"
        return f"DALI {dali}, nvImageCodec {codec} on {backend}"
    raise ConfigError(
        f"data.decoder=dali needs NVIDIA DALI, which is not installed: pip install "
        f"{' or '.join(_PACKAGES)}, by the CUDA version, or set data.decoder=pillow"
    )


@cache
def _device_id() -> int | None:
    """The GPU of this rank; None without one. PyTorch asks NVML, which makes no CUDA context."""
    count = torch.cuda.device_count()
    return int(os.environ.get("LOCAL_RANK", "0")) % count if count else None
