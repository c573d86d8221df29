"""What `k25-rl` does, and checks before it does it."""

from typing import TYPE_CHECKING

from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.rl.tasks import TaskOrder
from k25_train.train import check_parts, fit

if TYPE_CHECKING:
    from k25_train.metrics.report import Report
    from k25_train.training.hooks import StepHooks
    from k25_train.training.run import Run


def reinforce(config: Config) -> None:
    """Reinforce the configured run from its newest checkpoint, or from the start."""

    def build_hooks(run: "Run", report: "Report") -> "StepHooks":
        from k25_train.rl.build import build_reinforcement

        return build_reinforcement(run, report)

    fit(config, build_hooks)


def check_start(config: Config) -> None:
    """Raise `ConfigError` for a configuration without an algorithm, for fewer tasks than the run uses, and as
    `k25_train.train` does."""
    if config.algorithm is None or config.environment is None:
        raise ConfigError(
            "algorithm: is not given, so there is nothing to reinforce\n"
            "  -> add e.g. algorithm=k25 rollout=in_process environment=sums, or start it with "
            "`python -m k25_train.train` (k25-train)"
        )
    check_parts(config)
    tasks = TaskOrder(config.environment, config.train.seed)
    tasks.check_enough(config.train.steps * config.algorithm.prompts_per_step)
