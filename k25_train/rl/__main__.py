"""`python -m k25_train.rl experiment=… [overrides]`: reinforces, under torchrun for several ranks.

The experiment has the sections `algorithm`, `rollout` and `environment`; the same command in the same folder
goes on with what was rolled out.
"""

from k25_train.compose.command_line import hydra_app
from k25_train.config.schema import Config
from k25_train.rl.command import check_start, reinforce
from k25_train.startup.interrupts import end_quietly_on_interrupt


def run(config: Config) -> None:
    """Reinforce the configured run."""
    reinforce(config)


command = hydra_app(run, check=check_start)


def main() -> None:
    """Console entry point."""
    end_quietly_on_interrupt()
    command()


if __name__ == "__main__":
    main()
