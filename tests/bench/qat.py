"""What training with INT4 experts is worth: a model that was trained so, and one that was rounded afterwards.

    python -m tests.bench.qat [--before STEPS] [--steps STEPS] [--seeds N]

A shrunk model learns facts by heart, values for keys, so that its loss depends on what its experts hold: a
model of generated sentences is as good after rounding as before. Then it is trained on from the same weights
in two ways, for equally many steps on the same data: with `model.quantization` none and with `int4_qat`. Both
are exported with `--dtype int4`, and transformers, which unpacks INT4 with compressed-tensors, computes the
held-out losses of both as they are served.

Most of the loss is the choice of the next key, which nobody can know (5.5 nats of each fact), so that what
rounding costs is little next to it: 0.8494 nats plain, 0.8549 rounded afterwards, 0.8521 trained with INT4.
And the rate has to be low by the end: where the loss still falls fast (80 steps at a rate of 2e-3, with the
loss on values alone), learning with rounded experts is slower by more than rounding costs afterwards: 0.0920
nats against 0.0871. Bars, for each seed:

- codes and scales in the export are those that compressed-tensors makes of the checkpoint's weights, and what
  it unpacks is what passes compute with, bit for bit;
- the served loss is within 1% of the loss that the trainer has with INT4;
- it is lower than the served loss of the model that was rounded afterwards.

Ends with 1 if one is missed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from k25_train.convert.__main__ import main as convert
from tests.helpers.exported_run import evaluate_alone
from tests.helpers.hf_losses import load_exported, losses_of_batch
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import fit, layout, overrides
from tests.helpers.tiny_shards import Sample, write_shard_set

NUM_FACTS = 256
FACTS_PER_TEXT = 16
SERVED_TOLERANCE = 0.01
"""Largest relative difference of the served loss from the trainer's."""
WAYS = ("none", "int4_qat")
MODEL = (
    "data=smoke_text model.num_layers=3 model.num_experts=8 model.expert_ffn_hidden_size=64 "
    "dep.mode=coupled train.micro_batch_size=8 train.eval_sequences=32"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A run, and what became of it."""

    way: str
    checkpoint: Path
    trained_loss: float
    """Held-out, as the trainer computes it, in nats."""
    served_loss: float
    """The same tokens by the INT4 export in transformers."""


def write_facts(folder: Path) -> Path:
    """Texts of facts in any order, `key:value` with three random letters each."""
    rng = random.Random(5)

    def word() -> str:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=3))

    keys: set[str] = set()
    while len(keys) < NUM_FACTS:
        keys.add(word())
    facts = [f"{key}:{word()}" for key in sorted(keys)]

    def texts(number: int) -> list[Sample]:
        return [
            Sample(f"text-{index}", "text", [" ".join(rng.sample(facts, FACTS_PER_TEXT))])
            for index in range(number)
        ]

    return write_shard_set(folder, {"train": texts(3000), "heldout": texts(64)})


def train(data: Path, folder: Path, steps: int, rate: float, *more: str) -> Path:
    """Train in one process; its last checkpoint."""
    length = (
        f"train.steps={steps} train.eval_interval={steps} checkpoint.interval={steps} "
        f"optim.warmup={steps // 10} optim.decay={steps // 2} optim.lr={rate} optim.min_lr=1e-4"
    ).split()
    arguments = overrides(data, folder, *layout(), *MODEL, *length, *more)
    run_ranks(fit, 1, arguments, timeout_s=3600.0)
    return folder / "checkpoints" / f"step_{steps}"


def export(checkpoint: Path, tokenizer: Path, folder: Path) -> Path:
    """Export a checkpoint as INT4."""
    words = f"export {checkpoint} {folder} --dtype int4 --tokenizer {tokenizer} --workers 1"
    assert convert(words.split()) == 0
    return folder


def evaluated(way: str, checkpoint: Path, data: Path, work: Path) -> tuple[Trained, Path]:
    """Losses of a run as it is trained and as it is served, and its export."""
    dump = work / f"dump_{way}"
    run_ranks(evaluate_alone, 1, str(checkpoint), f"dump={dump}", timeout_s=600.0)
    exported = export(checkpoint, data / "tokenizer.json", work / f"exported_{way}")
    model = load_exported(exported)
    ours, theirs = [], []
    for path in sorted(dump.glob("batch_*.safetensors")):
        batch = load_file(path)
        counts = batch["loss_mask"] > 0
        ours.append(batch["losses"][counts])
        theirs.append(losses_of_batch(model, batch)[counts])
    losses = (torch.cat(each).double().mean().item() for each in (ours, theirs))
    trained_loss, served_loss = losses
    return Trained(
        way=way, checkpoint=checkpoint, trained_loss=trained_loss, served_loss=served_loss
    ), exported


def expert_weights(checkpoint: Path) -> Iterator[tuple[str, Tensor]]:
    """Released name and weights, in bfloat16, of every matrix of a routed expert."""
    from k25_train.checkpoint.files.stored import StoredCheckpoint
    from k25_train.export.listing import released_tensors
    from k25_train.export.model_of import model_of
    from k25_train.export.stream import stored_tensors

    experts = [each for each in released_tensors(model_of(checkpoint)) if each.is_expert]
    for tensor in stored_tensors(StoredCheckpoint.open(checkpoint), experts):
        yield tensor.name, tensor.tensor


def num_matrices_alike(checkpoint: Path, exported: Path) -> tuple[int, int]:
    """Matrices of which the export has compressed-tensors' bytes, and whose weights are those of our passes;
    and all matrices."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    from k25_train.int4 import fake_quantize

    scheme = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
    stored = {key: each for path in exported.glob("*.safetensors") for key, each in load_file(path).items()}
    found = []
    for name, weight in expert_weights(checkpoint):
        packed, scale = stored[f"{name}_packed"], stored[f"{name}_scale"]
        expected = (weight.float().unflatten(1, (-1, 32)).abs().amax(2) / 7).to(torch.bfloat16)
        zero = torch.zeros_like(scale, dtype=torch.int8)
        codes = quantize(weight.float(), expected.float(), zero, scheme, dtype=torch.int8).clamp(-7, 7)
        unpacked = dequantize(unpack_from_int32(packed, 4, weight.shape), scale, zero, scheme)
        alike = torch.equal(scale, expected) and torch.equal(packed, pack_to_int32(codes, 4))
        found.append(alike and torch.equal(unpacked, fake_quantize(weight)))
    return sum(found), len(found)


def main() -> int:
    """Train, export, serve and print a table and the figures; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=int, default=250, help="steps before the two ways part")
    parser.add_argument("--steps", type=int, default=100, help="steps of each way")
    parser.add_argument("--rate", type=float, default=1e-3, help="largest learning rate of each way")
    parser.add_argument("--seeds", type=int, default=1, help="orders of the data in which both train")
    options = parser.parse_args()
    table = Table("seed", "model.quantization", "trainer's loss", "served as INT4", "")
    misses, figures = [], []
    with tempfile.TemporaryDirectory() as folder:
        data = write_facts(Path(folder) / "facts")
        before = train(data, Path(folder) / "before", options.before, 5e-3)
        for seed in range(11, 11 + options.seeds):
            work = Path(folder) / f"seed_{seed}"
            found = {}
            for way in WAYS:
                chosen = (f"checkpoint.init_from={before}", f"train.seed={seed}", f"model.quantization={way}")
                checkpoint = train(data, work / way, options.steps, options.rate, *chosen)
                found[way], exported = evaluated(way, checkpoint, data, work)
            # 1. Bytes of the model that was trained with INT4, the last of the two.
            alike, number = num_matrices_alike(checkpoint, exported)
            # 2. Losses.
            plain, qat = (found[way] for way in WAYS)
            apart = qat.served_loss / qat.trained_loss - 1
            gained = 1 - qat.served_loss / plain.served_loss
            for each in (plain, qat):
                change = each.served_loss / each.trained_loss - 1
                losses = f"{each.trained_loss:.4f}", f"{each.served_loss:.4f}", f"{change:+.2%}"
                table.add_row(str(seed), each.way, *losses)
            figures.append(
                f"seed {seed}: {alike} of {number} matrices bit-equal, bar all; served loss {apart:+.2%} "
                f"from the trainer's, bar {SERVED_TOLERANCE:.0%}; {gained:.2%} below that of the model "
                "rounded afterwards, bar above 0"
            )
            misses.append(not (alike == number > 0 and abs(apart) <= SERVED_TOLERANCE and gained > 0))
    Console().print(table)
    print(*figures, sep="\n")
    return int(any(misses))


if __name__ == "__main__":
    sys.exit(main())
