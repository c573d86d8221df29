"""Activation policies that tests and benches train with, as overrides."""

from k25_train.compose.resolve import compose
from k25_train.config.activation import CAN_RECOMPUTE, CAN_ROUND

NAMES = tuple(compose(["experiment=smoke"]).activation.policies())
"""Of all activations."""


def all_as(policy: str, names: frozenset[str] = frozenset(NAMES)) -> tuple[str, ...]:
    """The same policy for all these names, and `keep` for the others."""
    return tuple(f"activation.{name}={policy}" for name in NAMES if name in names)


RECOMPUTE = all_as("recompute", CAN_RECOMPUTE)
OFFLOAD = all_as("offload")
FP8 = all_as("fp8", CAN_ROUND)
EXACT_K2 = (
    "activation=k2",
    *all_as("offload", frozenset(name for name in NAMES if name.endswith(("moe.up_input", ".swiglu_input")))),
)
"""The report's recipe without rounding."""
