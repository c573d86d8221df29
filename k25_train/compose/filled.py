"""Whether data and first weights that began as templates are complete."""

from k25_train.compose.resolve import describe
from k25_train.config.checkpoint import CheckpointConfig
from k25_train.config.data import DataConfig
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from parallel.config import Problem

RULE = "has to be filled in"


def check_filled_in(data: DataConfig) -> None:
    """Raise `ConfigError`, with every path that is still open, unless all are filled in.

    Plans do without data; what runs or is submitted calls this first.
    """
    remedy = "give a path of yours, another set with data=NAME or data=FILE.yaml, or take data=smoke"
    open_paths = data.open_paths().items()
    problems = [Problem(key, path, RULE, remedy) for key, path in open_paths]
    if problems:
        raise ConfigError(describe(problems, "the data set, which is a template so far"))


def check_weights_filled_in(checkpoint: CheckpointConfig) -> None:
    """Raise `ConfigError`, with every source of first weights that is still open, unless all are filled in.

    Plans do without weights; what runs or is submitted calls this first.
    """
    problems = [
        Problem(key, source, RULE, f"name a checkpoint or an import (k25_train.convert): {_setting(key)}")
        for key, source in checkpoint.open_sources().items()
    ]
    if problems:
        raise ConfigError(describe(problems, "the weights to start from, which are a template so far"))


def open_places(config: Config) -> dict[str, str]:
    """Key -> what a template says there, of all that the user has to fill in before it runs."""
    return config.checkpoint.open_sources() | config.data.open_paths()


def _setting(key: str) -> str:
    section, _, part = key.rpartition(".")
    return f"{section}={{{part}: DIR}}" if section.endswith("init_parts") else f"{key}=DIR"
