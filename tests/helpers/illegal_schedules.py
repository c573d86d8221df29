"""Ways to break one rule of what is trained, and of how that changes over the run."""

from collections.abc import Callable, Sequence
from typing import Any

from tests.helpers.legal_config import Broken, Legal, Values

Break = Callable[[Legal], Broken]


def broken(key: str, wrong: Sequence[Any], rule: str, **more: object) -> Break:
    """A wrong value; `more` are other changes, `section__key`."""
    changes = {name.replace("__", "."): to for name, to in more.items()}
    return lambda legal: (changes | {key: legal.pick(wrong)}, key, rule)


def ramp(key: str, rule: str, start: int, increment: int, size: int, length: int | str = 5) -> Break:
    """A ramp in units of a micro-batch on every replica, where a pipeline has enough of them."""

    def changes(legal: Legal) -> Broken:
        ramp = "train.batch_ramp"
        sizes: Values = {
            f"{ramp}.start": start,
            f"{ramp}.increment": increment,
            "train.global_batch_size": size,
        }
        unit = legal.unit * 20
        return {name: number * unit for name, number in sizes.items()} | {f"{ramp}.length": length}, key, rule

    return changes


SPANS = ("optim.warmup", "optim.decay", "optim.frozen_expert_bias", "train.batch_ramp.length")
NOTHING: Values = {"optim__vision_tower__trained": False, "optim__mm_projector__trained": False}
SCHEDULE_BREAKS: dict[str, Break] = {
    **{f"span {key}": broken(key, [-1, "1X", "0.5"], "must be a number of steps, or one") for key in SPANS},
    "biases frozen for longer": broken("optim.frozen_expert_bias", [10**6, "9T"], "longer than the run"),
    "tokens": broken("train.tokens", ["many", "0K", "12"], "must be a positive number of tokens"),
    "less than a step": broken("train.tokens", ["0.001K"], "must be at least the tokens of a step"),
    "steps and tokens": lambda _legal: (
        {"train.tokens": "9T"}, "train.steps", "which train.tokens=9T comes to"
    ),
    "ramp above": ramp("train.batch_ramp.start", "must be below train.global_batch_size", 4, 1, 4),
    "ramp in uneven parts": ramp("train.batch_ramp.increment", "must divide what the batch", 1, 2, 4),
    "ramp for longer than the run": ramp("train.batch_ramp.length", "must end within the run", 1, 1, 4, "9T"),
    "nothing trained": broken("optim.language_model.trained", [False], "leaves nothing to train", **NOTHING),
    "tower behind a frozen projector": broken(
        "optim.vision_tower.trained", [True], "is not possible behind a projector",
        optim__mm_projector__trained=False,
    ),
    "state of no checkpoint": broken("checkpoint.init_optimizer", [True], "takes the optimizer state of"),
}  # fmt: skip
