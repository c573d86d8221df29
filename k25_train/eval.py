"""`python -m k25_train.eval checkpoint=runs/…/checkpoints/step_N [dump=DIR] [overrides]`: held-out loss.

The run's own configuration is used, in any layout: by default every process is a data-parallel replica, so
the command runs alone as it stands. `dump=DIR` writes each batch with its losses as safetensors.
"""

import os
import sys
from pathlib import Path

from rich.console import Console

from k25_train.checkpoint import folders
from k25_train.config.command_line import exit_with
from k25_train.config.resolve import load
from k25_train.config.schema import Config
from k25_train.errors import ConfigError, K25Error
from k25_train.quiet import quiet_libraries
from parallel.megatron.platform import use_platform

USAGE = "python -m k25_train.eval checkpoint=runs/…/checkpoints/step_N [dump=DIR] [key=value …]"


def evaluate(config: Config, checkpoint: Path, dump: Path | None) -> tuple[float, float]:
    """Held-out losses (text, samples with media) of a checkpoint, in nats per token."""
    quiet_libraries()
    device = use_platform(config.cluster.device.value)
    # The modules below import megatron-core, which must find the platform chosen.
    from k25_train.checkpoint import state
    from k25_train.dump import dump_batches
    from k25_train.run import build_run
    from k25_train.step import eval_losses
    from parallel.topology import stop_process_group

    run = build_run(config, device)
    with run.loader:
        step = state.load(checkpoint, config, run.chunks, optimizer=None)
        losses = eval_losses(run, config.train.eval_sequences)
        if dump is not None:
            dump_batches(run, dump)
    if run.is_main:
        tell(f"{checkpoint}: step {step}, {config.train.eval_sequences} held-out sequences")
        tell(f"eval_text_loss     {losses.text_loss:.6f}")
        tell(f"eval_caption_loss  {losses.caption_loss:.6f}")
        if dump is not None:
            tell(f"batches and their losses: {dump}")
    stop_process_group()
    return losses.text_loss, losses.caption_loss


def tell(text: str) -> None:
    """Print a line as it is, however long."""
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def read_arguments(arguments: list[str]) -> tuple[Config, Path, Path | None]:
    """The checkpoint's configuration with overrides, the checkpoint, and where to dump.

    Raises `ConfigError` for a missing checkpoint argument and for every broken rule of the configuration,
    `CheckpointError` for an incomplete checkpoint.
    """
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    strays = [argument for argument in arguments if "=" not in argument]
    if strays or "checkpoint" not in given:
        raise ConfigError(f"{strays or 'no checkpoint=…'}: usage is {USAGE}")
    checkpoint = Path(given.pop("checkpoint"))
    folders.verify(checkpoint)
    dump = Path(given.pop("dump")) if "dump" in given else None
    one_replica_per_process = {
        "parallelism.pp": "1",
        "parallelism.vpp": "1",
        "parallelism.ep": "1",
        "parallelism.layout": "null",
        "cluster.nodes": "1",
        "cluster.gpus_per_node": os.environ.get("WORLD_SIZE", "1"),
    }
    overrides = [f"{key}={value}" for key, value in (one_replica_per_process | given).items()]
    return load(checkpoint / folders.CONFIG, overrides), checkpoint, dump


def main() -> None:
    """Console entry point."""
    try:
        evaluate(*read_arguments(sys.argv[1:]))
    except K25Error as error:
        exit_with(error)


if __name__ == "__main__":
    main()
