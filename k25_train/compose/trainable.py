"""Which configurations can be trained: plans know models that nothing here builds."""

from collections.abc import Sequence

from k25_train.compose.resolve import compose, describe
from k25_train.config.model import ModelConfig
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from parallel.config import Problem


def compose_trainable(overrides: Sequence[str]) -> Config:
    """`compose` for a command that builds the model. Raises `ConfigError` as it does, and for one that it
    cannot build."""
    config = compose(overrides)
    check_trainable(config)
    return config


def check_trainable(config: Config) -> None:
    """Raise `ConfigError` with everything of the model that is for plans alone."""
    if problems := planned_alone(config.model):
        raise ConfigError(describe([problem.under("model") for problem in problems]))


def planned_alone(model: ModelConfig) -> list[Problem]:
    """What a model has that can be planned (`k25_train/plan`) but not built."""
    found = []
    if not model.has_latent_attention:
        rule = "must be given: grouped-query attention can be planned (k25-plan), but not built"
        remedy = "choose a model with latent attention, e.g. model=moonlight_16b"
        found.append(Problem("kv_lora_rank", "null", rule, remedy))
    if not model.num_shared_experts:
        rule = "must be positive: layers without shared experts can be planned (k25-plan), but not built"
        found.append(Problem("num_shared_experts", model.num_shared_experts, rule, "use 1 or more"))
    if not model.has_vision:
        rule = "must be positive: a model without vision can be planned (k25-plan), but not built"
        remedy = (
            "give it a tower, e.g. 27 blocks as in model=moonlight_16b; with tower and projector "
            "frozen (optim=adamw_text) and data without images, text alone is trained"
        )
        found.append(Problem("vision.num_layers", model.vision.num_layers, rule, remedy))
    return found
