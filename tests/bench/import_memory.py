"""`python -m tests.bench.import_memory --gib 40`: memory that an import takes, whatever the folder's size.

The folder is synthetic: layers of Kimi-K2.5's widths, with as many experts as make `--gib` on disk, in files
of zeros that take no room. `k25-convert import` runs on it as a command. Of each of its processes the kernel
keeps the largest resident memory (VmHWM); the figure is the sum of these, at least what they had at any
moment. Zeros are given back to the disk as soon as a file is written, so that little room is needed; what is
read of the result stays the same. Ends non-zero where `--memory-gib` is exceeded.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil

from k25_train.checkpoint.files.stored import StoredCheckpoint
from k25_train.config.model import ModelConfig
from k25_train.convert.hf_files import ITEM_BYTES
from k25_train.parameters.released import iterate_tensors
from tests.helpers.hf_folders import k25_config
from tests.helpers.hf_reference import tiny_model_config, tiny_vision_config

FILE_BYTES = 8 * 10**9
"""Most of a file, as in the release."""
SMALL_GIB = 16
"""Below this the vocabulary is small, or embeddings would be all there is."""
Tensors = list[tuple[str, str, tuple[int, ...]]]
"""Name, dtype and shape."""


def model_of(num_experts: int, vocab_size: int) -> ModelConfig:
    """Two layers of Kimi-K2.5's widths, and a small tower."""
    return tiny_model_config(
        num_layers=2,
        hidden_size=7168,
        num_attention_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        dense_ffn_hidden_size=18432 if vocab_size > 10**5 else 2048,
        expert_ffn_hidden_size=2048,
        num_experts=num_experts,
        num_experts_per_token=1,
        vocab_size=vocab_size,
        vision=tiny_vision_config(),
    )


def tensors_of(model: ModelConfig, form: str) -> Tensors:
    """The tensors of its folder, with routed experts in a number format."""
    found: Tensors = []
    for each in iterate_tensors(model):
        name, shape = each.name, each.shape
        if ".experts." not in name or form == "bf16":
            found.append((name, "F32" if each.dtype == "float32" else "BF16", shape))
        elif form == "fp8":
            blocks = tuple(-(-length // 128) for length in shape)
            found += [(name, "F8_E4M3", shape), (f"{name}_scale_inv", "F32", blocks)]
        else:
            rows, columns = shape
            found += [(f"{name}_packed", "I32", (rows, columns // 8))]
            found += [(f"{name}_scale", "BF16", (rows, columns // 32)), (f"{name}_shape", "I32", (2,))]
    return found


def bytes_of(tensors: Tensors) -> int:
    """Of all data."""
    total = 0
    for _, dtype, shape in tensors:
        size = ITEM_BYTES[dtype]
        for length in shape:
            size *= length
        total += size
    return total


def write_folder(path: Path, model: ModelConfig, tensors: Tensors) -> None:
    """Sparse files in the release's form."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(k25_config(model)))
    files: list[Tensors] = [[]]
    for each in tensors:
        if files[-1] and bytes_of([*files[-1], each]) > FILE_BYTES:
            files.append([])
        files[-1].append(each)
    places = {}
    for number, chosen in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):06d}.safetensors"
        header, offset, shapes = {}, 0, []
        for tensor, dtype, shape in chosen:
            stop = offset + bytes_of([(tensor, dtype, shape)])
            header[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
            if tensor.endswith("_shape"):
                shapes.append((offset, next(s for n, _, s in chosen if n == f"{tensor[:-6]}_packed")))
            offset = stop
            places[tensor] = name
        text = json.dumps(header).encode()
        with (path / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for first, (rows, words) in shapes:
                file.seek(8 + len(text) + first)
                file.write(b"".join(each.to_bytes(4, "little") for each in (rows, words * 8)))
            file.truncate(8 + len(text) + offset)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def import_watched(source: Path, out: Path, arguments: argparse.Namespace) -> tuple[dict[int, int], float]:
    """Run the command; largest resident bytes of each of its processes, and its time in seconds."""
    command = [sys.executable, "-m", "k25_train.convert", "import", str(source), str(out)]
    command += ["--memory-gib", str(arguments.memory_gib), "--workers", str(arguments.workers)]
    started_s = time.monotonic()
    process = subprocess.Popen(command, stdout=sys.stderr)
    peaks: dict[int, int] = {}
    over = threading.Event()
    digger = threading.Thread(target=give_zeros_back, args=(out.with_name(f"{out.name}.partial"), over))
    digger.start()
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        for each in [watched, *children_of(watched)]:
            peaks[each.pid] = max(peaks.get(each.pid, 0), peak_of(each.pid))
        time.sleep(0.02)
    over.set()
    digger.join()
    if process.returncode:
        sys.exit(f"the import ended with status {process.returncode}")
    return peaks, time.monotonic() - started_s


def children_of(process: psutil.Process) -> list[psutil.Process]:
    """Its workers; none when it has ended."""
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def peak_of(pid: int) -> int:
    """VmHWM in bytes; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def give_zeros_back(partial: Path, over: threading.Event) -> None:
    """Turn zeros of files that are complete into holes; what is read of them stays the same."""
    dug: set[str] = set()
    while not over.wait(0.2):
        for record in partial.glob("done/*.json"):
            file = partial / f"rank_{record.stem}_0.safetensors"
            if record.stem not in dug and file.exists():
                subprocess.run(["fallocate", "--dig-holes", str(file)], check=False)
                dug.add(record.stem)


def main() -> int:
    """Run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the folder (%(default)s)")
    parser.add_argument("--form", choices=("bf16", "fp8", "int4"), default="bf16", help="of the experts")
    parser.add_argument("--memory-gib", type=float, default=2.0, help="limit, and bar (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (%(default)s)")
    arguments = parser.parse_args()
    vocab_size = 163840 if arguments.gib >= SMALL_GIB else 8192
    empty, one = (bytes_of(tensors_of(model_of(n, vocab_size), arguments.form)) for n in (1, 2))
    num_experts = max(1, round((arguments.gib * 2**30 - empty) / (one - empty)) + 1)
    model = replace(model_of(num_experts, vocab_size), name="synthetic")
    tensors = tensors_of(model, arguments.form)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder) / "hf", Path(folder) / "out"
        write_folder(source, model, tensors)
        peaks, took_s = import_watched(source, out, arguments)
        stored = StoredCheckpoint.open(out)
        num_bytes = sum(each.num_bytes for each in stored.tensors.values())
        name = "language_model.decoder.layers.1.mlp.experts.gate_up_proj"
        assert not stored.read(name, 10**6, 2 * 10**6).any(), "zeros come out as zeros"
    peak = sum(peaks.values()) / 2**30
    each_gib = ", ".join(f"{each / 2**30:.2f}" for each in peaks.values())
    sizes = f"{bytes_of(tensors) / 2**30:.1f} GiB of {arguments.form} -> {num_bytes / 2**30:.1f} GiB"
    print(f"{sizes} in {took_s:.0f} s by {arguments.workers} workers; per process {each_gib} GiB")
    print(f"peak memory of all processes: {peak:.2f} GiB (at most {arguments.memory_gib:g})")
    return int(peak > arguments.memory_gib)


if __name__ == "__main__":
    sys.exit(main())
