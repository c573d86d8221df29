"""MLflow (3.17) as a sink, by its client alone. Who may write is told by its own environment variables."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k25_train.config.metrics import MlflowConfig
from k25_train.metrics.sinks import Row, number
from k25_train.metrics.trackers.run_ids import RunId
from k25_train.metrics.trackers.scalars import scalars_of

MOST_METRICS = 1000
"""Of one request (MLflow's REST API)."""
MOST_PARAMS = 100
"""Of one request."""
_NOT_IN_NAMES = re.compile(r"[^\w\-. /]", re.ASCII)
"""What the names of metrics may not have."""
GONE = "RESOURCE_DOES_NOT_EXIST"


class MlflowSink:
    """Logs rows to a run of MLflow, the same one for as long as the run folder is the same."""

    rows_per_flush = 1

    def __init__(self, folder: Path, config: MlflowConfig, described: Mapping[str, Any]) -> None:
        """Start or go on with the run; raises what the library raises, e.g. if the server does not answer.

        Args:
            folder: of the run; its name is that of the run there.
            config: where it is.
            described: configuration to show with it, nested.
        """
        from mlflow import MlflowClient  # type: ignore[import-not-found, unused-ignore]

        self._client: Any = MlflowClient(tracking_uri=config.uri)
        kept = RunId(folder, "mlflow", f"{config.uri} {config.experiment}")
        self._id = self._go_on_with(kept.load()) or self._new_run(folder, config.experiment, described)
        kept.save(self._id)

    def _go_on_with(self, name: str | None) -> str | None:
        """The run of this name, marked as running; None if it was deleted there."""
        from mlflow.exceptions import MlflowException  # type: ignore[import-not-found, unused-ignore]

        if name is None:
            return None
        try:
            if self._client.get_run(name).info.lifecycle_stage != "active":
                return None
        except MlflowException as error:
            if error.error_code != GONE:
                raise
            return None
        self._client.update_run(name, status="RUNNING")
        return name

    def _new_run(self, folder: Path, experiment: str, described: Mapping[str, Any]) -> str:
        from mlflow.entities import Param  # type: ignore[import-not-found, unused-ignore]

        found = self._client.get_experiment_by_name(experiment)
        where = self._client.create_experiment(experiment) if found is None else found.experiment_id
        name: str = self._client.create_run(where, run_name=folder.name).info.run_id
        params = [Param(key, str(value)[:MOST_METRICS]) for key, value in _flat(described)]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(name, params=params[start : start + MOST_PARAMS])
        return name

    def write(self, row: Row) -> None:
        """Log a row."""
        from mlflow.entities import Metric

        step, now_ms = int(number(row["step"])), int(1000 * time.time())
        found = [Metric(name_of(key), value, now_ms, step) for key, value in scalars_of(row).items()]
        for start in range(0, len(found), MOST_METRICS):
            self._client.log_batch(self._id, metrics=found[start : start + MOST_METRICS])

    def flush(self) -> None:
        """Nothing: each row was a request."""

    def close(self) -> None:
        """Say that the run has ended, or pauses."""
        self._client.set_terminated(self._id)


def name_of(key: str) -> str:
    """The name that MLflow takes for a metric."""
    return _NOT_IN_NAMES.sub("_", key)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name_of(name), value)]
    return found
