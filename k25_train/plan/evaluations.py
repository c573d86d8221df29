"""Sequences of an evaluation, for layouts that the configured number does not suit; torch-free."""

import math
from dataclasses import replace

from k25_train.config.basics import data_parallel_size
from k25_train.config.schema import Config


def with_evaluations(config: Config) -> Config:
    """The same with as many sequences of an evaluation as the layout divides: no fewer than configured."""
    train, sizes = config.train, config.parallelism
    unit = train.micro_batch_size * data_parallel_size(config.world_size, sizes.pp, sizes.cp)
    needed = (sizes.pp if sizes.vpp > 1 else 1) * unit
    step = math.lcm(unit, 2)
    if train.eval_sequences >= needed and train.eval_sequences % step == 0:
        return config
    sequences = -(-max(train.eval_sequences, needed) // step) * step
    return replace(config, train=replace(train, eval_sequences=sequences))
