"""Imported once by the process that test ranks are forked from. Computes nothing with tensors."""

import gc
import importlib

from PIL import Image

from k25_train.compose.resolve import compose
from k25_train.startup.quiet import quiet_libraries
from parallel.megatron.platform import use_platform
from tests.helpers.runs import SHRUNK

quiet_libraries()
use_platform("cpu")

# Only now: megatron-core has to find the platform chosen.
for module in (
    "megatron.core.dist_checkpointing",
    "k25_train.training.run",
    "k25_train.training.trainer",
    "parallel.topology",
):
    importlib.import_module(module)

# What would otherwise take most of the time in which each rank builds its run: late imports, and the tables
# of hydra's parser, which the first configuration fills.
importlib.import_module("torch._dynamo")
Image.init()
compose(SHRUNK)

# Objects of the libraries live as long as the process: ranks need not look for garbage among them, which
# takes 0.1 s each time, and megatron-core collects several times in every save.
gc.collect()
gc.freeze()
