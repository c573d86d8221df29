"""Tokens per processor second of the engine in process next to transformers' `generate`, in one run.

    python -m tests.bench.rollout_engine [threads]

The same random model (`model=k25_tiny`, float32), prompts of 64 tokens, 32 new ones, at 1, 16 and 64 in
flight; `generate` with the faster of its ways to compute experts. Rounds alternate and the fastest counts;
processor seconds, because other work on the machine stretches those of the clock. Then 64 prompts of 16
to 112 tokens with answers of 4 to 64 in 16 slots, where `generate` waits for the longest of each batch. Last,
log-probabilities against a full forward.

Bars: at least as fast at 16 and at 64, 1.5 times on uneven lengths; mean ≤ 2e-6 and max ≤ 1e-5 nats.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from k25_train.compose.conf_files import CONF_DIR, group_values
from k25_train.compose.sections import build_section
from k25_train.config.model import ModelConfig
from k25_train.rollout.engines.base import Generated, ProbeSequence, Request
from k25_train.rollout.engines.in_process.engine import InProcessEngine
from tests.helpers.hf_reference import build_hf_reference, random_checkpoint
from tests.helpers.sampled_engine import build_engine, picture, push, request

IN_FLIGHT = (1, 16, 64)
BARRED = (16, 64)
PROMPT, NEW = 64, 32
UNEVEN, UNEVEN_SLOTS = 64, 16
SLOTS = 64
ROUNDS = 2
UNEVEN_BAR = 1.5
MEAN_BAR, MAX_BAR = 2e-6, 1e-5
NEVER = ()


def tiny_model() -> ModelConfig:
    """`model=k25_tiny`."""
    model, problems = build_section(
        group_values("model", CONF_DIR / "model" / "k25_tiny.yaml"), ModelConfig, ""
    )
    assert not problems
    return model


def fastest(runs: dict[str, Callable[[], int]], rounds: int = ROUNDS) -> dict[str, float]:
    """Tokens a processor second of each, the best of rounds over all; each returns its number of tokens."""
    rates = dict.fromkeys(runs, 0.0)
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            tokens = run()
            rates[name] = max(rates[name], tokens / (time.process_time() - started))
    return rates


class Theirs:
    """`generate` of transformers."""

    def __init__(self, model: ModelConfig, weights: dict[str, torch.Tensor]) -> None:
        self._model, _ = build_hf_reference(model, weights, "sdpa")
        self._model.generation_config.pad_token_id = 0

    def use(self, experts: str) -> None:
        """How experts are computed."""
        self._model.config.text_config._experts_implementation = experts

    @torch.inference_mode()
    def generate(self, requests: Sequence[Request]) -> int:
        """One batch, as long as its longest; returns the tokens that were asked for."""
        longest = max(len(each.prompt_ids) for each in requests)
        ids = torch.zeros(len(requests), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, each in enumerate(requests):
            ids[row, longest - len(each.prompt_ids) :] = torch.tensor(each.prompt_ids)
            mask[row, longest - len(each.prompt_ids) :] = 1
        new = max(each.sampling.max_tokens for each in requests)
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            min_new_tokens=new,
            max_new_tokens=new,
        )
        return sum(each.sampling.max_tokens for each in requests)


class Ours:
    """The engine, from a loop of its own."""

    def __init__(self, engine: InProcessEngine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._loop = engine, loop
        self.last: list[Generated] = []

    def generate(self, requests: Sequence[Request]) -> int:
        """All at once; returns the number of tokens."""

        async def all_of_them() -> list[Generated]:
            return await asyncio.gather(*(self._engine.generate(each) for each in requests))

        self.last = self._loop.run_until_complete(all_of_them())
        return sum(len(each.token_ids) for each in self.last)

    def gap(self, requests: Sequence[Request]) -> np.ndarray:
        """Differences to a full forward, of every token."""
        self.generate(requests)
        gaps = []
        for each, got in zip(requests, self.last, strict=True):
            sequence = ProbeSequence((*each.prompt_ids, *got.token_ids.tolist()), each.images)
            (logprobs,) = self._loop.run_until_complete(self._engine.probe([sequence]))
            gaps.append(np.abs(logprobs[-len(got.token_ids) :] - got.logprobs))
        return np.concatenate(gaps)


def measure(ours: Ours, few: Ours, theirs: Theirs, model: ModelConfig) -> tuple[Table, list[str]]:
    """The table, and what misses its bar; `few` has as many slots as `generate` gets in a batch."""
    table = Table("in flight", "engine", "generate", "ratio", "bar", title="tokens per processor second")
    missed = []
    for number in IN_FLIGHT:
        wanted = [_request(model, each, PROMPT, NEW) for each in range(number)]
        rates = fastest(_runs(ours, theirs, [wanted]))
        missed += _row(table, str(number), rates, 1.0 if number in BARRED else 0.0)
    rng = np.random.default_rng(0)
    wanted = [
        _request(model, each, int(rng.integers(16, 113)), int(rng.integers(4, 65))) for each in range(UNEVEN)
    ]
    batches = [wanted[start : start + UNEVEN_SLOTS] for start in range(0, UNEVEN, UNEVEN_SLOTS)]
    missed += _row(
        table, f"{UNEVEN_SLOTS}, uneven", fastest(_runs(few, theirs, batches), rounds=1), UNEVEN_BAR
    )
    return table, missed


def _request(model: ModelConfig, number: int, length: int, new: int) -> Request:
    # Whatever it draws, it goes on: what is generated is as long as asked.
    return request(model, number, length=length, max_tokens=new, stop_ids=NEVER, forbidden_ids=NEVER)


def _runs(ours: Ours, theirs: Theirs, batches: Sequence[Sequence[Request]]) -> dict[str, Callable[[], int]]:
    def with_experts(kind: str) -> Callable[[], int]:
        def run() -> int:
            theirs.use(kind)
            return sum(theirs.generate(batch) for batch in batches)

        return run

    flat = [each for batch in batches for each in batch]
    return {
        "engine": lambda: ours.generate(flat),
        "grouped_mm": with_experts("grouped_mm"),
        "eager": with_experts("eager"),
    }


def _row(table: Table, name: str, rates: dict[str, float], bar: float) -> list[str]:
    theirs = max(rates["grouped_mm"], rates["eager"])
    ratio = rates["engine"] / theirs
    table.add_row(
        name, f"{rates['engine']:,.0f}", f"{theirs:,.0f}", f"{ratio:.2f}", f"{bar:.1f}" if bar else ""
    )
    return [f"{name} in flight: {ratio:.2f} times generate, bar {bar:.1f}"] if ratio < bar else []


def main() -> int:
    """Measure and print; returns 1 where a bar is missed."""
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    console = Console()
    model = tiny_model()
    weights = random_checkpoint(model)
    loop = asyncio.new_event_loop()
    engines = [build_engine(model, max_running=number) for number in (SLOTS, UNEVEN_SLOTS)]
    for engine in engines:
        loop.run_until_complete(push(engine, weights, 0))
    ours, few = (Ours(engine, loop) for engine in engines)
    table, missed = measure(ours, few, Theirs(model, weights), model)
    console.print(table)
    texts = [request(model, number, length=8 + 5 * number, max_tokens=24) for number in range(16)]
    shown = [
        request(model, number, images=(picture(56, 56, number), picture(140, 84, number)), max_tokens=24)
        for number in range(16)
    ]
    gaps = ours.gap([*texts, *shown])
    for engine in engines:
        loop.run_until_complete(engine.close())
    if gaps.mean() > MEAN_BAR or gaps.max() > MAX_BAR:
        missed.append("log-probabilities differ from a full forward's")
    console.print(
        f"log-probabilities against a full forward: mean {gaps.mean():.1e} (bar {MEAN_BAR:.0e}), "
        f"max {gaps.max():.1e} (bar {MAX_BAR:.0e})"
    )
    console.print("; ".join(missed) or "every bar is met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
