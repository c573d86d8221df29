"""`k25-rollout gateway`: agents of any make before engines that serve already; ends on Ctrl-C."""

import argparse
import asyncio
import contextlib
import signal
from pathlib import Path
from typing import Any

from rich.console import Console

PORT = 8100


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "gateway",
        help="serve the OpenAI and Anthropic APIs before engines, and record what agents do",
        description=(__doc__ or "").partition(":")[2].strip(),
    )
    option = parser.add_argument
    option("--config", metavar="FILE", type=Path, required=True, help="config.yaml of the engines' run")
    option("--to", metavar="DIR", type=Path, required=True, help="where traces go; `show` reads them there")
    option(
        "--url", metavar="URL", action="append", default=[], help="of an engine; again for more (the run's)"
    )
    option("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    option("--port", type=int, default=PORT, help="port; 0 for any (%(default)s)")
    option(
        "--health",
        type=float,
        default=10.0,
        metavar="S",
        help="seconds between looks at engines (%(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit status."""
    # HTTP and the tokenizer are not needed to print the help.
    from k25_train.compose.command_line import load_saved
    from k25_train.rollout.gateway.standalone.gateway import GatewayOrder, standalone_gateway

    order = GatewayOrder(
        config_path=options.config,
        config=load_saved(options.config),
        urls=options.url,
        folder=options.to,
        host=options.host,
        port=options.port,
        health_s=options.health,
    )

    def tell(text: str) -> None:
        console.print(text, markup=False)

    async def serve() -> None:
        ended, loop = asyncio.Event(), asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, ended.set)
        async with standalone_gateway(order, tell) as serving:
            tell(
                f"{serving.url} serves /v1/chat/completions, /v1/responses and /v1/messages; traces go to "
                f"{options.to}; Ctrl-C ends it\n"
                f"sessions are opened with POST {serving.url}/admin/sessions and this key, which is told "
                f"once: {serving.admin_key}"
            )
            await ended.wait()

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())
    return 0
