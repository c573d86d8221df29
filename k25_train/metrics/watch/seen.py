"""What a run's rows amount to now: the latest figures, which the view and JSON show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from statistics import median
from typing import Any

import yaml

from k25_train.errors import MachineError
from k25_train.metrics.pace import PLANNED
from k25_train.metrics.watch.files import File
from k25_train.run_folder.alarm_rows import Alarm, alarms_of
from k25_train.run_folder.rows_file import Row, Value, is_number

FORMAT_VERSION = 1
"""Of the JSON. It changes when a field goes or changes its meaning; new fields may come at any time."""
RECENT_STEPS = 20
"""Latest steps whose median is the pace."""
MOST_ALARMS = 5
MAX_CONFIG_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a run's `config.yaml` says of it; all None where it has none."""

    model: str | None = None
    steps: int | None = None
    """`train.steps`."""
    init_from: str | None = None
    """`checkpoint.init_from`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A run as its rows tell; a figure that no row has is None, or not in its mapping."""

    run: str
    model: str | None
    step: int | None
    """Last step with a row."""
    steps: int | None
    losses: list[float]
    """Training loss of each step, in nats per token, in order."""
    held_out: dict[str, list[float]]
    """Name -> held-out loss of each evaluation."""
    source_losses: dict[str, float]
    """Source -> latest training loss."""
    grad_norms: dict[str, float]
    """Part, or `all` -> gradient norm of the last step."""
    weight_norms: dict[str, float]
    """Part -> norm when it was last taken."""
    latest: dict[str, float]
    """Every other number of the last row that has it."""
    step_s: float | None
    """Seconds per step, median of the latest 20."""
    planned_step_s: float | None
    tokens_per_s: float | None
    """Median of the latest 20 steps."""
    alarms: list[Alarm]
    """The latest, newest last."""
    num_rows: int
    num_damaged: int
    """Lines of the file that are no rows."""

    @property
    def is_done(self) -> bool:
        """Whether the last step has its row."""
        return self.step is not None and self.steps is not None and self.step >= self.steps

    def as_json(self) -> dict[str, Any]:
        """Plain values; of each step's losses the latest alone."""
        plain = asdict(self) | {"format_version": FORMAT_VERSION}
        plain["loss"] = plain.pop("losses")[-1:][0] if self.losses else None
        plain["held_out"] = {name: losses[-1] for name, losses in self.held_out.items()}
        plain["alarms"] = [
            {**asdict(each), "kind": each.kind.value, "text": each.text} for each in self.alarms
        ]
        return plain


def seen(run: str, rows: Sequence[Row], settings: Settings, num_damaged: int = 0) -> Seen:
    """What the rows of a run, in order, amount to."""
    steps = [row for row in rows if "loss" in row]
    recent, last = steps[-RECENT_STEPS:], steps[-1] if steps else {}
    grad_norms = _under("grad_norm/", last) or ({"all": norm} if (norm := _of(last, "grad_norm")) else {})
    return Seen(
        run=run,
        model=settings.model,
        step=max((int(step) for row in rows[-1:] if is_number(step := row["step"])), default=None),
        steps=settings.steps,
        losses=list(_all("loss", steps)),
        held_out={name: list(_all(f"eval_{name}", rows)) for name in _held_out_names(rows)},
        source_losses=_latest("loss/", steps, RECENT_STEPS),
        grad_norms=grad_norms,
        weight_norms=_latest("weight_norm/", steps, len(steps)),
        latest=_newest(steps),
        step_s=_median(_all("step_time_s", recent)),
        planned_step_s=_of(last, PLANNED),
        tokens_per_s=_median(_all("tokens_per_s", recent)),
        alarms=_newest_alarms(steps),
        num_rows=len(rows),
        num_damaged=num_damaged,
    )


def _of(row: Row, key: str) -> float | None:
    value = row.get(key)
    return value if is_number(value) else None


def _all(key: str, rows: Iterable[Row]) -> Iterator[float]:
    return (value for row in rows if (value := _of(row, key)) is not None)


def _under(prefix: str, row: Row) -> dict[str, float]:
    """Numbers of a row whose keys begin so, without that."""
    found: Mapping[str, Value | Sequence[Value]] = row
    return {
        key.removeprefix(prefix): value
        for key, value in found.items()
        if key.startswith(prefix) and is_number(value)
    }


def _latest(prefix: str, rows: Sequence[Row], num_rows: int) -> dict[str, float]:
    """The newest of each such number in the latest rows: not each step has one of every source."""
    found: dict[str, float] = {}
    for row in rows[-num_rows:]:
        found |= _under(prefix, row)
    return dict(sorted(found.items()))


def _newest(rows: Sequence[Row]) -> dict[str, float]:
    """The newest of each number without a `/`; figures of sampled steps are not in every row."""
    found: dict[str, float] = {}
    for row in rows[-RECENT_STEPS:]:
        found |= {key: value for key, value in row.items() if _is_alone(key) and is_number(value)}
    return found


def _is_alone(key: str) -> bool:
    """Whether a figure is shown as it is: members of families are not, but for what is known of a policy."""
    return "/" not in key or key.startswith("policy/")


def _held_out_names(rows: Iterable[Row]) -> list[str]:
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("eval_"))
    return [key.removeprefix("eval_") for key in keys]


def _newest_alarms(rows: Sequence[Row]) -> list[Alarm]:
    newest = (alarm for row in reversed(rows) for alarm in reversed(list(alarms_of(row))))
    return list(islice(newest, MOST_ALARMS))[::-1]


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return median(found) if found else None


def settings_of(file: File) -> Settings:
    """What a `config.yaml` says; nothing where there is none, or it is damaged, as while it is written."""
    try:
        size = file.num_bytes()
        values = yaml.safe_load(file.read(0, min(size, MAX_CONFIG_BYTES))) if size else None
    except (MachineError, yaml.YAMLError, ValueError, RecursionError):
        return Settings()
    return Settings(
        model=_setting(values, "model.name", lambda value: isinstance(value, str)),
        steps=_setting(values, "train.steps", lambda value: isinstance(value, int)),
        init_from=_setting(values, "checkpoint.init_from", lambda value: isinstance(value, str)),
    )


def _setting(values: Any, key: str, fits: Callable[[Any], bool]) -> Any:
    for name in key.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values if fits(values) else None
