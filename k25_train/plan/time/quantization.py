"""How long rounding routed experts to INT4 takes (`model.quantization=int4_qat`); torch-free."""

from k25_train.config.model import Quantization
from k25_train.plan.cause import Cause
from k25_train.plan.kernels.kernel import Moved, Precision
from k25_train.plan.kernels.seconds import kernels_s
from k25_train.plan.memory.states import pipeline_states
from k25_train.plan.pipeline import PipelinePlan
from k25_train.plan.time.step_plan import Part

STACKS = 2
"""Weights of a layer's experts, a kernel each: gate and up projection, down projection."""


def quantization_part(pipeline: PipelinePlan) -> Part:
    """Rounding of all stages: each rounds its layers when the first micro-batch comes there, which waits for
    it on its way through the pipeline. Weights are read once and their copies written
    (`k25_train/int4_triton.py`)."""
    config, seconds = pipeline.config, 0.0
    if config.model.quantization is Quantization.none:
        return Part(Cause.quantization, 0.0, "model.quantization=none")
    copies = [states.quantized for states in pipeline_states(pipeline)]
    for stage, num_bytes in zip(pipeline.stages, copies, strict=True):
        layers = sum(config.model.is_moe(layer) for chunk in stage.chunks for layer in chunk.layers)
        kernel = Moved("experts to INT4", 2.0 * num_bytes, STACKS * layers)
        seconds += kernels_s([kernel], config.cluster.rates, Precision.of(config.train.dtype))
    how = f"{max(copies) / 1e9:.2f} GB of copies on a rank, stage after stage"
    return Part(Cause.quantization, pipeline.assumptions.slow_node * seconds, how)
