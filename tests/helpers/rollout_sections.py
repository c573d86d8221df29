"""The sections of rollouts that tests do not care for, as `conf` has them."""

from functools import cache

from k25_train.compose.resolve import compose
from k25_train.config.rollout_manager import ManagerConfig
from k25_train.config.sandbox import SandboxConfig
from k25_train.config.schema import Config


@cache
def composed() -> Config:
    """A configuration of reinforcement learning."""
    return compose(["experiment=rl_smoke"])


def manager_section() -> ManagerConfig:
    """`rollout.manager`."""
    rollout = composed().rollout
    assert rollout is not None
    return rollout.manager


def sandbox_section() -> SandboxConfig:
    """`environment.sandbox`."""
    environment = composed().environment
    assert environment is not None
    return environment.sandbox
