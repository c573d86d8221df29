"""Losses on held-out sequences: the forward half of a step.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from functools import partial

import torch

from k25_train.objectives.base import NamedSums, Objective
from k25_train.training.activations import KeepEverything
from k25_train.training.forward import forward_micro_batch, sum_over_all_ranks
from k25_train.training.inputs import Inputs
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


def eval_sums(run: Run, num_sequences: int, shuffle_media_seed: int | None = None) -> NamedSums:
    """The objective's sums over the first `num_sequences` held-out sequences, the same on every rank.

    `shuffle_media_seed` gives every sample the images of another one.
    """
    with run.tracker.phase("read data"):
        inputs = run.reader.evaluation(num_sequences, shuffle_media_seed)
    return forward_sums(run, inputs, run.objective)


@torch.no_grad()
def forward_sums(run: Run, inputs: Inputs, objective: Objective) -> NamedSums:
    """An objective's sums over inputs, the same on every rank; images are encoded ahead of the pass."""
    # 1. With overlapped gathers, parameters are stale after an update until they are requested.
    complete_parameters(run.modules)
    for module in run.modules:
        module.eval()
    # 2. The tower, over all ranks, then the pipeline, whose inputs are divided over replicas; forward only.
    tower = run.tower.evaluating
    tower.start(inputs.vision)
    reported = run_schedule(
        partial(forward_micro_batch, objective=objective, leaf=tower.leaf, activations=KeepEverything()),
        run.chunks,
        inputs.micro_batches,
        run.topology,
        tokens_per_micro_batch=run.tokens_per_micro_batch,
        forward_only=True,
    )
    tower.release()
    for module in run.modules:
        module.train()
    return sum_over_all_ranks(reported, objective, run.topology)
