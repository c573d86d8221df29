"""Chains of stages as `conf/chain/NAME.yaml` has them: ordered experiments, and what each starts from.

    dir: runs/stages                     folder of the chain; a stage's run folder is DIR/STAGE
    needles: {...}                       where needles are searched for; may be left out
    stages:
      joint:
        experiment: smoke_joint
        start: base                     a stage before, whose last checkpoint it starts from, or a path or URL
        parts: {vision_tower: vit}       the same for parts of the model
        fresh: [mm_projector.*]          checkpoint.init_fresh
        leave_out: []                    checkpoint.init_leave_out
        overrides: {train.steps: 100}    what is not as in the experiment

A path has a `/`; a place that the user fills in begins with `<`. Needs no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from k25_train.compose.conf_files import CHAINS, CONF_DIR
from k25_train.compose.resolve import describe
from k25_train.compose.values import NULL, unquoted
from k25_train.compose.yaml_files import read_file
from k25_train.config.basics import FILL_IN
from k25_train.config.checkpoint import INIT_PARTS
from k25_train.errors import ConfigError
from parallel.config import Problem

_STAGE_KEYS = ("experiment", "start", "parts", "fresh", "leave_out", "overrides")
_NEEDLE_KEYS = ("data", "after", "lengths", "overrides")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One run of a chain."""

    name: str
    """In the chain, and of its run folder."""
    experiment: str
    """Choice of `conf/experiment`."""
    start: str | None = None
    """Stage, path or URL whose weights it starts from; None for random ones."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Part of the model -> stage, path or URL that it starts from instead."""
    fresh: tuple[str, ...] = ()
    """Patterns of tensors that start from random weights."""
    leave_out: tuple[str, ...] = ()
    """Patterns of tensors of the sources that the model has no place for."""
    overrides: tuple[str, ...] = ()
    """Settings over those of the experiment."""

    @property
    def sources(self) -> dict[str, str]:
        """Part of the model -> stage, path or URL that it starts from; parts at random have none."""
        chosen = {part: self.parts.get(part, self.start) for part in INIT_PARTS}
        return {part: source for part, source in chosen.items() if source is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Needles:
    """Where needles are searched for (`needle.py`)."""

    data: str
    """Folder of the sets of needles, one for each length (`k25-data needles`)."""
    after: tuple[str, ...]
    """Stages whose last checkpoints are searched; first before the long stages, last behind them."""
    lengths: tuple[int, ...]
    """Tokens of the documents."""
    overrides: tuple[str, ...] = ()
    """Settings of the searches, e.g. the layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Stages in the order in which they run."""

    name: str
    """Of its file."""
    dir: str
    """Folder of the run folders."""
    stages: tuple[Stage, ...]
    """In order; each starts from earlier ones alone."""
    needles: Needles | None = None
    """None where nothing is searched for."""

    def stage(self, name: str) -> Stage:
        """The stage of a name. Raises KeyError."""
        return {stage.name: stage for stage in self.stages}[name]

    def run_dir(self, stage: Stage) -> str:
        """The run folder of a stage."""
        return f"{self.dir.rstrip('/')}/{stage.name}"


def is_place(source: str) -> bool:
    """Whether weights come from outside of the chain: a path or URL, or a place to be filled in."""
    return "/" in source or source.startswith(FILL_IN)


def chain_names() -> list[str]:
    """Names of the chains of `conf/`."""
    return sorted(path.stem for path in (CONF_DIR / CHAINS).glob("*.yaml"))


def load_chain(name: str, settings: Sequence[str] = ()) -> Chain:
    """A chain of `conf/`, or of a YAML file of the user's, with settings `STAGE.KEY=VALUE` and `dir=FOLDER`.

    Raises ConfigError listing unknown names, missing keys, stages that start from later ones or from stages
    that there are not, and settings of no stage.
    """
    path = Path(name) if name.endswith(".yaml") else CONF_DIR / CHAINS / f"{name}.yaml"
    if not name.endswith(".yaml") and name not in chain_names():
        problem = Problem(
            "chain", name, "is not a chain", f"use one of {', '.join(chain_names())}, or a FILE.yaml"
        )
        raise ConfigError(describe([problem]))
    problems: list[Problem] = []
    values = unquoted(read_file(path, "a chain of stages, as in conf/chain"))
    problems += _unknown(values, ("dir", "needles", "stages"), "")
    given = values.get("stages")
    stages = [
        _stage(key, value, problems) for key, value in (given.items() if isinstance(given, dict) else ())
    ]
    if not stages:
        problems.append(
            Problem("stages", None, "must name at least one", "write stages: {NAME: {experiment: …}}")
        )
    chain = Chain(
        name=path.stem,
        dir=str(values.get("dir") or f"runs/{path.stem}"),
        stages=tuple(stages),
        needles=_needles(values.get("needles"), problems),
    )
    chain = _with_settings(chain, settings, problems)
    problems += _reference_problems(chain)
    if problems:
        raise ConfigError(describe(problems, str(path)))
    return chain


def _stage(name: str, values: Any, problems: list[Problem]) -> Stage:
    key = f"stages.{name}"
    if not isinstance(values, dict):
        problems.append(Problem(key, values, "must be a mapping", "write {experiment: NAME, start: STAGE}"))
        values = {"experiment": "?"}
    problems += _unknown(values, _STAGE_KEYS, f"{key}.")
    if not values.get("experiment"):
        problems.append(Problem(f"{key}.experiment", None, "must be given", "name one of conf/experiment"))
    overrides = values.get("overrides") or {}
    return Stage(
        name=name,
        experiment=str(values.get("experiment")),
        start=None if values.get("start") == NULL else values.get("start"),
        parts=dict(values.get("parts") or {}),
        fresh=tuple(values.get("fresh") or ()),
        leave_out=tuple(values.get("leave_out") or ()),
        overrides=tuple(f"{setting}={value}" for setting, value in overrides.items()),
    )


def _needles(values: Any, problems: list[Problem]) -> Needles | None:
    if values is None:
        return None
    if not isinstance(values, dict) or not {"data", "after", "lengths"} <= set(values):
        remedy = "write needles: {data: FOLDER, after: [STAGE, STAGE], lengths: [1024]}"
        problems.append(Problem("needles", values, "must have data, after and lengths", remedy))
        return None
    problems += _unknown(values, _NEEDLE_KEYS, "needles.")
    wrong = [each for each in values["lengths"] if not str(each).isdecimal()]
    problems += [Problem("needles.lengths", each, "must be a number of tokens", "use 1024") for each in wrong]
    return Needles(
        data=values["data"],
        after=tuple(values["after"]),
        lengths=tuple(int(each) for each in values["lengths"] if each not in wrong),
        overrides=tuple(f"{key}={value}" for key, value in (values.get("overrides") or {}).items()),
    )


def _unknown(values: Mapping[str, Any], known: Sequence[str], prefix: str) -> list[Problem]:
    return [
        Problem(f"{prefix}{key}", None, "is not a key", f"use one of {', '.join(known)}")
        for key in values
        if key not in known
    ]


def _with_settings(chain: Chain, settings: Sequence[str], problems: list[Problem]) -> Chain:
    """The chain with what the command line says, which comes after what its file says."""
    more: dict[str, list[str]] = {stage.name: [] for stage in chain.stages}
    for setting in settings:
        key, equals, value = setting.partition("=")
        stage, dot, rest = key.partition(".")
        if key == "dir" and value:
            chain = replace(chain, dir=value)
        elif equals and dot and stage in more:
            more[stage].append(f"{rest}={value}")
        else:
            remedy = f"write STAGE.KEY=VALUE with one of {', '.join(more)}, or dir=FOLDER"
            problems.append(Problem(setting, None, "is no setting of a stage", remedy))
    stages = (replace(each, overrides=(*each.overrides, *more[each.name])) for each in chain.stages)
    return replace(chain, stages=tuple(stages))


def _reference_problems(chain: Chain) -> list[Problem]:
    """Stages that start from what does not come before them."""
    found: list[Problem] = []
    names = [stage.name for stage in chain.stages]
    for number, stage in enumerate(chain.stages):
        earlier, remedy = names[:number], "name an earlier stage, or a path with a /"
        given = {"start": stage.start, **{f"parts.{part}": source for part, source in stage.parts.items()}}
        for key, source in given.items():
            where = f"stages.{stage.name}.{key}"
            if source is None or is_place(source) or source in earlier:
                continue
            rule = f"is none of the stages before it: {', '.join(earlier) or 'there are none'}"
            if source in names:
                rule = (
                    "is the stage itself"
                    if source == stage.name
                    else "comes later, so that neither can be first"
                )
            found.append(Problem(where, source, rule, remedy))
        found += [
            Problem(f"stages.{stage.name}.parts.{part}", None, "is no part", f"use {', '.join(INIT_PARTS)}")
            for part in stage.parts
            if part not in INIT_PARTS
        ]
    for name in chain.needles.after if chain.needles else ():
        if name not in names:
            found.append(Problem("needles.after", name, "is not a stage", f"use some of {', '.join(names)}"))
    return found
