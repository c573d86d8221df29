"""`python -m k25_train.any_run experiment=…`: `k25_train.rl` for experiments with an `algorithm`, otherwise
`k25_train.train`. What launchers start."""

from k25_train.compose.command_line import hydra_app
from k25_train.config.schema import Config
from k25_train.startup.interrupts import end_quietly_on_interrupt
from k25_train.train import check_parts, train


def run(config: Config) -> None:
    """Train or reinforce the configured run, whichever it is."""
    if config.algorithm is None:
        train(config)
        return
    # Whoever trains without it does not need what it imports.
    from k25_train.rl.command import reinforce

    reinforce(config)


def check_start(config: Config) -> None:
    """Raise `ConfigError` as the two commands do."""
    if config.algorithm is None:
        check_parts(config)
        return
    from k25_train.rl.command import check_start as check_reinforcement

    check_reinforcement(config)


command = hydra_app(run, check=check_start)


def main() -> None:
    """Start the command."""
    end_quietly_on_interrupt()
    command()


if __name__ == "__main__":
    main()
