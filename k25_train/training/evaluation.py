"""Losses on held-out sequences: the forward half of a step.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from functools import partial

import torch

from k25_train.objectives.base import NamedSums
from k25_train.training.activations import KeepEverything
from k25_train.training.forward import forward_micro_batch, sum_over_all_ranks
from k25_train.training.run import Run
from parallel.megatron.replicas import complete_parameters
from parallel.megatron.schedule import run_schedule


def eval_losses(run: Run, num_sequences: int, shuffle_media_seed: int | None = None) -> dict[str, float]:
    """The objective's figures on held-out sequences, named `eval_…`; see `eval_sums`.

    For next-token prediction these are `eval_text_loss` and `eval_caption_loss` in nats per token; a kind
    that the blend lacks has none.
    """
    sums = eval_sums(run, num_sequences, shuffle_media_seed)
    return {f"eval_{name}": value for name, value in run.objective.figures(sums).items()}


@torch.no_grad()
def eval_sums(run: Run, num_sequences: int, shuffle_media_seed: int | None = None) -> NamedSums:
    """The objective's sums over the first `num_sequences` held-out sequences, the same on every rank.

    `shuffle_media_seed` gives every sample the images of another one.
    """
    # 1. With overlapped gathers, parameters are stale after an update until they are requested.
    complete_parameters(run.modules)
    for module in run.modules:
        module.eval()
    # 2. Held-out sequences, divided over replicas; images over all ranks.
    with run.tracker.phase("read data"):
        inputs = run.reader.evaluation(num_sequences, shuffle_media_seed)
    # 3. The tower, then the pipeline, forward only.
    tower = run.tower.evaluating
    tower.start(inputs.vision)
    reported = run_schedule(
        partial(forward_micro_batch, objective=run.objective, leaf=tower.leaf, activations=KeepEverything()),
        run.chunks,
        inputs.micro_batches,
        run.topology,
        tokens_per_micro_batch=run.tokens_per_micro_batch,
        forward_only=True,
    )
    tower.release()
    for module in run.modules:
        module.train()
    return sum_over_all_ranks(reported, run.objective, run.topology)
