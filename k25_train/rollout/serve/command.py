"""`k25-rollout serve`: starts an engine on a checkpoint, for `rollout.urls` of a run; ends it on Ctrl-C."""

import argparse
import contextlib
import functools
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from k25_train.errors import ConfigError
from k25_train.rollout.serve.folder import DTYPES, ServedFolder, served_folder
from k25_train.rollout.serve.orders import ServeOrder

REPO = Path(__file__).parents[3]
ENGINE_PYTHON = REPO / ".venv-engine/bin/python"
"""What `make engine` makes: vLLM wants an older transformers than the trainer."""
MAX_RUNNING = 64


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "serve",
        help="start an engine on a checkpoint, to which rollout.urls can point",
        description=__doc__.partition(":")[2].strip() if __doc__ else None,
    )
    option = parser.add_argument
    option("checkpoint", metavar="CKPT", type=Path, help="step_N of a run, an import, or an exported folder")
    option("--engine", choices=("vllm", "in_process"), default="vllm", help="what generates (%(default)s)")
    option("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    option("--port", type=int, default=8000, help="port (%(default)s)")
    option("--weights", choices=tuple(DTYPES), default="float32", help="as rollout.weights (%(default)s)")
    option("--tokenizer", metavar="FILE", type=Path, help="vocabulary that the run was trained with")
    option("--like", metavar="DIR", type=Path, help="released folder whose small files are taken")
    option(
        "--export-to", metavar="DIR", type=Path, help="where to export to, and keep it (a temporary folder)"
    )
    option("--label", type=int, metavar="N", help="version of the weights (the checkpoint's step)")
    option("--max-model-len", type=int, metavar="N", help="longest prompt and response (the model's)")
    option(
        "--max-running", type=int, default=MAX_RUNNING, metavar="N", help="responses at once (%(default)s)"
    )
    option("--device", default="cpu", help="of the in-process engine (%(default)s)")
    option("--threads", type=int, default=1, metavar="N", help="of arithmetic on a CPU (%(default)s)")
    option("--python", type=Path, default=ENGINE_PYTHON, help="Python that has vLLM (%(default)s)")
    option("--start-timeout", type=float, default=900.0, metavar="S", help="seconds to wait (%(default)s)")
    option("--log", metavar="FILE", type=Path, help="of vLLM's output (vllm.log next to the folder)")
    option("--more", default="", metavar="WORDS", help="more of vLLM's own options, in one argument")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status."""
    if options.engine == "vllm" and not options.python.exists():
        raise ConfigError(
            f"--engine vllm: {options.python} is not there\n  -> `make engine` makes it (2.8 GB), "
            "--python names another one that has vLLM, --engine in_process needs none"
        )
    # torch and HTTP are not needed to print the help.
    from k25_train.rollout.serve.own_server import serve_in_process
    from k25_train.rollout.serve.vllm_server import serve_vllm

    with _terminable(), _folder_of(options, console) as folder:
        order = ServeOrder(
            folder=folder,
            host=options.host,
            port=options.port,
            weights=options.weights,
            label=options.label if options.label is not None else step_of(options.checkpoint),
            max_running=options.max_running,
            max_model_len=options.max_model_len,
            device=options.device,
            threads=options.threads,
            python=options.python,
            start_timeout_s=options.start_timeout,
            log=options.log or folder.path.with_name(f"{folder.path.name}.vllm.log"),
            more=options.more.split(),
        )
        # What is in brackets is a URL, no style.
        say = functools.partial(console.print, markup=False)
        serve = serve_vllm if options.engine == "vllm" else serve_in_process
        return serve(order, lambda: say(how_to_use(order, str(options.checkpoint))))


def step_of(checkpoint: Path) -> int:
    """The step of a run's checkpoint, by its name; 0 of anything else."""
    found = re.fullmatch(r"step_(\d+)", checkpoint.resolve().name)
    return int(found[1]) if found else 0


def how_to_use(order: ServeOrder, checkpoint: str) -> str:
    """What is printed once it serves."""
    return (
        f"{checkpoint} is served at {order.url} as version {order.label}; Ctrl-C ends it\n"
        f"a run generates there with: rollout=vllm 'rollout.urls=[{order.url}]' "
        f"rollout.weights={order.weights}"
    )


@contextlib.contextmanager
def _folder_of(options: argparse.Namespace, console: Console) -> Iterator[ServedFolder]:
    with tempfile.TemporaryDirectory(prefix="k25-serve-") as work:
        out = options.export_to or Path(work) / "exported"
        yield served_folder(options.checkpoint, out, options, console.print)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what it has started ends with it."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
