"""One training step, in the order of the K2.5 report (section 4.5.1), on one page.

With a coupled tower, vision forward and backward happen inside the backbone's schedule, in the first pipeline
stage: phases 2 and 4 do nothing.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from k25_train.data.served import Served
from k25_train.data.storage.counts import COSTS, COUNTS
from k25_train.errors import TrainingError
from k25_train.optim.build import set_learning_rate
from k25_train.optim.qk_clip import ClipResult
from k25_train.plan.batch_sizes import BatchSizes
from k25_train.plan.schedule import Schedule
from k25_train.training.device_memory import MemoryFigures, NoMemoryFigures
from k25_train.training.expert_load import ExpertFigures
from k25_train.training.forward import forward_micro_batch
from k25_train.training.inputs import Inputs
from k25_train.training.run import Run
from k25_train.training.step_totals import losses_by_source, step_totals
from k25_train.training.tower import NoSummary
from parallel.activations.offload import NoOffload, OffloadStats
from parallel.dep.stats import VisionSummary
from parallel.megatron.patches.pass_hooks import subscribed
from parallel.megatron.replicas import start_gather
from parallel.megatron.schedule import run_schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one step did, the same on every rank."""

    sizes: BatchSizes
    """Of the global batch that was trained on."""
    num_sequences: int
    """Sequences of the global batch, those of padding alone included."""
    served: Mapping[str, Served]
    """What each source has given to it."""
    loader_state: Mapping[str, Any]
    """Where the loader is after it, for a checkpoint (`HostInputs.state_after`)."""
    loss: float
    """Mean loss per token of the global batch before the update: in nats, or whatever the objective has."""
    grad_norm: float
    """Global gradient norm before clipping."""
    part_grad_norms: Mapping[str, float]
    """The same of each trained part of the model: `language_model`, `vision_tower`, `mm_projector`."""
    source_losses: Mapping[str, float]
    """Source -> mean loss per token of what it gave, in nats, before the update."""
    figures: Mapping[str, float]
    """Everything that the objective reports of the global batch (`Objective.figures`)."""
    experts: ExpertFigures
    """How evenly the experts were loaded."""
    weight_norms: Mapping[str, float]
    """Part of the model -> norm of its weights before the update; empty in most steps."""
    learning_rate: float
    """Learning rate of the update, before the factors of parameter groups."""
    step_time_s: float
    """Wall-clock seconds on this rank."""
    data_wait_s: float
    """Seconds of it in which the slowest rank waited for its inputs."""
    reads: Mapping[str, int]
    """What this rank's reading has cost since the step before (`k25_train.data.storage.counts`)."""
    pixels_read: int
    """Pixels that all ranks have decoded since the step before, for evaluations, too."""
    updated: bool
    """Whether weights changed; not if the gradient norm was not finite."""
    not_finite: tuple[str, ...]
    """Parameters whose gradient was not finite; empty if the update took place."""
    clip: ClipResult
    """Largest logits and clipped heads of QK-Clip; empty if it is off."""
    vision: VisionSummary | NoSummary
    """Figures of the decoupled encoder over all ranks; none with a coupled tower."""
    offload: OffloadStats | NoOffload
    """Figures of offloaded activations, the worst of any rank; none if nothing is offloaded."""
    memory: MemoryFigures | NoMemoryFigures
    """Peaks of device memory, the worst of any rank; none on the CPU."""


def train_step(run: Run, step: int) -> StepResult:
    """Train on the global batch of `step` (counted from 1).

    A gradient that is not finite changes nothing, on every rank alike; the result names the parameters.
    Raises `TrainingError` if the loss is not finite though the gradient is.
    """
    started = time.perf_counter()
    run.memory.start_step()

    # 1. The plan of the global batch is the same on every rank; each reads its own share.
    with run.tracker.phase("read data"):
        inputs = run.reader.step(step)
    tokens, schedule = inputs.tokens, Schedule(run.config.optim, run.config.train)
    _begin(run, step, schedule, len(inputs.micro_batches))

    # 2. Balanced vision forward: every rank encodes an equal share of all images, whoever owns them, and the
    #    features go to the first stages. In bubbles only what the first micro-batches need.
    run.tower.start(inputs.vision)

    # 3. Forward and backward of the pipeline: 1F1B, interleaved with virtual stages. It ends with the
    #    gradients reduced over data-parallel ranks and divided by the number of tokens with a loss. The
    #    balance loss is a mean over all tokens but padding, so its gradient gets their ratio beforehand.
    reported = _passes(run, inputs)

    # 4. Vision recompute and backward, with the gradients that the features have received; the encoder's own
    #    are summed over all ranks once, and divided like the backbone's.
    run.tower.finish(tokens.with_loss)
    totals = step_totals(run, step, reported)
    loss, figures = run.objective.loss(totals.sums), run.objective.figures(totals.sums)

    # 5. One gradient norm over all parameters, clip, and the optimizer step on this rank's shard. QK-Clip
    #    scales masters before they are copied to the model.
    rate = schedule.learning_rate(step)
    set_learning_rate(run.optimizer, rate)
    with run.tracker.phase("optimizer"):
        run.qk_clip.gather()
        updated, grad_norm, _ = run.optimizer.step()
        clip = run.qk_clip.finish(updated=updated)
        # In the order in which the next step needs them: it encodes first.
        start_gather([*run.tower.replicas, *run.chunks])
    if updated:
        _check_loss(step, loss)
    return StepResult(
        sizes=inputs.sizes,
        num_sequences=len(inputs.micro_batches) * run.config.train.micro_batch_size * run.config.dp,
        served=inputs.served,
        loader_state=inputs.loader_state,
        loss=loss,
        grad_norm=float(grad_norm),
        part_grad_norms=run.optimizer.part_norms,
        source_losses=losses_by_source(figures),
        figures=figures,
        experts=totals.experts,
        weight_norms=totals.weight_norms,
        learning_rate=rate,
        step_time_s=time.perf_counter() - started,
        data_wait_s=inputs.wait_s,
        reads=COUNTS.take(COSTS),
        pixels_read=inputs.pixels_read,
        clip=clip,
        vision=run.tower.summary(),
        offload=run.activations.finish_step(),
        memory=run.memory.finish_step(),
        updated=bool(updated),
        not_finite=tuple(run.optimizer.not_finite),
    )


def _begin(run: Run, step: int, schedule: Schedule, num_micro_batches: int) -> None:
    """Have everything ready for the passes of a step."""
    run.activations.start_step(num_micro_batches)
    run.zero_gradients()
    run.qk_clip.start(step)
    run.move_expert_bias(schedule.moves_expert_bias(step))


def _passes(run: Run, inputs: Inputs) -> list[Any]:
    """All passes of the step, and the reduction of its gradients; what the last stages report."""
    micro_batch = partial(
        forward_micro_batch, objective=run.objective, leaf=run.tower.leaf, activations=run.activations
    )
    with subscribed(run.expert_load):
        return run_schedule(
            micro_batch,
            run.chunks,
            inputs.micro_batches,
            run.topology,
            tokens_per_micro_batch=run.tokens_per_micro_batch,
            balance_loss_scale=inputs.tokens.with_loss / max(inputs.tokens.total, 1),
            before_pass=[run.activations.before_pass, run.tower.before_pass],
        )


def _check_loss(step: int, loss: float) -> None:
    if not math.isfinite(loss):
        raise TrainingError(
            f"step {step}: the loss is {loss}, but its gradient is finite: look at the data of this step, "
            "and start again: the run resumes from its last checkpoint"
        )
