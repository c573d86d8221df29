"""One training step, in the order of the K2.5 report (section 4.5.1), on one page.

With a coupled tower, vision forward and backward happen inside the backbone's schedule, in the first pipeline
stage, and phases 2 and 4 fall away.
"""

import math
import time
from dataclasses import dataclass
from functools import partial

import torch

from k25_train.errors import TrainingError
from k25_train.optim.build import set_learning_rate
from k25_train.optim.qk_clip import ClipResult
from k25_train.optim.schedule import learning_rate
from k25_train.training.forward import LossSums, count_tokens, forward_micro_batch
from k25_train.training.inputs import read_evaluation, read_step
from k25_train.training.run import Run
from parallel.activations.offload import OffloadStats
from parallel.dep.stats import VisionSummary
from parallel.megatron.replicas import complete_parameters, reduce_gradients
from parallel.megatron.schedule import run_schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did, the same on every rank."""

    loss: float
    """Mean loss per token of the global batch, in nats, before the update."""
    grad_norm: float
    """Global gradient norm before clipping."""
    learning_rate: float
    step_time_s: float
    """Wall-clock seconds on this rank."""
    not_finite: tuple[str, ...]
    """Parameters whose gradient was not finite, so that the step changed nothing; empty if it did."""
    clip: ClipResult | None
    """What QK-Clip saw and did; None if it is off."""
    vision: VisionSummary | None
    """What the decoupled encoder did; None if the tower is coupled."""
    offload: OffloadStats | None
    """How activations went to the host and back, the worst of any rank; None if none did."""


def train_step(run: Run, step: int) -> StepResult:
    """Train on the global batch of `step` (counted from 1).

    A gradient that is not finite changes nothing, on every rank alike; the result names the parameters.
    Raises `TrainingError` if the loss is not finite though the gradient is.
    """
    started = time.perf_counter()
    config, topology = run.config, run.topology

    # 1. The plan of the global batch is the same on every rank; each reads its own share.
    inputs = read_step(run, step)
    tokens = count_tokens(inputs.micro_batches, topology)
    for module in run.modules:
        module.zero_grad_buffer()
    run.optimizer.zero_grad()

    # 2. Balanced vision forward: every rank encodes an equal share of all images, whoever owns them, and the
    #    features go to the first stages. In bubbles only what the first micro-batches need.
    engine = None if run.vision is None else run.vision.engine
    if run.vision is not None and inputs.vision is not None:
        run.vision.encoder.start_gather()
        run.vision.engine.start(inputs.vision)

    # 3. Forward and backward of the pipeline: 1F1B, interleaved with virtual stages. It ends with the
    #    gradients reduced over data-parallel ranks and divided by the number of tokens with a loss.
    # The balance loss is a mean over all tokens, but is divided with the gradients by those with a loss.
    run.backbone.moe_grad_scale_func = lambda: tokens.with_loss / tokens.total
    sums = run_schedule(
        partial(forward_micro_batch, engine=engine, activations=run.activations),
        run.chunks,
        inputs.micro_batches,
        topology,
        tokens_per_micro_batch=config.train.micro_batch_size * config.train.seq_len,
        forward_only=False,
        before_pass=[part.before_pass for part in (run.activations, engine) if part is not None],
    )

    # 4. Vision recompute and backward, with the gradients that the features have got; the encoder's own are
    #    summed over all ranks once, and divided like the backbone's.
    if run.vision is not None:
        run.vision.engine.finish()
        reduce_gradients(run.vision.encoder, tokens.with_loss)
    loss = LossSums.over_all_ranks(sums, topology).loss

    # 5. One gradient norm over all parameters, clip, and the optimizer step on this rank's shard; QK-Clip, if
    #    it is on, scales masters before they are copied to the model.
    rate = learning_rate(config.optim, step, config.train.steps)
    set_learning_rate(run.optimizer, rate)
    with run.tracker.phase("optimizer"):
        if run.qk_clip is not None:
            run.qk_clip.gather()
        updated, grad_norm, _ = run.optimizer.step()
        clip = None if run.qk_clip is None else run.qk_clip.finish(updated=updated)
        if run.vision is not None:
            run.vision.encoder.start_gather()
    if updated and not math.isfinite(loss):
        raise TrainingError(
            f"step {step}: the loss is {loss}, but its gradient is finite: look at the data of this step, "
            "and start again: the run resumes from its last checkpoint"
        )
    return StepResult(
        loss=loss,
        grad_norm=float(grad_norm),
        learning_rate=rate,
        step_time_s=time.perf_counter() - started,
        clip=clip,
        vision=None if run.vision is None else run.vision.summary(topology),
        offload=None if run.activations is None else run.activations.finish_step(),
        not_finite=tuple(run.optimizer.not_finite),
    )


@torch.no_grad()
def eval_losses(run: Run, num_sequences: int, shuffle_media_seed: int | None = None) -> LossSums:
    """Losses on the first `num_sequences` held-out sequences, the same on every rank.

    `shuffle_media_seed` gives every sample the images of another one.
    """
    complete_parameters(run.modules)
    for module in run.modules:
        module.eval()
    inputs = read_evaluation(run, num_sequences, shuffle_media_seed)
    engine = None if run.vision is None else run.vision.heldout_engine
    if engine is not None and inputs.vision is not None:
        engine.start(inputs.vision)
    sums = run_schedule(
        partial(forward_micro_batch, engine=engine),
        run.chunks,
        inputs.micro_batches,
        run.topology,
        tokens_per_micro_batch=run.config.train.micro_batch_size * run.config.train.seq_len,
        forward_only=True,
    )
    if engine is not None:
        engine.release()
    for module in run.modules:
        module.train()
    return LossSums.over_all_ranks(sums, run.topology)
