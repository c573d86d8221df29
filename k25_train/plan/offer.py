"""What `conf/` and the checks of training offer to a search; `k25_train/compose/offer.py` fills it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from k25_train.config.activation import ActivationConfig
from k25_train.config.rates import RatesConfig
from k25_train.config.schema import Config
from k25_train.plan.memory.stage_memory import StageMemory
from k25_train.plan.pipeline import PipelinePlan
from parallel.config import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Choices and rules. Everything in it can be sent to another process."""

    activations: Mapping[str, ActivationConfig]
    """Choice of `conf/activation` -> its policies and budgets."""
    devices: Mapping[str, RatesConfig]
    """Choice of `conf/device` -> its rates."""
    find_problems: Callable[[Config], list[Problem]]
    """Rules of training that a configuration breaks, but for those that plan a whole step."""
    find_plan_problems: Callable[[Config], list[Problem]]
    """Those that do: whether host memory holds what is offloaded to it."""
    problems_of_plan: Callable[[PipelinePlan, Sequence[StageMemory]], list[Problem]]
    """The same of what is planned as it is configured, with the memory of its stages."""
