"""What a run tells of itself while it trains: where its metrics go, and what raises an alarm."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from parallel.config import Problem, not_positive


@dataclass(slots=True, kw_only=True)
class AlarmConfig:
    """When a step is told as an alarm; it is compared with the run's own latest steps
    (`k25_train/metrics/alarms.py`). Alarms end nothing."""

    loss_spike: float | None
    """How far above the median of the latest steps a loss, in robust standard deviations of these, raises an
    alarm; null for none. Source: our choice."""
    grad_spike: float | None
    """How many times the median of the latest steps the gradient norm of a part of the model raises an alarm;
    null for none. Source: our choice."""
    expert_load: float | None
    """How many times the mean of its layer an expert's tokens raise an alarm, which experts without any token
    raise too; null for none. Source: our choice."""
    throughput: float | None
    """How many times the median of the latest steps' seconds per token a step's raise an alarm; null for
    none. Source: our choice."""
    checkpoint: bool
    """Whether the state after a step that raised an alarm is saved, unless a save is in progress. It counts
    among those that `checkpoint.keep` keeps."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = []
        for key in ("grad_spike", "expert_load", "throughput"):
            value = getattr(self, key)
            if value is not None and not value > 1:
                rule = "is a multiple of what is usual and must be greater than 1"
                found.append(Problem(key, value, rule, "use 2.0 or more, or null for no alarm"))
        if self.loss_spike is not None and not self.loss_spike > 0:
            rule = "must be positive"
            found.append(Problem("loss_spike", self.loss_spike, rule, "use 8.0, or null for no alarm"))
        return found


@dataclass(slots=True, kw_only=True)
class WandbConfig:
    """Where Weights & Biases keeps a run; only `project` has to be given. Its key is its own affair:
    WANDB_API_KEY, or `wandb login`."""

    project: str
    """Project of the run."""
    entity: str | None = None
    """User or team that the project is of; null for whom the key is of."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        return _not_empty("project", self.project, "e.g. metrics.wandb.project=k25")


@dataclass(slots=True, kw_only=True)
class MlflowConfig:
    """Where MLflow keeps a run. Who may write there is told by MLFLOW_TRACKING_TOKEN, or by
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    uri: str
    """Tracking server, as http://HOST:5000, or a database, as sqlite:////shared/mlflow.db."""
    experiment: str
    """Experiment of the run; made if it is not there."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = _not_empty("uri", self.uri, "e.g. metrics.mlflow.uri=http://mlflow:5000")
        found += _not_empty("experiment", self.experiment, "e.g. metrics.mlflow.experiment=k25")
        if has_secret(self.uri):
            rule = "holds a name or a password, which the run's files would show"
            remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            found.append(Problem("uri", "…", rule, remedy))
        return found


@dataclass(slots=True, kw_only=True)
class MetricsConfig:
    """What is told of steps, in addition to `metrics.jsonl` and TensorBoard."""

    weight_norm_interval: int
    """Steps between norms of the weights, by part of the model. Source: our choice."""
    wandb: WandbConfig | None
    """Weights & Biases as another place of the metrics; null for none."""
    mlflow: MlflowConfig | None
    """MLflow as another place of the metrics; null for none."""
    alarms: AlarmConfig
    """What raises an alarm."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_positive(self, ("weight_norm_interval",))
        for name in ("wandb", "mlflow", "alarms"):
            section = getattr(self, name)
            if section is not None:
                found += [each._replace(key=f"{name}.{each.key}") for each in section.problems()]
        return found


def has_secret(uri: str) -> bool:
    """Whether a URI names a user or a password."""
    try:
        return "@" in urlsplit(uri).netloc
    except ValueError:
        return "@" in uri


def _not_empty(key: str, value: str, remedy: str) -> list[Problem]:
    return [] if value.strip() else [Problem(key, value, "must not be empty", remedy)]
