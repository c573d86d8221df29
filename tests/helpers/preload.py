"""Imported once by the process that test ranks are forked from. Computes nothing."""

import importlib

from k25_train.quiet import quiet_libraries
from parallel.megatron.platform import use_platform

quiet_libraries()
use_platform("cpu")

# Only now: megatron-core has to find the platform chosen.
for module in ("megatron.core.dist_checkpointing", "k25_train.run", "k25_train.trainer", "parallel.topology"):
    importlib.import_module(module)
