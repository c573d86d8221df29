"""`k25-rollout serve`: folders are looked at before a server reads them; children end with the command."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from k25_train.errors import ConfigError, MachineError
from k25_train.rollout.__main__ import main
from k25_train.rollout.engines.base import EngineError
from k25_train.rollout.serve.command import how_to_use, step_of
from k25_train.rollout.serve.folder import ServedFolder, check_servable
from k25_train.rollout.serve.orders import ServeOrder
from k25_train.rollout.serve.vllm_server import command_line, environment, prepared, serve_vllm
from tests.helpers.bad_engine import BadEngine
from tests.helpers.engine_subjects import serving
from tests.helpers.project_sources import REPO

CONFIG: dict[str, Any] = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "text_config": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
    },
    "use_unified_vision_chunk": True,
    "video_placeholder": "<|kimi_k25_video_placeholder|>",
    "media_placeholder_token_id": 63,
}


def folder_of(path: Path, config: dict[str, Any] = CONFIG, processor: str = '{"media_proc_cfg": {}}') -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(processor)
    return path


def order_of(path: Path, python: Path, **changes: Any) -> ServeOrder:
    values: dict[str, Any] = {
        "folder": ServedFolder(folder_of(path / "folder"), CONFIG, path),
        "host": "127.0.0.1",
        "port": 1,
        "weights": "float32",
        "label": 7,
        "max_running": 8,
        "max_model_len": None,
        "device": "cpu",
        "threads": 1,
        "python": python,
        "start_timeout_s": 30.0,
        "log": path / "vllm.log",
        "more": ["--seed", "5"],
    }
    return ServeOrder(**values | changes)


def without(*keys: str) -> dict[str, Any]:
    config = json.loads(json.dumps(CONFIG))
    place = config
    for key in keys[:-1]:
        place = place[key]
    del place[keys[-1]]
    return config


@pytest.mark.parametrize(
    ("config", "processor", "words"),
    [
        (without("architectures"), "{}", "architectures is None"),
        (without("text_config", "topk_method"), "{}", "lacks text_config.topk_method"),
        (without("text_config", "scoring_func"), "{}", "lacks text_config.scoring_func"),
        (without("use_unified_vision_chunk"), "{}", "lacks use_unified_vision_chunk"),
        (without("video_placeholder"), "{}", "lacks video_placeholder"),
        (CONFIG, "{}", "has no media_proc_cfg"),
    ],
)
def test_what_vllm_would_not_load_or_load_wrongly_is_refused(
    tmp_path: Path, config: dict[str, Any], processor: str, words: str
) -> None:
    path = folder_of(tmp_path / "folder", config, processor)
    with pytest.raises(ConfigError, match=words) as caught:
        check_servable(ServedFolder(path, config, path))
    assert "k25-convert export" in str(caught.value)


def test_a_folder_that_vllm_can_read_is_taken(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "folder")
    check_servable(ServedFolder(path, CONFIG, path))
    ServedFolder(path, CONFIG, path).check_cpu_heads()
    odd = {**CONFIG, "text_config": {**CONFIG["text_config"], "qk_rope_head_dim": 32}}
    with pytest.raises(ConfigError, match=r"heads of 48 .*\n  -> use --engine in_process"):
        ServedFolder(path, odd, path).check_cpu_heads()


def test_a_missing_environment_is_named_with_what_makes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path), "--python", str(tmp_path / "none")]) == 2
    text = capsys.readouterr().err
    assert "none is not there" in text and "make engine" in text and "--engine in_process" in text


def test_what_is_neither_a_checkpoint_nor_a_release_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tmp_path), "--engine", "in_process"]) == 2
    assert "neither a checkpoint" in capsys.readouterr().err
    folder_of(tmp_path)
    assert main(["serve", str(tmp_path), "--engine", "in_process"]) == 2
    assert "k25-convert import" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_an_export_that_fails_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["serve", str(tmp_path), "--engine", "in_process"]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "not exported by `k25-convert export" in text


def test_the_words_and_variables_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    order = order_of(tmp_path, Path("/engine/bin/python"))
    words = " ".join(command_line(order))
    assert words.startswith("/engine/bin/python -m vllm.entrypoints.openai.api_server --model ")
    for part in ("--enable-scale-out", "--logprobs-mode raw_logprobs", "--enforce-eager", "--seed 5"):
        assert part in words
    assert "--max-model-len" not in words
    variables = environment(order)
    # Of ours they see one file.
    path = Path(variables["PYTHONPATH"])
    assert {each.name for each in path.glob("*.py")} == {"__init__.py", "k25_vllm_worker.py"}
    assert variables["VLLM_SERVER_DEV_MODE"] == "1"
    assert order.url == "http://127.0.0.1:1"
    assert "rollout.urls=[http://127.0.0.1:1]" in how_to_use(order, "step_7")
    assert step_of(Path("runs/a/checkpoints/step_160")) == 160
    assert step_of(Path("Kimi-K2.5")) == 0


def script(path: Path, text: str) -> Path:
    """A program in the place of vLLM's Python."""
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def test_a_server_that_ends_is_shown_with_its_last_words(tmp_path: Path) -> None:
    python = script(tmp_path / "python", "print('out of memory'); raise SystemExit(3)")
    with pytest.raises(MachineError, match=r"(?s)ended with 3 before it served.*out of memory"):
        serve_vllm(order_of(tmp_path, python), lambda: None)


def test_a_server_that_does_not_come_up_is_ended_with_its_children(tmp_path: Path) -> None:
    text = f"""
import pathlib, subprocess, time
child = subprocess.Popen(["sleep", "1000"])
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
time.sleep(1000)
"""
    python = script(tmp_path / "python", text)
    with pytest.raises(MachineError, match="does not serve after"):
        serve_vllm(order_of(tmp_path, python, start_timeout_s=2.0), lambda: None)
    assert is_gone(int((tmp_path / "pid").read_text()))


def is_gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_another_vllm_than_the_one_that_was_tried_is_refused(tmp_path: Path) -> None:
    async def body() -> None:
        server = BadEngine()
        async with serving(server.app()) as url:
            order = replace(order_of(tmp_path, Path("python")), port=int(url.rpartition(":")[2]))
            for server.worker in ({"vllm": "0.33.0", "experts": 4}, {"vllm": "0.32.0", "experts": 0}):
                with pytest.raises(EngineError, match=r"(?s)with \d layers.*use vLLM 0\.32\.0"):
                    await prepared(order)
            server.worker = {"vllm": "0.32.0", "experts": 4}
            await prepared(order)

    asyncio.run(body())


def test_the_command_ends_its_children_when_it_is_terminated(tmp_path: Path) -> None:
    text = f"""
import http.server, json, os, pathlib, sys
pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
class Handler(http.server.BaseHTTPRequestHandler):
    def _answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.dumps({{"results": [{{"vllm": "0.32.0", "experts": 4}}]}}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = _answer
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""
    python, folder = script(tmp_path / "python", text), folder_of(tmp_path / "folder")
    from tests.helpers.ranks import free_port

    words = ["serve", str(folder), "--python", str(python), "--port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, "-m", "k25_train.rollout", *words, "--log", str(tmp_path / "log")],
        cwd=REPO,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    assert process.stdout is not None
    assert "is served at http://127.0.0.1:" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert is_gone(int((tmp_path / "pid").read_text()))
