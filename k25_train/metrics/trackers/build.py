"""The services of a configuration, and whether their libraries are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from k25_train.compose.resolve import to_yaml
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.metrics.sinks import Sink, SteadySink
from k25_train.metrics.trackers.background import BackgroundSink
from k25_train.metrics.trackers.mlflow_sink import MlflowSink
from k25_train.metrics.trackers.wandb_sink import WandbSink

SHOWN = ("model", "parallelism", "dep", "activation", "optim", "train")
"""Sections of the configuration that services show: those without paths, URLs and commands."""


def check_trackers(config: Config) -> None:
    """Raise `ConfigError` if the library of a service is not installed, before a job costs anything."""
    for name in ("wandb", "mlflow"):
        if getattr(config.metrics, name) is not None and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"metrics.{name}: its library is not installed: pip install 'k25-train[{name}]', or set "
                f"metrics.{name}=null"
            )


def build_trackers(config: Config, folder: Path, warn: Callable[[str], None]) -> list[BackgroundSink]:
    """The sinks of the services that are asked for; each opens when the first row comes, in its thread."""
    found: dict[str, Callable[[], Sink]] = {}
    if (wandb := config.metrics.wandb) is not None:
        found["Weights & Biases"] = lambda: WandbSink(folder, wandb, described(config))
    if (mlflow := config.metrics.mlflow) is not None:
        found["MLflow"] = lambda: MlflowSink(folder, mlflow, described(config))
    return [
        BackgroundSink(SteadySink(name, lambda _, open_sink=open_sink: open_sink(), warn), warn)  # type: ignore[misc]
        for name, open_sink in found.items()
    ]


def described(config: Config) -> Mapping[str, Any]:
    """What of the configuration is shown with the run."""
    values = yaml.safe_load(to_yaml(config))
    return {section: values[section] for section in SHOWN}
