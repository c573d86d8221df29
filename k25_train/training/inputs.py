"""What one rank reads for a step or an evaluation: micro-batches, and the items that it encodes.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from k25_train.data.batch import MicroBatch, mask_failed
from k25_train.data.vision_reader import StepVision
from k25_train.training.encoder import share_failures
from k25_train.training.forward import DeviceBatch, to_device
from k25_train.training.run import Run
from parallel.dep.engine import VisionWork
from parallel.topology import Topology


@dataclass(frozen=True, slots=True)
class Inputs:
    """One rank's inputs."""

    micro_batches: list[DeviceBatch]
    """Of this rank's replica."""
    vision: VisionWork | None
    """What the decoupled encoder does; None if the tower is coupled."""


def read_step(run: Run, step: int) -> Inputs:
    """This rank's inputs of `step` (from 1); with a coupled tower, the first pipeline stage's have pixels."""
    place = run.topology
    with run.tracker.phase("read data"):
        with_pixels = run.vision is None and place.holds_first_chunk
        batches = run.loader.micro_batches(
            step - 1, dp_rank=place.dp_rank, dp_size=place.dp_size, with_pixels=with_pixels
        )
        vision = None if run.vision is None else run.vision.of_step(step - 1, run.loader)
        return _ready(run, batches, vision)


def read_evaluation(run: Run, num_sequences: int, shuffle_media_seed: int | None = None) -> Inputs:
    """This rank's inputs of the first `num_sequences` held-out sequences.

    With `shuffle_media_seed`, every sample gets another sample's images: what the loss then rises by is what
    the model gets from seeing the right ones.
    """
    place = run.topology
    with run.tracker.phase("read data"):
        batches = run.loader.eval_micro_batches(
            num_sequences,
            dp_rank=place.dp_rank,
            dp_size=place.dp_size,
            with_pixels=run.vision is None and place.holds_first_chunk,
            shuffle_media_seed=shuffle_media_seed,
        )
        vision = None
        if run.vision is not None:
            sequences = run.loader.eval_plan(num_sequences, shuffle_media_seed).sequences
            vision = run.vision.heldout_reader.read(sequences)
        return _ready(run, batches, vision)


def _ready(run: Run, batches: Sequence[MicroBatch], vision: StepVision | None) -> Inputs:
    if vision is None:
        failed = _failed_in_first_stage(batches, run.topology)
    else:
        items = share_failures(vision, run.loader, run.topology)
        batches = [batches[number] for number in vision.order[run.topology.dp_rank]]
        failed = _by_micro_batch(vision, items, run.topology.dp_rank, len(batches))
    masked = [mask_failed(batch, of_batch) for batch, of_batch in zip(batches, failed, strict=True)]
    device, media_pad = run.topology.device, run.loader.tokenizer.media_pad
    return Inputs(
        [to_device(number, batch, media_pad, device) for number, batch in enumerate(masked)],
        None if vision is None else vision.work,
    )


def _failed_in_first_stage(batches: Sequence[MicroBatch], topology: Topology) -> Sequence[Sequence[int]]:
    """[micro-batch] -> items that the first stage could not decode; the same on all stages of the pipeline.

    Only the first stage decodes; without this the last stage would learn from a blank image.
    """
    failed = [batch.failed_items for batch in batches]
    if topology.pp_size > 1:
        count = torch.tensor(sum(map(len, failed)), device=topology.device)
        dist.broadcast(count, topology.first_stage_rank, group=topology.groups.pp)
        if count.item():
            box = [failed]
            dist.broadcast_object_list(box, topology.first_stage_rank, group=topology.groups.pp)
            failed = box[0]
    return failed


def _by_micro_batch(
    vision: StepVision, failed: Sequence[int], replica: int, num_micro_batches: int
) -> list[list[int]]:
    """[micro-batch of a replica] -> its items, counted within it, that are among `failed` of the batch."""
    found: list[list[int]] = [[] for _ in range(num_micro_batches)]
    counted = [0] * num_micro_batches
    for number, item in enumerate(vision.work.plan.items if failed else ()):
        if item.replica == replica:
            if number in failed:
                found[item.micro_batch].append(counted[item.micro_batch])
            counted[item.micro_batch] += 1
    return found
