"""Imported once by the process that test ranks are forked from. Computes nothing."""

from k25_train.quiet import quiet_libraries
from parallel.megatron.platform import use_platform

quiet_libraries()
use_platform("cpu")

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.optimizer  # noqa: E402, F401

import k25_train.model.build  # noqa: E402
import parallel.topology  # noqa: E402, F401
