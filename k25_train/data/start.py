"""Choosing where a rank's batches are made."""

from k25_train.config.data import ReadIn
from k25_train.config.schema import Config
from k25_train.data.reading_process import ReadingProcess
from k25_train.data.source import DataSource, ThreadSource
from k25_train.data.trajectories.source import TrajectorySource


def start_source(config: Config) -> DataSource:
    """The source that `data.read_in` names; that of rollouts with an `algorithm`.

    Call it before anything computes: a process is forked, which must not share threads or a CUDA context.
    Raises `ConfigError` where there can be no such process.
    """
    if config.algorithm is not None:
        return TrajectorySource(config)
    return ThreadSource(config) if config.data.read_in is ReadIn.thread else ReadingProcess(config)
