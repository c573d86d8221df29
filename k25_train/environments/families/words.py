"""Words of which generated tasks make names and texts."""

import random

NAMES = (
    "amber", "basil", "cedar", "delta", "ember", "fjord", "grove", "harbor", "indigo", "jasper",
    "kelp", "lemon", "maple", "nectar", "olive", "pepper", "quartz", "river", "saffron", "timber",
    "umber", "violet", "willow", "xenon", "yarrow", "zephyr",
)  # fmt: skip
"""Distinct, in lower case."""


def text_of(rng: random.Random, num_lines: int) -> str:
    """Lines of one to five words, with a line end behind each."""
    lines = [" ".join(rng.choices(NAMES, k=rng.randint(1, 5))) for _ in range(num_lines)]
    return "".join(f"{line}\n" for line in lines)
