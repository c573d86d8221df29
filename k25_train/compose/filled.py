"""Whether a data set that began as a template is complete."""

from k25_train.compose.resolve import describe
from k25_train.config.data import DataConfig
from k25_train.errors import ConfigError
from parallel.config import Problem


def check_filled_in(data: DataConfig) -> None:
    """Raise `ConfigError`, with every path that is still open, unless all are filled in.

    Plans do without data; what runs or is submitted calls this first.
    """
    remedy = "give a path of yours, another set with data=NAME or data=FILE.yaml, or take data=smoke"
    open_paths = data.open_paths().items()
    problems = [Problem(key, path, "has to be filled in", remedy) for key, path in open_paths]
    if problems:
        raise ConfigError(describe(problems, "the data set, which is a template so far"))
