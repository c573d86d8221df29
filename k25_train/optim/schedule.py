"""The warm-up, stable, decay (WSD) learning-rate schedule of K2 (report, section 2.5). Pure."""

import math

from k25_train.config.optimizer import OptimConfig


def learning_rate(optim: OptimConfig, step: int, num_steps: int) -> float:
    """Learning rate of update `step`, counted from 1 to `num_steps`.

    Rises linearly to `lr` over `warmup_steps`, stays there, and falls along half a cosine to `min_lr` over
    the last `decay_steps`.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    into_decay = step - (num_steps - optim.decay_steps)
    if into_decay <= 0:
        return optim.lr
    progress = into_decay / optim.decay_steps
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
