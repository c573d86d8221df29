"""The memory of one rank of a pipeline stage, item by item; torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMemory:
    """One rank of a pipeline stage, in bytes. Each is a peak; they may not coincide."""

    stage: int
    """Position in the pipeline, counted from 0."""
    layers: tuple[range, ...]
    """Decoder layers of each of the rank's chunks."""
    num_held: int
    """Passes between forward and backward at the peak."""
    weights: int
    """Weights, a decoupled encoder's among them."""
    quantized: int
    """Copies of routed experts as INT4 has them, which passes compute with (`model.quantization`)."""
    gradients: int
    """Gradients of the trained weights."""
    optimizer: int
    """Masters and moments, on the device or in the host."""
    optimizer_on_device: int
    """Masters and moments on the device."""
    optimizer_in_host: int
    """Masters and moments in page-locked host memory."""
    saved: int
    """Activations that wait on the device for their backward pass."""
    outputs: int
    """Outputs of chunks until they are sent; if all activations are kept, until their backward pass."""
    buffer: int
    """What the offload engine may keep on its way to the host and back."""
    working: int
    """What one layer, or the head, needs in addition while it is computed."""
    exchanged: int
    """Tokens on their way to experts and back."""
    shared_keys: int
    """Keys and values that a layer makes of other ranks' latents, with their gradients; 0 where ranks have
    whole sequences."""
    features: int
    """Features of images and their gradients, at rest and in flight while the pipeline runs."""
    tower: int
    """Chunks of the decoupled encoder that share the device with the pipeline's passes."""
    encoding: int
    """The decoupled encoder, with its features, before or after the pipeline."""
    updating: int
    """Buffers of the optimizer's rounds."""
    gaps_share: float
    """Share of tensors' memory that the allocator holds between them; 0 where the device is the CPU."""
    context: int
    """CUDA's own memory."""
    nccl: int
    """Buffers of NCCL's communicators."""
    host: int
    """Page-locked host memory for offloaded activations."""
    snapshot: int
    """Page-locked host memory for the copy of the state from which a checkpoint is written."""
    copied: int
    """Bytes of a micro-batch in all of the rank's chunks that are copied to the host, and back."""

    @property
    def states(self) -> int:
        """What is on the device from step to step."""
        return self.weights + self.quantized + self.gradients + self.optimizer_on_device

    @property
    def activations(self) -> int:
        """What the pipeline's passes have on the device, and what runs between them."""
        passes = self.saved + self.outputs + self.buffer + self.working + self.exchanged + self.shared_keys
        return passes + self.features + self.tower

    @property
    def phases(self) -> dict[str, int]:
        """Phase -> what it takes on the device on top of states."""
        return {
            "pipeline": self.activations,
            "encoder": self.encoding,
            "optimizer": self.updating,
        }

    @property
    def fullest_phase(self) -> str:
        """The phase that takes the most."""
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def tensors(self) -> int:
        """All that tensors take on the device."""
        return self.states + max(self.phases.values())

    @property
    def gaps(self) -> int:
        """What the allocator holds between tensors."""
        return round(self.gaps_share * self.tensors)

    @property
    def device(self) -> int:
        """All that is taken of the device."""
        return self.tensors + self.gaps + self.context + self.nccl

    @property
    def loading(self) -> int:
        """What is taken while a checkpoint is loaded. It is read through the host to where it belongs;
        megatron-core holds the optimizer's state twice meanwhile (Megatron-LM pull request 7288)."""
        return self.states + self.context + self.nccl
