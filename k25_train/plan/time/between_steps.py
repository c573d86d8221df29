"""What a step waits for next to its passes and its optimizer: host work, data, checkpoints; torch-free."""

from k25_train.config.cluster import Device
from k25_train.config.data import ReadIn
from k25_train.plan.assumptions import ITEM_TOKENS
from k25_train.plan.cause import Cause
from k25_train.plan.memory.checkpoint import shard_bytes
from k25_train.plan.pipeline import PipelinePlan, distinct_stages
from k25_train.plan.time.step_plan import Part
from k25_train.units import GB

HOST_WORK_S = 0.05
"""Work of the host between two steps, while a GPU waits: what `tests.bench.host_work` allows."""
DECODE_S = 0.015
"""Seconds of one core in which an image of half a megapixel (`ITEM_TOKENS`) becomes patches. Source: 12 ms of
decoding, resizing and cutting with Pillow on a core of a machine without GPUs; what reading takes is our
choice."""


def host_part(pipeline: PipelinePlan) -> Part:
    """Host work between two steps, and what calibration adds. Where the device is the CPU, it is this very
    work, which calibration knows alone."""
    cluster = pipeline.config.cluster
    host_s = HOST_WORK_S if cluster.device is Device.cuda else 0.0
    seconds = host_s + cluster.rates.calibration.step_ms / 1e3
    return Part(
        Cause.between_steps, seconds, f"host work {1e3 * host_s:.0f} ms, and rates.calibration.step_ms"
    )


def data_part(pipeline: PipelinePlan, step_s: float) -> Part:
    """What reading takes longer than the step that hides it.

    Args:
        pipeline: what is planned.
        step_s: of all else.
    """
    config, assumed = pipeline.config, pipeline.assumptions
    data = config.data
    tokens = assumed.vision_share * config.train.global_batch_size * config.train.seq_len / config.world_size
    cores = max(1, data.workers)
    seconds = DECODE_S * tokens / ITEM_TOKENS / cores
    images = tokens / ITEM_TOKENS * config.cluster.gpus_per_node
    how = f"{images:,.0f} images per node, {1e3 * DECODE_S:.0f} ms of a core each, {cores} cores per rank"
    is_ahead = data.read_in is ReadIn.process and data.prefetch_steps > 0
    return Part(Cause.data, max(0.0, seconds - step_s) if is_ahead else seconds, how)


def checkpoint_part(pipeline: PipelinePlan, step_s: float) -> Part:
    """The copy of a rank's state to the host, at `checkpoint.interval`; files are written behind training.

    Args:
        pipeline: what is planned.
        step_s: of all else.
    """
    config = pipeline.config
    most_bytes = max(map(shard_bytes, distinct_stages(pipeline)))
    copied_s = most_bytes / (GB * config.cluster.host_copy_gb_per_s)
    steps = config.checkpoint.interval_steps
    if steps is None:
        seconds_between = config.checkpoint.interval_s
        assert seconds_between is not None, "an interval is one of steps or of time"
        # Of the time between two saves, the copy takes its share.
        seconds = step_s * copied_s / max(seconds_between - copied_s, copied_s)
    else:
        seconds = copied_s / steps
    how = f"{copied_s:.2f} s to copy a rank's shard, every {config.checkpoint.interval}"
    return Part(Cause.checkpoint, seconds, how)
