"""What the time of a step goes to; torch-free."""

from enum import Enum


class Cause(Enum):
    """What the time of a step goes to, as seen by the ranks of the stage that computes the longest."""

    compute = "model's products and attention"
    recompute = "recomputation"
    memory_bound = "kernels that move data"
    storage = "activations stored in FP8"
    host = "host launches"
    experts = "tokens to experts and back"
    context = "a sequence's ranks exchange latents"
    pipeline = "messages between stages"
    data_parallel = "gradients reduced, weights gathered"
    offload = "activations to the host and back"
    bubble = "pipeline's idle time"
    encoder = "vision encoder"
    optimizer = "optimizer"
    quantization = "experts rounded to INT4"
    between_steps = "between steps"
    data = "data not there in time"
    checkpoint = "checkpoints"

    @property
    def is_of_model(self) -> bool:
        """Whether the model needs it, whatever is saved and wherever."""
        return self in (Cause.compute, Cause.memory_bound)

    @property
    def is_communication(self) -> bool:
        """Whether it is exposed communication."""
        return self in COMMUNICATION


COMMUNICATION = (Cause.experts, Cause.context, Cause.pipeline, Cause.data_parallel, Cause.offload)
