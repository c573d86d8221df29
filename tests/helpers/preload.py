"""Imported once by the process that test ranks are forked from. Computes nothing."""

from parallel.megatron.platform import use_platform

use_platform("cpu")

import megatron.core.dist_checkpointing  # noqa: E402
import megatron.core.optimizer  # noqa: E402, F401

import k25_train.model.build  # noqa: E402
import parallel.topology  # noqa: E402, F401
