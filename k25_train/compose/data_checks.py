"""Rules of the data that read more than one section, one small function each."""

from collections.abc import Callable

from k25_train.config.data import DataConfig
from k25_train.config.environment import EnvironmentConfig
from k25_train.config.optimizer import OptimConfig
from parallel.config import Problem


def zero_vision_trains_no_vision(data: DataConfig, optim: OptimConfig) -> list[Problem]:
    """What no pixel reaches gets no gradient: the tower and the projector stay as they are."""
    if not data.zero_vision:
        return []
    parts = {"vision_tower": optim.vision_tower, "mm_projector": optim.mm_projector}
    rule = "must be false with data.zero_vision, in which no pixel reaches it"
    return [
        Problem(f"optim.{name}.trained", True, rule, "use false, or data.zero_vision=false")
        for name, part in parts.items()
        if part.trained
    ]


def zero_vision_has_no_environment(data: DataConfig, environment: EnvironmentConfig | None) -> list[Problem]:
    """Trajectories may have images whatever the data have."""
    if not data.zero_vision or environment is None:
        return []
    rule = "is for fine-tuning on data; tasks of an environment may have images"
    return [Problem("data.zero_vision", True, rule, "use false, or leave the environment out")]


RULES: tuple[Callable[..., list[Problem]], ...] = (
    zero_vision_trains_no_vision,
    zero_vision_has_no_environment,
)
