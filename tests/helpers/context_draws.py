"""Layouts in which ranks share sequences, drawn with everything else that must not change what is trained."""

import random
from collections.abc import Iterator
from contextlib import suppress

from k25_train.compose.resolve import compose
from k25_train.errors import ConfigError
from tests.helpers.activation_policies import EXACT_K2, OFFLOAD, RECOMPUTE
from tests.helpers.encoder_ways import WAYS
from tests.helpers.parity import CLIPPED, DATA_OVERLAPS, EVERYTHING_OVERLAPS, Case, Parity

COUNTS = "model.balance_loss_coeff=0.1"
"""With it the balance loss counts."""
RULES = {"muonclip": (*CLIPPED, COUNTS), "adamw": ("optim=adamw", COUNTS)}
"""Changes that both runs get: the optimizer's rule."""
POLICIES = {
    "keep": (),
    "selective": ("activation=selective",),
    "k2": EXACT_K2,
    "recompute": RECOMPUTE,
    "offload": OFFLOAD,
}
"""Recipes of activations; that which rounds without rounding."""


def draw_case(number: int, max_ranks: int = 8) -> tuple[Case, str]:
    """A layout with what else must not change the result, and the optimizer's rule."""
    draw = random.Random(number).choice
    cp = draw([2, 2, 4])
    pp = draw([size for size in (1, 2, 4) if size * cp <= max_ranks])
    dp = draw([size for size in (1, 2, 4) if pp * cp * size <= max_ranks])
    ep = draw([size for size in (1, 2, 4) if dp * cp % size == 0])
    vpp = draw([1, 2] if pp > 1 else [1])
    overlaps = EVERYTHING_OVERLAPS if ep > 1 and (vpp > 1 or pp == 1) else DATA_OVERLAPS
    more = (
        f"train.micro_batch_size={draw([1, 2])}",
        f"parallelism.cp_exchange={draw(['all_gather', 'ring'])}",
        *WAYS[draw(sorted(WAYS))],
        *POLICIES[draw(sorted(POLICIES))],
        *draw([(), overlaps]),
        *draw([(), ("optim.offload=cpu",)]),
    )
    return Case({"pp": pp, "vpp": vpp, "ep": ep, "dp": dp, "cp": cp}, 8, 16, more), draw(sorted(RULES))


def legal_cases(number: int, parity: Parity) -> Iterator[tuple[Case, str]]:
    """What is drawn until the configuration refuses nothing of it; then more."""
    for attempt in range(100):
        case, rule = draw_case(100 * number + attempt)
        with suppress(ConfigError):
            compose([*parity.arguments(case), *RULES[rule]])
            yield case, rule
