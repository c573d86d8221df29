"""Runs that others published, as configurations to plan, with what they measured (`tests/golden/published`).

A file is of one source or model:

    source: what the file is taken from, and when
    overrides: [...]      of every row
    rows:
      - name: ...
        source: where it is said, below the file's
        role: calibration | test | pair
        overrides: [...]
        assumptions: {expert_imbalance: 1.1, code: {compute: fp8}}
        measured: {tokens_per_s_per_gpu: 6288}
        notes: what the source leaves open, and what is assumed instead
    pairs:
      - {name: ..., source: ..., without: NAME, with: NAME, percent: 7.7}

A `calibration` row is what the one constant of its device is fitted to, a `test` row what that is tried on; a
row for a `pair` alone is not measured by itself, or its layout cannot be planned.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.plan.assumptions import Assumptions, OtherCode
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "published"


class Role(Enum):
    """What a row is for."""

    calibration = "calibration"
    """The one that its device's constant is fitted to."""
    test = "test"
    """Planned with that constant, and compared."""
    pair = "pair"
    """Only compared with another row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a run was measured to be; None where that is not said."""

    tokens_per_s_per_gpu: float | None = None
    """Tokens that each GPU trains in a second."""
    tflops: float | None = None
    """Model FLOPs of a GPU in a second, in units of 1e12, as the source counts them."""
    allocated_gb: float | None = None
    """Peak that torch's allocator gave out on the fullest GPU, in units of 1e9 bytes."""
    allocated_below_gb: float | None = None
    """What that peak was said to be below."""
    reserved_gb: float | None = None
    """Peak that torch's allocator held."""
    device_gb: float | None = None
    """Memory of the device in use, whoever's."""
    fits: bool = True
    """Whether there was memory enough to train at full speed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One run."""

    name: str
    """Of this row alone."""
    source: str
    """Where it is said."""
    role: Role
    """What it is for."""
    overrides: tuple[str, ...]
    """Its configuration."""
    assumptions: Assumptions
    """What its code does that no configuration of ours says."""
    measured: Measured
    """What came out."""
    notes: str
    """What the source leaves open."""

    def config(self) -> Config:
        """The configuration, checked."""
        return compose(self.overrides)

    def plan(self) -> PipelinePlan:
        """Its plan."""
        return plan_pipeline(self.config(), assumptions=self.assumptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two runs that differ in one thing."""

    name: str
    """What they differ in."""
    source: str
    """Where the difference is said."""
    without: Row
    """The run that has it not."""
    changed: Row
    """The run that has it."""
    percent: float
    """By how much throughput changed."""
    flat_percent: float | None
    """Changes of up to so much have no sign, as where the container of a run alone is worth as much; None
    where the sign was published."""

    def is_right(self, percent: float) -> bool:
        """Whether a planned change agrees with the published one: in sign, or in being none."""
        if self.flat_percent is not None:
            return abs(percent) <= self.flat_percent
        return percent * self.percent > 0


@dataclass(frozen=True, slots=True)
class Published:
    """All rows and pairs."""

    rows: tuple[Row, ...]
    """In the order of files."""
    pairs: tuple[Pair, ...]
    """The same."""

    def of(self, role: Role) -> list[Row]:
        """The rows of one role."""
        return [row for row in self.rows if row.role is role]


def read_published(folder: Path = FOLDER) -> Published:
    """Everything that is in a folder. Raises ValueError with file, place and what is wrong there."""
    rows: dict[str, Row] = {}
    pairs: list[Pair] = []
    for path in sorted(folder.glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        _check_keys(content, {"source", "overrides", "rows", "pairs"}, {"source", "rows"}, str(path))
        for values in content["rows"]:
            row = _row(values, content, path)
            if row.name in rows:
                raise ValueError(f"{path}: {row.name}: there is another row of this name")
            rows[row.name] = row
        pairs += [_pair(values, rows, path) for values in content.get("pairs", [])]
    if not rows:
        raise ValueError(f"{folder}: has no rows")
    return Published(tuple(rows.values()), tuple(pairs))


def _row(values: Mapping[str, Any], content: Mapping[str, Any], path: Path) -> Row:
    where = f"{path}: {values.get('name', 'a row without a name')}"
    required = {"name", "source", "role", "overrides"}
    _check_keys(values, required | {"assumptions", "measured", "notes"}, required, where)
    role = _enum(Role, values["role"], f"{where}: role")
    measured = _built(Measured, values.get("measured", {}), f"{where}: measured")
    if role is not Role.pair and measured.tokens_per_s_per_gpu is None:
        raise ValueError(f"{where}: a {role.value} row needs measured.tokens_per_s_per_gpu")
    return Row(
        name=values["name"],
        source=f"{content['source']}: {values['source']}",
        role=role,
        overrides=(*content.get("overrides", ()), *values["overrides"]),
        assumptions=_assumptions(values.get("assumptions", {}), f"{where}: assumptions"),
        measured=measured,
        notes=" ".join(values.get("notes", "").split()),
    )


def _assumptions(values: Mapping[str, Any], where: str) -> Assumptions:
    # No published run limits the channels of its communicators.
    code = _built(OtherCode, {"limits_channels": False, **values.get("code", {})}, f"{where}.code")
    return _built(Assumptions, {**values, "code": code, "vision_share": 0.0}, where)


def _pair(values: Mapping[str, Any], rows: Mapping[str, Row], path: Path) -> Pair:
    where = f"{path}: {values.get('name', 'a pair without a name')}"
    keys = {"name", "source", "without", "with", "percent"}
    _check_keys(values, keys | {"flat_percent"}, keys, where)
    for end in ("without", "with"):
        if values[end] not in rows:
            raise ValueError(f"{where}: {end}: {values[end]}: is not a row of this file or one before it")
    return Pair(
        name=values["name"],
        source=values["source"],
        without=rows[values["without"]],
        changed=rows[values["with"]],
        percent=float(values["percent"]),
        flat_percent=values.get("flat_percent"),
    )


def _built[T](kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """A dataclass of values, whose names and types are checked."""
    types = get_type_hints(kind)
    _check_keys(values, {field.name for field in fields(kind)}, set(), where)  # type: ignore[arg-type]
    made = {}
    for name, value in values.items():
        wanted = types[name]
        if isinstance(wanted, type) and issubclass(wanted, Enum):
            value = _enum(wanted, value, f"{where}.{name}")
        elif wanted in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        elif not isinstance(value, wanted):
            raise ValueError(f"{where}.{name}={value!r}: must be a {wanted}")
        made[name] = value
    return kind(**made)


def _enum[E: Enum](kind: type[E], value: object, where: str) -> E:
    names = [member.name for member in kind]
    if value not in names:
        raise ValueError(f"{where}={value!r}: must be one of {', '.join(names)}")
    return kind[str(value)]


def _check_keys(values: Mapping[str, Any], known: set[str], required: Iterable[str], where: str) -> None:
    if unknown := set(values) - known:
        raise ValueError(f"{where}: unknown keys {', '.join(sorted(map(str, unknown)))}")
    if missing := set(required) - set(values):
        raise ValueError(f"{where}: lacks {', '.join(sorted(missing))}")
