"""`python -m k25_train.train experiment=… [overrides]`: train, under torchrun for several ranks."""

from k25_train.compose.command_line import hydra_app
from k25_train.compose.filled import check_filled_in, check_weights_filled_in
from k25_train.config.schema import Config
from k25_train.joining.place import check_place, place_in
from k25_train.metrics.trackers.build import check_trackers
from k25_train.startup.interrupts import end_quietly_on_interrupt


def train(config: Config) -> None:
    """Train the configured run from its newest checkpoint, or from the start."""
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
        trainer = Trainer(run, report)
        trainer.fit()
    run.activations.close()
    stop_process_group()
    trainer.stop.close()


def check_start(config: Config) -> None:
    """Raise `ConfigError` for weights or data that are still a template, and as `check_trackers` and
    `place_in`."""
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
