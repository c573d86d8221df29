"""vLLM in its own environment (`make engine`), started by `k25-rollout serve` on a checkpoint of ours."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from k25_train.config.model import ModelConfig
from k25_train.export.model_of import model_of
from k25_train.rollout.engines.http_engine import HttpEngine
from k25_train.rollout.engines.served_model import ServedModel
from k25_train.rollout.engines.vllm.client import connect_vllm
from k25_train.rollout.serve.own_server import special_ids
from tests.helpers.engine_subjects import LIMITS, Subject
from tests.helpers.exported_run import evaluate_alone, train_briefly
from tests.helpers.project_sources import REPO
from tests.helpers.ranks import free_port, run_ranks

START_S = 600.0
"""Far more than the half minute that it takes: machines are busy."""


@dataclass(frozen=True, slots=True)
class ServedRun:
    """A short training run that a server serves."""

    url: str
    folder: Path
    """Its export."""
    other: Path
    """Other weights of the same model."""
    dump: Path
    """Batches of its evaluation, with losses."""
    model: ModelConfig
    ids: ServedModel

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[HttpEngine]:
        """A client of the server."""
        engine = await connect_vllm(self.url, self.ids, LIMITS)
        try:
            yield engine
        finally:
            await engine.close()

    def subject(self) -> Subject:
        """For the tests of what every engine promises."""
        return Subject(
            open=self.connected,
            model=self.ids,
            weights=(self.folder, self.other),
            prompt=(40, 50, 60),
            image_prompt=(40, self.ids.media_pad, 60),
            num_tokens=300,
            tolerance=1e-4,
            same_draws=False,
        )


@contextlib.contextmanager
def served_run(work: Path) -> Iterator[ServedRun]:
    """Train, evaluate and serve for the length of the block; the command exports."""
    checkpoint, tokenizer = train_briefly(work)
    run_ranks(evaluate_alone, 1, str(checkpoint), f"dump={work / 'dump'}")
    folder, port = work / "exported", free_port()
    words = f"serve {checkpoint} --export-to {folder} --tokenizer {tokenizer} --port {port} "
    words += "--max-model-len 512 --max-running 8"
    with serving(words.split(), work / "serve.log"):
        model = model_of(checkpoint)
        pad = special_ids(_config(folder)).media_pad
        ids = ServedModel(vocab_size=model.vocab_size, media_pad=pad, vision=model.vision)
        other = other_weights(folder, work / "other")
        yield ServedRun(f"http://127.0.0.1:{port}", folder, other, work / "dump", model, ids)


@contextlib.contextmanager
def serving(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`k25-rollout` with these words, for the length of the block, which begins when it serves."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "k25_train.rollout", *words], cwd=REPO, stdout=output, stderr=output
        )
    try:
        end = time.monotonic() + START_S
        while " is served at " not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def other_weights(folder: Path, out: Path) -> Path:
    """The same folder, all of its tensors moved by a tenth of their spread."""
    shutil.copytree(folder, out)
    generator = torch.Generator().manual_seed(5)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        moved = {
            name: tensor + 0.1 * tensor.std().nan_to_num() * torch.randn(tensor.shape, generator=generator)
            for name, tensor in tensors.items()
        }
        save_file(moved, out / path.name)
    return out


def _config(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found
