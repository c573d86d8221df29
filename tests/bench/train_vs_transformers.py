"""Training speed of one process: our train_step against a plain loop on transformers' `kimi_k25`.

    python -m tests.bench.train_vs_transformers [--rounds 10] [overrides …]

Both sides train the smoke model on the same synthetic batch from the same initial weights (their first
losses are compared), in processes of their own with the same number of threads, taking turns step by step.
The plain loop is what a careful user would write: forward, backward, clip, fused AdamW, scaled-dot-product
attention, and the fastest of transformers' implementations of the experts, found by trying. Rows are one
document each and media are images only, since transformers can neither keep packed documents apart nor mix
images and video in one call without flash attention.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.data.batch import MicroBatch
from k25_train.data.served import SourceSummary
from k25_train.data.share_reader import HostInputs, Share
from k25_train.data.source import Opened, ThreadSource
from k25_train.data.step_batches import stack
from k25_train.model.moonvit_positions import normalised
from k25_train.plan.batch_sizes import BatchSizes
from parallel.dep.engine import VisionWork
from parallel.dep.grid import Grid
from parallel.dep.plan_share import NO_SHARE
from tests.helpers.hf_reference import build_hf_reference, media_pad_id

ONE_PROCESS = (
    *("parallelism.pp=1", "parallelism.vpp=1", "parallelism.ep=1", "cluster.gpus_per_node=1"),
    # As transformers has it; a decoupled encoder would read its images from the loader that is replaced.
    "dep.mode=coupled",
)
EXPERTS = ("eager", "grouped_mm")
"""transformers' ways to compute experts; a third, batched_mm, copies weights per token and took ten times as
long."""
Step = Callable[[], float]
"""Trains one step and returns its loss."""


def main() -> None:
    """Time both sides and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each side")
    arguments, overrides = parser.parse_known_args()
    overrides = ["experiment=smoke", *ONE_PROCESS, *overrides]
    config = compose(overrides)
    sides = {"k25-train": Side(our_step, overrides), "transformers": Side(transformers_step, overrides)}
    losses = {name: side.step()[1] for name, side in sides.items()}
    difference = abs(losses["k25-train"] / losses["transformers"] - 1)
    if difference > 1e-4:
        raise SystemExit(f"the two sides do not compute the same: first losses {losses}")
    for side in sides.values():
        side.step()  # the first two steps warm caches and allocators up
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(arguments.rounds):
        # Who goes first alternates, so that a drift of the machine's speed meets both alike.
        for name in sorted(sides, reverse=turn % 2 == 1):
            times[name].append(sides[name].step()[0])
    for side in sides.values():
        side.stop()
    Console().print(result_table(config, sides, times))


def result_table(config: Config, sides: dict[str, Side], times: dict[str, list[float]]) -> Table:
    """Tokens a second of both sides and their ratio, round by round."""
    num_tokens = config.train.global_batch_size * config.train.seq_len
    micro = config.train.micro_batch_size
    table = Table(
        title=f"{config.model.name}, {num_tokens:,} tokens a step in micro-batches of {micro} x "
        f"{config.train.seq_len}, {torch.get_num_threads()} threads, {len(times['k25-train'])} paired steps"
    )
    for column in ("", "tokens/s (median)", "slowest", "fastest"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in times.items():
        speeds = sorted(num_tokens / second for second in seconds)
        table.add_row(
            f"{name} {sides[name].note}",
            *(f"{value:,.0f}" for value in (statistics.median(speeds), speeds[0], speeds[-1])),
        )
    ratios = sorted(
        theirs / ours for ours, theirs in zip(times["k25-train"], times["transformers"], strict=True)
    )
    table.add_row("ratio", *(f"{value:.2f}" for value in (statistics.median(ratios), ratios[0], ratios[-1])))
    return table


class Side:
    """One side in a process of its own."""

    def __init__(self, build: Callable[[Config], tuple[Step, str]], overrides: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(build, list(overrides), other), daemon=True)
        self._process.start()
        other.close()
        self.note: str = self._pipe.recv()

    def step(self) -> tuple[float, float]:
        """Train one step; its seconds and its loss."""
        self._pipe.send("step")
        return cast(tuple[float, float], self._pipe.recv())

    def stop(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def serve(build: Callable[[Config], tuple[Step, str]], overrides: list[str], pipe: Connection) -> None:
    """The side's process: build, then train a step whenever asked."""
    step, note = build(compose(overrides))
    pipe.send(note)
    while pipe.recv() is not None:
        started = time.perf_counter()
        loss = step()
        pipe.send((time.perf_counter() - started, loss))


def our_step(config: Config) -> tuple[Step, str]:
    """Our train_step on a run whose loader always gives the synthetic batch."""
    from parallel.megatron.platform import use_platform

    device = use_platform(config.cluster.device.value)
    from k25_train.training.run import build_run
    from k25_train.training.step import train_step

    run = build_run(config, device, FixedSource(config))
    step_number = 0

    def step() -> float:
        nonlocal step_number
        step_number += 1
        return train_step(run, step_number).loss

    return step, ""


SOURCE = SourceSummary(
    num_heldout=0,
    name="synthetic",
    has_media=True,
    num_documents=1,
    num_tokens=1,
    weight=1.0,
    max_epochs=None,
)


class FixedSource(ThreadSource):
    """Gives the same synthetic batch at every step; opens nothing."""

    def __init__(self, config: Config) -> None:
        batches = stack(synthetic_batches(config))
        sizes = BatchSizes.of((), ())
        super().__init__(config)
        self.inputs = HostInputs(sizes, batches, VisionWork(NO_SHARE, (), ()), (), {}, {})
        self.opened = Opened(vocab_size=config.model.vocab_size, pad=0, sources=(SOURCE,))

    def open(self) -> Opened:
        """Nothing to open."""
        return self.opened

    def take(self, share: Share, *_: object) -> None:
        """One rank has all of it."""

    def step(self, step: int) -> HostInputs:
        """The batch."""
        return self.inputs


def transformers_step(config: Config) -> tuple[Step, str]:
    """A plain training loop with the fastest implementation of the experts."""
    model, _ = build_hf_reference(config.model, initial_weights(config), attention="sdpa")
    model.train()
    step = plain_loop(model, config, synthetic_batches(config))
    language_model = cast(Any, model).model.language_model
    initial = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seconds = {}
    for experts in EXPERTS:
        language_model.set_experts_implementation(experts)
        step()
        started = time.perf_counter()
        step()
        seconds[experts] = time.perf_counter() - started
    fastest = min(seconds, key=lambda name: seconds[name])
    language_model.set_experts_implementation(fastest)
    model.load_state_dict(initial)
    return step, f"(experts: {fastest})"


def initial_weights(config: Config) -> dict[str, Tensor]:
    """Our initial weights in the checkpoint's names."""
    from k25_train.export.released import to_hf, to_ours
    from k25_train.model.weights import initial_value
    from k25_train.parameters.released import iterate_tensors

    shapes = to_ours({tensor.name: torch.empty(tensor.shape) for tensor in iterate_tensors(config.model)})
    seed, std = config.train.seed, config.model.init_std
    return to_hf({name: initial_value(name, tensor.shape, seed, std) for name, tensor in shapes.items()})


def plain_loop(model: torch.nn.Module, config: Config, batches: list[MicroBatch]) -> Step:
    """Forward, backward, clip and AdamW over the micro-batches of a step."""
    optim = config.optim
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    patch = config.model.vision.patch_size
    num_targets = sum(float(batch.loss_mask.sum()) for batch in batches)

    def step() -> float:
        total = 0.0
        optimizer.zero_grad()
        for batch in batches:
            output = model(
                input_ids=batch.tokens.view(config.train.micro_batch_size, -1),
                pixel_values=normalised(cast(Tensor, batch.pixels)).view(-1, 3, patch, patch),
                image_grid_thw=torch.tensor(batch.grid_thw),
            )
            losses = functional.cross_entropy(output.logits.flatten(0, 1), batch.labels, reduction="none")
            loss = (losses * batch.loss_mask).sum() / num_targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        return total

    return step


def synthetic_batches(config: Config) -> list[MicroBatch]:
    """A global batch of random tokens; every second row begins with an image of a size of its own."""
    generator = torch.Generator().manual_seed(0)
    rows = config.train.micro_batch_size
    batches = []
    for _ in range(config.train.global_batch_size // rows):
        tokens = torch.randint(
            0, media_pad_id(config.model) - 1, (rows, config.train.seq_len), generator=generator
        )
        is_media = torch.zeros_like(tokens, dtype=torch.bool)
        grids = []
        for row in range(0, rows, 2):
            h, w = (2 * int(torch.randint(2, 8, (), generator=generator)) for _ in range(2))
            grids.append(Grid(1, h, w))
            is_media[row, 2 : 2 + h * w // 4] = True
        tokens[is_media] = media_pad_id(config.model)
        labels = tokens.roll(-1, dims=1)
        loss_mask = (~is_media.roll(-1, dims=1)).float()
        loss_mask[:, -1] = 0
        num_patches = sum(math.prod(grid) for grid in grids)
        shape = num_patches, 3 * config.model.vision.patch_size**2
        pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        batches.append(
            MicroBatch(
                tokens=tokens.flatten(),
                labels=(labels * loss_mask.long()).flatten(),
                loss_mask=loss_mask.flatten(),
                source=torch.zeros(tokens.numel(), dtype=torch.int16),
                policy=torch.zeros(0, 0),
                responses=torch.zeros(0, dtype=torch.int32),
                document_lengths=(config.train.seq_len,) * rows,
                media_positions=is_media.flatten().nonzero().squeeze(1),
                padding=(),
                num_targets=tuple(int(mask.sum()) for mask in loss_mask),
                unreadable=(),
                grid_thw=tuple(grids),
                item_documents=tuple(range(0, rows, 2)),
                pixels=pixels,
                failed_items=(),
            )
        )
    return batches


if __name__ == "__main__":
    main()
