"""Milliseconds per image of both decoders, one thread each, on small and large photographs, and their ratios.

    python -m tests.bench.data_decoders [--seconds 1]

Prints the largest difference between the two, in levels of 255, and ends non-zero where it passes the bound.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from k25_train.data.decode.dali import MAX_DIFFERENCE
from k25_train.data.decode.decoder import DaliDecoder, MediaDecoder, MediaFile, ReferenceDecoder
from k25_train.data.decode.items import plan_media
from tests.helpers.media_files import image_bytes, segment_of
from tests.helpers.tiny_shards import tiny_vision_config

VISION = replace(tiny_vision_config(), image_patch_limit=16384, side_patch_limit=512)
SIZES = {(250, 200): 16, (640, 480): 16, (1600, 1200): 4, (3000, 2000): 2}
FORMATS = {"JPEG": {}, "JPEG progressive": {"progressive": True}, "PNG": {"compress_level": 4}, "WEBP": {}}


def main() -> int:
    """Print a line for each size and format."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="of CPU time for each figure")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    reference, dali, worst = ReferenceDecoder(VISION), DaliDecoder(VISION), 0.0
    for (width, height), count in SIZES.items():
        for name, options in FORMATS.items():
            coarse = np.random.default_rng(0).integers(0, 256, (height // 12, width // 12, 3), dtype=np.uint8)
            picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            data = image_bytes(picture, name.split()[0], **options)
            file = MediaFile(data=data, media=plan_media(segment_of(data, "image", "x"), VISION))
            one, other = reference.decode([file])[0].patches, dali.decode([file])[0].patches
            assert one is not None and other is not None
            difference = float((one.float() - other.float()).abs().max())
            worst = max(worst, difference)
            own, theirs = (_cost_ms(each, [file] * count, seconds) for each in (reference, dali))
            print(
                f"{width}x{height} {name}: pillow {own:.2f} ms, dali {theirs:.2f} ms, "
                f"difference {difference:.0f}, dali/pillow ratio={theirs / own:.2f}",
                flush=True,
            )
    print(f"largest difference={worst:.0f} of 255, allowed {MAX_DIFFERENCE}")
    return 0 if worst <= MAX_DIFFERENCE else 1


def _cost_ms(decoder: MediaDecoder, files: Sequence[MediaFile], seconds: float) -> float:
    """CPU time per image: it does not depend on who else computes."""
    decoder.decode(files)
    start, num_images = time.process_time(), 0
    while time.process_time() - start < seconds:
        decoder.decode(files)
        num_images += len(files)
    return (time.process_time() - start) / num_images * 1000


if __name__ == "__main__":
    sys.exit(main())
