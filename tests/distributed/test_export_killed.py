"""An export whose processes are killed ends with a named error, and the same command goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from k25_train.convert.__main__ import main
from tests.helpers.hf_reference import tiny_model_config
from tests.helpers.released_checkpoints import released_state, stacked, write_weights
from tests.helpers.tiny_shards import VOCAB_SIZE, make_text

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

DIES = """
import os
import k25_train.export.writer as writer

fill, filled = writer._fill, []


def dies(*arguments):
    fill(*arguments)
    filled.append(1)
    if len(filled) == 2:
        os.kill(os.getpid(), 9)


writer._fill = dies
"""
"""Ends a process as by the system's killer when its second file is full, but has no name yet."""


def test_a_killed_process_is_named_and_the_command_goes_on(tmp_path: Path) -> None:
    from k25_train.data.tokenizer import train_tokenizer

    model, tokenizer = tiny_model_config(vocab_size=VOCAB_SIZE), tmp_path / "tokenizer.json"
    train_tokenizer([make_text(400, seed) for seed in range(4)], VOCAB_SIZE, tokenizer)
    checkpoint = write_weights(tmp_path / "step_0", model, stacked(released_state(model)))

    def words(out: str, num_workers: int) -> list[str]:
        options = f"--dtype int4 --workers {num_workers} --tokenizer".split()
        return ["export", str(checkpoint), str(tmp_path / out), *options, str(tokenizer)]

    assert main(words("whole", 1)) == 0
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(DIES)
    killed = subprocess.run(
        [sys.executable, "-m", "k25_train.convert", *words("out", 2)],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == 2, killed.stderr
    assert "a process that wrote files was killed; the same command goes on" in " ".join(
        killed.stderr.split()
    )
    assert not (tmp_path / "out").exists()
    left = list((tmp_path / "out.partial").glob(".model-*"))
    assert left
    assert main(words("out", 2)) == 0
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
