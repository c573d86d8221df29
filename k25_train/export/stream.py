"""One stream of named tensors in the release's names, out of whatever holds the weights.

A stream is an iterator of `NamedTensor`, one at a time and in the order of the release (`listing.py`), so
that who takes them needs the memory of a few tensors, never of a model. An export writes it to files; an
inference engine can take it as weights of the next policy.

`stored_tensors` reads a checkpoint of any layout; `live.py` has the twin that takes modules of a trainer.
`as_stored` packs the routed experts of either; `as_computed` gives the weights that a model of this
`model.quantization` computes with, which is what engines that hold no packed weights serve.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from k25_train import int4
from k25_train.checkpoint.files.stored import StoredCheckpoint, Wanted
from k25_train.config.model import Quantization
from k25_train.errors import CheckpointError
from k25_train.export.listing import ReleasedTensor, WeightFormat
from k25_train.int4 import Int4Weight

TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
}
"""safetensors' and the table's names of number formats -> torch's."""
READ_BYTES = 256 * 2**20
"""Bytes that are read from a checkpoint at once; a larger tensor is read alone. Neighbours share requests."""
MASTER = "optimizer.state.param."
"""What the name of a float32 master begins with in a checkpoint; the rest is the parameter's."""


class NamedTensor(NamedTuple):
    """A tensor of the release."""

    name: str
    """The release's name."""
    tensor: Tensor
    """In the release's shape and number format."""

    @property
    def dtype(self) -> torch.dtype:
        """Its number format."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)


Requantize = Callable[[str, Tensor], Int4Weight]
"""From an expert's released name (before packing) and its bfloat16 weights to what is stored."""


def stored_tensors(
    checkpoint: StoredCheckpoint, tensors: Iterable[ReleasedTensor], *, from_masters: bool = False
) -> Iterator[NamedTensor]:
    """The stream of a checkpoint; tensors are read when they are asked for, `READ_BYTES` of them at a time,
    and no byte twice.

    Args:
        checkpoint: opened; whatever layout wrote it.
        tensors: which, in this order.
        from_masters: read the optimizer's float32 masters instead of the weights that are made of them. What
            is not trained, buffers and frozen weights, has none.

    Raises as `StoredCheckpoint.read` does.
    """
    for batch in _batches(checkpoint, tensors, from_masters=from_masters):
        flats = [
            torch.empty(each.stop - each.start, dtype=checkpoint.info(each.name).dtype) for each, _ in batch
        ]
        checkpoint.read_into([wanted for wanted, _ in batch], flats)
        flats.reverse()
        for _, tensor in batch:
            # What was taken can go, before the last of the batch.
            yield named(tensor, flats.pop())


def source_name(tensor: ReleasedTensor, checkpoint: StoredCheckpoint, *, from_masters: bool = False) -> str:
    """The name in a checkpoint of what a tensor is read from."""
    master = MASTER + tensor.source
    return master if from_masters and master in checkpoint.tensors else tensor.source


def _batches(
    checkpoint: StoredCheckpoint, tensors: Iterable[ReleasedTensor], *, from_masters: bool
) -> Iterator[list[tuple[Wanted, ReleasedTensor]]]:
    batch: list[tuple[Wanted, ReleasedTensor]] = []
    num_bytes = 0
    for tensor in tensors:
        wanted = Wanted(source_name(tensor, checkpoint, from_masters=from_masters), tensor.start, tensor.stop)
        size = tensor.size * checkpoint.info(wanted.name).dtype.itemsize
        if batch and num_bytes + size > READ_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append((wanted, tensor))
        num_bytes += size
    if batch:
        yield batch


def named(tensor: ReleasedTensor, flat: Tensor) -> NamedTensor:
    """Elements of one of ours as the release's tensor; rounded if training has more digits."""
    return NamedTensor(tensor.name, flat.view(tensor.shape).to(TORCH_DTYPES[tensor.dtype]))


def as_stored(
    stream: Iterable[NamedTensor],
    tensors: Iterable[ReleasedTensor],
    weights: WeightFormat,
    requantize: Requantize = lambda _name, weight: int4.requantize(weight),
) -> Iterator[NamedTensor]:
    """A stream with the routed experts as the release stores them.

    Args:
        stream: of the release's tensors before packing.
        tensors: what they are, in the same order.
        weights: bf16 leaves everything as it is.
        requantize: how weights become INT4.

    Raises `CheckpointError` if the two are of different tensors, or an expert cannot be packed.
    """
    for each, tensor in _matched(stream, tensors):
        if not (tensor.is_expert and weights is WeightFormat.int4):
            yield each
            continue
        try:
            packed = requantize(each.name, each.tensor)
        except CheckpointError as error:
            raise CheckpointError(f"{each.name}: {error}") from error
        parts = (packed.packed, packed.scale, packed.shape_tensor())
        for entry, part in zip(tensor.entries(weights), parts, strict=True):
            yield NamedTensor(entry.name, part)


def as_computed(
    stream: Iterable[NamedTensor], tensors: Iterable[ReleasedTensor], quantization: Quantization
) -> Iterator[NamedTensor]:
    """A stream with the routed experts as training computes with them, in the number formats of the stream.

    With `int4_qat` these are the numbers that the bytes of `as_stored` stand for, bit for bit, so that an
    engine without INT4 kernels serves what the trainer has in its forward pass.

    Args:
        stream: of the release's tensors before packing, bfloat16 or float32.
        tensors: what they are, in the same order.
        quantization: `model.quantization` of the run.

    Raises `CheckpointError` if the two are of different tensors.
    """
    for each, tensor in _matched(stream, tensors):
        if tensor.is_expert and quantization is Quantization.int4_qat:
            yield NamedTensor(each.name, int4.fake_quantize(each.tensor))
        else:
            yield each


def _matched(
    stream: Iterable[NamedTensor], tensors: Iterable[ReleasedTensor]
) -> Iterator[tuple[NamedTensor, ReleasedTensor]]:
    """Each tensor with what it is. Raises `CheckpointError` if the two are of different tensors."""
    for each, tensor in zip(stream, tensors, strict=True):
        if each.name != tensor.name or each.shape != tensor.shape:
            raise CheckpointError(
                f"the stream has {each.name} {list(each.shape)} where {tensor.name} {list(tensor.shape)} "
                "is due; give both in the order of the release"
            )
        yield each, tensor
