"""Options by which a plan assumes something else than a healthy cluster and balanced experts."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from k25_train.config.schema import Config
from k25_train.plan.assumptions import Assumptions, as_configured
from parallel.config import Problem


@dataclass(frozen=True, slots=True)
class Flag:
    """One option, which sets the field of `Assumptions` that has its name."""

    field: str
    """Name of the field."""
    metavar: str
    """What its value is called in the help."""
    help: str
    """One line."""
    read: Callable[[str], float]
    """Reads its text; raises `ValueError`."""
    limits: Callable[[Config], tuple[float, float]]
    """(least, most) value that makes sense in a configuration."""
    of: str
    """What the largest value amounts to, in words."""

    @property
    def name(self) -> str:
        """As it is typed."""
        return f"--{self.field.replace('_', '-')}"


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


FLAGS = (
    Flag(
        "vision_share",
        "SHARE",
        "of all tokens, how many are images' (data.vision_ratio, or 0.1; 0 for text)",
        _number,
        lambda config: (0.0, float(config.model.has_vision)),
        "all tokens, or none without a vision tower",
    ),
    Flag(
        "expert_imbalance",
        "FACTOR",
        "load of the busiest rank's experts over their even share (1)",
        _number,
        lambda config: (1.0, float(config.parallelism.ep)),
        "all tokens on one of the parallelism.ep ranks",
    ),
    Flag(
        "slow_node",
        "FACTOR",
        "how many times longer the kernels of one node take (1)",
        _number,
        lambda _: (1.0, 1000.0),
        "beyond which it rather hangs",
    ),
    Flag(
        "document_tokens",
        "TOKENS",
        "length of a document; attention is within documents (train.seq_len)",
        int,
        lambda config: (1, config.train.seq_len),
        "train.seq_len",
    ),
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the options; their values stay texts until `assumptions_of` reads them."""
    group = parser.add_argument_group("what is assumed")
    for flag in FLAGS:
        group.add_argument(flag.name, metavar=flag.metavar, help=flag.help)


def assumptions_of(options: argparse.Namespace, config: Config) -> tuple[Assumptions, list[Problem]]:
    """What the options say, and every one that cannot be."""
    given: dict[str, float] = {}
    problems = []
    for flag in FLAGS:
        text = getattr(options, flag.field)
        if text is None:
            continue
        least, most = flag.limits(config)
        rule = (
            f"must be a {'whole ' if flag.read is int else ''}number within {least:g} and {most:g}, {flag.of}"
        )
        try:
            value = flag.read(text)
        except ValueError:
            value = math.nan
        if least <= value <= most:
            given[flag.field] = value
        else:
            problems.append(Problem(flag.name, text, rule, f"e.g. {flag.name} {_example(least, most)}"))
    # Fields have the types that the readers give.
    return replace(as_configured(config), **given), problems  # type: ignore[arg-type]


def _example(least: float, most: float) -> str:
    return f"{min(max(2 * least, 0.2), most):g}"
