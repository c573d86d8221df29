"""Whether the loss uses the pixels: 64 captioned images learned by heart, then asked with images shuffled.

    python -m tests.bench.overfit [overrides …]

Trains `experiment=smoke_overfit` with 4 ranks in a folder of its own and evaluates its last checkpoint twice.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

MAX_RATIO = 0.5
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def main() -> None:
    """Train, evaluate, print the ratio next to its bar; ends non-zero if it is missed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "launch.torchrun"]
        command += ["experiment=smoke_overfit", f"run.dir={folder}", *sys.argv[1:]]
        subprocess.run(command, check=True, env=ENVIRONMENT)
        checkpoint = max(
            Path(folder, "checkpoints").glob("step_*"), key=lambda path: int(path.name.split("_")[1])
        )
        right, shuffled = caption_losses(checkpoint)
    print(f"caption loss with the right images {right:.4f}, with shuffled ones {shuffled:.4f}")
    verdict = "kept" if right < MAX_RATIO * shuffled else "MISSED"
    print(f"ratio {right / shuffled:.3f}, bar {MAX_RATIO}: {verdict}")
    sys.exit(right >= MAX_RATIO * shuffled)


def caption_losses(checkpoint: Path) -> tuple[float, float]:
    """Caption loss of a checkpoint, with the right images and with shuffled ones."""
    command = [sys.executable, "-m", "k25_train.eval", f"checkpoint={checkpoint}", "shuffle_media=1"]
    output = subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, text=True).stdout
    print(output)
    losses = dict(re.findall(r"^(\w+) +([\d.]+)$", output, re.MULTILINE))
    return float(losses["eval_caption_loss"]), float(losses["eval_caption_loss_shuffled"])


if __name__ == "__main__":
    main()
