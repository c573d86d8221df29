"""`python -m k25_train.eval checkpoint=RUN [overrides]`: held-out losses of a checkpoint.

Of a run its newest one, or the one that is named: a folder, `RUN/checkpoints/step_N`, or a URL.

An import (`k25-convert import`) is the same, but has no run: name an experiment, and its data, as to train.

The run's own configuration is used, in any layout: by default every process is a data-parallel replica, so
the command runs in one process as written. `dump=DIR` writes each batch with its losses as safetensors.
`shuffle_media=SEED` also reports the loss when every sample is shown another sample's images.
"""

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from k25_train.checkpoint import folders
from k25_train.checkpoint.commands.choice import chosen
from k25_train.checkpoint.integrity import verify
from k25_train.checkpoint.manifest import Kind
from k25_train.checkpoint.storage.kinds import Place
from k25_train.compose.command_line import load_saved
from k25_train.compose.resolve import compose
from k25_train.config.optimizer import OptimizerOffload
from k25_train.config.schema import Config
from k25_train.data.source import ThreadSource
from k25_train.entry import run_command
from k25_train.errors import ConfigError, DataError
from k25_train.joining.environment import read_environment
from k25_train.startup.determinism import prepare_determinism
from k25_train.startup.platform import prepare_device

CAPTION_LOSS = "eval_caption_loss"
OWN = ("checkpoint", "dump", "shuffle_media")
"""Arguments that are no settings of the run."""
USAGE = "python -m k25_train.eval checkpoint=RUN|runs/…/step_N [dump=DIR] [shuffle_media=SEED] [key=value …]"
MODEL = "model.yaml"
"""Of an import with a language model: what to choose as `model`."""


def evaluate(
    config: Config, checkpoint: Place, dump: Path | None = None, shuffle_media_seed: int | None = None
) -> dict[str, float]:
    """Held-out losses of a checkpoint by name, in nats per token; prints them."""
    # One evaluation is read before it is computed: a second process would only wait.
    data = ThreadSource(config)
    prepare_determinism(config.train, config.cluster)
    device = prepare_device(config.cluster)
    # The modules below import megatron-core, which must find the platform chosen.
    from k25_train.checkpoint.agreement import on_first_rank
    from k25_train.checkpoint.checking import notes_on
    from k25_train.checkpoint.loading import load
    from k25_train.training.dump import dump_batches
    from k25_train.training.evaluation import eval_losses
    from k25_train.training.run import build_run
    from parallel.topology import stop_process_group

    # No optimizer steps, so its kernel need not be compiled.
    config = replace(config, optim=replace(config.optim, offload=OptimizerOffload.none))
    run = build_run(config, device, data, trains=False)
    # A run that goes on may have saved another since the first rank looked.
    checkpoint = on_first_rank(lambda: checkpoint)
    with run.data:
        step = load(checkpoint, config, run.modules, optimizer=None)
        losses = eval_losses(run, config.train.eval_sequences)
        if shuffle_media_seed is not None:
            shuffled = eval_losses(run, config.train.eval_sequences, shuffle_media_seed)
            if CAPTION_LOSS not in shuffled:
                raise DataError(
                    f"shuffle_media={shuffle_media_seed}: no held-out sample with media in {config.data.dir} "
                    "has a text with a loss\n  -> leave shuffle_media out, or name a set that has: data.dir=…"
                )
            losses[f"{CAPTION_LOSS}_shuffled"] = shuffled[CAPTION_LOSS]
        if dump is not None:
            dump_batches(run, dump)
    if run.is_main:
        for note in notes_on(checkpoint, run.data.facts()):
            print_line(note)
        print_line(f"{checkpoint}: step {step}, {config.train.eval_sequences} held-out sequences")
        for name, loss in losses.items():
            print_line(f"{name:26}  {loss:.6f}")
        if dump is not None:
            print_line(f"batches and their losses: {dump}")
    stop_process_group()
    return losses


def print_line(text: str) -> None:
    """Print a line unwrapped, however long."""
    Console(soft_wrap=True).print(text, markup=False, highlight=False)


def read_arguments(arguments: list[str]) -> tuple[Config, Place, Path | None, int | None]:
    """The checkpoint's configuration with overrides, the checkpoint, where to dump, the seed to shuffle by.

    Raises `ConfigError` for a missing checkpoint argument and for every broken rule of the configuration,
    `CheckpointError` for an incomplete checkpoint.
    """
    own: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if equals and name in OWN:
            own[name] = value
        else:
            overrides.append(argument)
    if not own.get("checkpoint"):
        raise ConfigError(f"checkpoint=: must name a checkpoint; usage is {USAGE}")
    checkpoint = chosen(own["checkpoint"]).folder
    manifest = verify(checkpoint)
    one_replica_per_process = {
        "parallelism.pp": 1,
        "parallelism.vpp": 1,
        "parallelism.ep": 1,
        "parallelism.cp": 1,
        "parallelism.cp_exchange": "null",
        "parallelism.layout": "null",
        "parallelism.overlap_expert_comm": "false",
        "parallelism.delay_wgrad": "false",
        "dep.mode": "coupled",
        "cluster.nodes": 1,
        "cluster.gpus_per_node": read_environment().world_size,
    }
    overrides = [*(f"{key}={value}" for key, value in one_replica_per_process.items()), *overrides]
    if manifest.kind is Kind.WEIGHTS:
        config = _config_for_import(checkpoint, overrides)
    else:
        config = load_saved(checkpoint / folders.CONFIG, overrides)
    if "dump" in own and not own["dump"]:
        raise ConfigError("dump=: must name a folder; leave it out to write nothing")
    seed = shuffle_seed(own["shuffle_media"], config) if "shuffle_media" in own else None
    return config, checkpoint, Path(own["dump"]) if "dump" in own else None, seed


def _config_for_import(checkpoint: Place, overrides: list[str]) -> Config:
    """What the arguments say, for the model of an import. Raises `ConfigError`."""
    keys = {override.partition("=")[0] for override in overrides}
    if "experiment" not in keys:
        raise ConfigError(
            f"checkpoint={checkpoint}: is an import, which says nothing of data\n"
            "  -> name what it is evaluated in: experiment=NAME data=NAME|FILE.yaml …"
        )
    if "model" not in keys and isinstance(checkpoint, Path) and (checkpoint / MODEL).is_file():
        overrides = [f"model={checkpoint / MODEL}", *overrides]
    return compose(overrides)


def shuffle_seed(text: str, config: Config) -> int:
    """The seed to shuffle media by. Raises `ConfigError` if it is none, or there are no media to shuffle."""
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"shuffle_media={text}: must be a seed, a whole number from 0 on")
    if not any(source.may_have_media for source in config.data.sources.values()):
        raise ConfigError(
            f"shuffle_media={text}: needs samples with media, but data.sources has only text: "
            f"{', '.join(config.data.sources)}\n"
            "  -> leave shuffle_media out, or add a source with images"
        )
    return int(text)


def main() -> None:
    """Console entry point."""
    run_command(_run)


def _run() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    evaluate(*read_arguments(sys.argv[1:]))


if __name__ == "__main__":
    main()
