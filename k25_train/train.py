"""`python -m k25_train.train experiment=… [overrides]`: train, under torchrun for several ranks."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from k25_train.compose.command_line import hydra_app
from k25_train.compose.filled import check_filled_in, check_weights_filled_in
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.joining.place import check_place, place_in
from k25_train.metrics.trackers.build import check_trackers
from k25_train.startup.interrupts import end_quietly_on_interrupt

if TYPE_CHECKING:
    from k25_train.metrics.report import Report
    from k25_train.training.hooks import StepHooks
    from k25_train.training.run import Run


def train(config: Config) -> None:
    """Train the configured run from its newest checkpoint, or from the start."""

    def no_hooks(run: "Run", report: "Report") -> "StepHooks":
        from k25_train.training.hooks import NO_HOOKS

        return NO_HOOKS

    fit(config, no_hooks)


def fit(config: Config, build_hooks: "Callable[[Run, Report], StepHooks]") -> None:
    """Train the configured run, with what else happens around its steps.

    `build_hooks` may import megatron-core: the platform is chosen by then.
    """
    # Imported late: torch takes seconds.
    check_place(config)
    import torch

    from k25_train.data.start import start_source
    from k25_train.startup.determinism import prepare_determinism
    from k25_train.startup.platform import prepare_device

    # Forked while there is neither a thread nor a CUDA context.
    data = start_source(config)
    prepare_determinism(config.train, config.cluster)
    device = prepare_device(config.cluster)
    # The modules below import megatron-core, which must find the platform chosen.
    from k25_train.metrics.report import Report
    from k25_train.training.run import build_run
    from k25_train.training.trainer import Trainer
    from parallel.topology import stop_process_group

    run = build_run(config, device, data)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    # The claim ends last: what waits for the metrics is written on the way out.
    with run.claim, Report(config, is_main=run.is_main, device_name=name) as report, run.data:
        trainer = Trainer(run, report, build_hooks(run, report))
        trainer.fit()
    run.activations.close()
    stop_process_group()
    trainer.stop.close()


def check_start(config: Config) -> None:
    """Raise `ConfigError` for weights or data that are still a template, as `check_trackers` and `place_in`,
    and for reinforcement learning, which is another command's."""
    if config.algorithm is not None:
        raise ConfigError(
            "algorithm: is given, so this is reinforcement learning, which k25-train does not do\n"
            "  -> start it with `python -m k25_train.rl` (k25-rl) and the same settings"
        )
    check_parts(config)


def check_parts(config: Config) -> None:
    """The same for any run."""
    check_weights_filled_in(config.checkpoint)
    check_filled_in(config.data)
    check_trackers(config)
    place_in(config)


command = hydra_app(train, check=check_start)


def main() -> None:
    """Console entry point."""
    end_quietly_on_interrupt()
    command()


if __name__ == "__main__":
    main()
