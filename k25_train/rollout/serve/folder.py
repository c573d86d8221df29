"""The folder that a server reads: exported from a checkpoint, or one that is there already, looked at.

What vLLM 0.32.0 needs in it, each found by a server that did not start or, worse, computed something else:

| what | without it |
|---|---|
| `architectures: [KimiK25ForConditionalGeneration]` | it knows no such model |
| `text_config.topk_method`, `scoring_func` | it does not load, or scores experts by softmax without a word |
| `use_unified_vision_chunk`, `video_placeholder` | no image is accepted |
| `media_proc_cfg` in preprocessor_config.json | no image is accepted |
| heads of a size that its CPU attention has | its first request ends it |

`k25-convert export` writes the first four.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k25_train.errors import CheckpointError, ConfigError
from k25_train.export.hf_config import ARCHITECTURE

DTYPES = {"float32": "float32", "bf16": "bfloat16", "int4": "bfloat16"}
"""`rollout.weights` -> what vLLM computes in."""
NEEDED_KEYS = (
    "text_config.topk_method",
    "text_config.scoring_func",
    "use_unified_vision_chunk",
    "video_placeholder",
    "media_placeholder_token_id",
)
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Of vLLM's plain attention on a CPU."""
MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class ServedFolder:
    """A folder in the release's form."""

    path: Path
    """Where it is."""
    config: dict[str, Any]
    """Its config.json."""
    checkpoint: Path
    """What it was exported from; itself if it was there."""

    @property
    def head_size(self) -> int:
        """Of queries and keys."""
        text = self.config["text_config"]
        return int(text["qk_nope_head_dim"] + text["qk_rope_head_dim"])

    def check_cpu_heads(self) -> None:
        """Raises `ConfigError` if vLLM's attention on a CPU has no heads of this size."""
        if self.head_size not in CPU_HEAD_SIZES:
            raise ConfigError(
                f"{self.path / 'config.json'}: heads of {self.head_size} (qk_nope_head_dim + "
                "qk_rope_head_dim); "
                f"vLLM on a CPU has {', '.join(map(str, CPU_HEAD_SIZES))}\n  -> use --engine in_process"
            )


def served_folder(
    checkpoint: Path, out: Path, options: argparse.Namespace, say: Callable[[str], None]
) -> ServedFolder:
    """Export a checkpoint, or take a folder as it is.

    Args:
        checkpoint: step_N of a run, an import, or a folder in the release's form.
        out: where to export to.
        options: of the command: `weights`, `tokenizer` and `like` are for the export.
        say: prints a line.

    Raises `CheckpointError` for what is none of them or cannot be exported, `ConfigError` for a folder that a
    server would not serve as it is.
    """
    if (checkpoint / MANIFEST).is_file():
        _export(checkpoint, out, options, say)
        return ServedFolder(out, _config(out), checkpoint)
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(
            f"{checkpoint}: neither a checkpoint (no {MANIFEST}) nor a folder in the release's form (no "
            "config.json)\n  -> name step_N in a run's checkpoints, an import, or an exported folder"
        )
    folder = ServedFolder(checkpoint, _config(checkpoint), checkpoint)
    check_servable(folder)
    return folder


def check_servable(folder: ServedFolder) -> None:
    """Raises `ConfigError` for a folder that vLLM would not load, or load wrongly."""
    path, config = folder.path, folder.config
    missing = [key for key in NEEDED_KEYS if _value(config, key) is None]
    remedy = "  -> serve what `k25-convert export` writes, or add what it has there"
    if ARCHITECTURE not in config.get("architectures", ()):
        raise ConfigError(
            f"{path / 'config.json'}: architectures is {config.get('architectures')}; {ARCHITECTURE} is the "
            f"one that vLLM knows\n{remedy}"
        )
    if missing:
        raise ConfigError(f"{path / 'config.json'}: lacks {', '.join(missing)}, which vLLM needs\n{remedy}")
    images = path / "preprocessor_config.json"
    if not images.is_file() or "media_proc_cfg" not in _json(images):
        raise ConfigError(f"{images}: has no media_proc_cfg, without which vLLM takes no image\n{remedy}")


def _export(checkpoint: Path, out: Path, options: argparse.Namespace, say: Callable[[str], None]) -> None:
    if (out / "config.json").is_file():
        say(f"{out}: exported before, served as it is")
        return
    words = ["export", str(checkpoint), str(out), "--dtype", options.weights]
    for name in ("tokenizer", "like"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", str(value)]
    say(f"exporting {checkpoint} in {options.weights}")
    # A process of its own: what it has read is not held while the server serves.
    done = subprocess.run(
        [sys.executable, "-m", "k25_train.convert", *words], capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode:
        raise CheckpointError(
            f"{checkpoint}: not exported by `k25-convert {' '.join(words)}`:\n{done.stderr.strip()}"
        )


def _config(folder: Path) -> dict[str, Any]:
    return _json(folder / "config.json")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}\n  -> export the checkpoint again") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: is no JSON object\n  -> export the checkpoint again")
    return found


def _value(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
