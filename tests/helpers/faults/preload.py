"""Imported once by the process that ranks of small jobs are forked from: what a training run imports late."""

import importlib

import tests.helpers.rank_imports  # noqa: F401

for module in ("k25_train.train", "k25_train.metrics.plots", "torch.utils.tensorboard", "hydra.main"):
    importlib.import_module(module)
