"""One micro-batch through one chunk of the model, and its losses.

Shapes: T tokens of a micro-batch, V vision tokens, P patches.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from k25_train.data.batch import MicroBatch
from k25_train.model.attention import PackedDocuments
from parallel.activations.manager import ActivationManager
from parallel.activations.storage import deallocate_data
from parallel.dep.engine import Engine
from parallel.megatron.ep_overlap_activations import save_by_policy
from parallel.megatron.schedule import ForwardOutput, LossOutput
from parallel.pipeline.schedule import PassKey
from parallel.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBatch:
    """A micro-batch where the model is."""

    tokens: Tensor
    """[T] int64."""
    labels: Tensor
    """[T] int64."""
    loss_mask: Tensor
    """[T] float32, 0 or 1."""
    is_caption: Tensor
    """[T] bool, targets of samples with media."""
    document_lengths: tuple[int, ...]
    number: int
    """Of the micro-batch within its replica and step."""
    media_positions: Tensor
    """[V] int64, where the vision placeholders stand."""
    pixels: Tensor | None
    """[P, 588] float32; None on ranks without a coupled tower."""
    grid_thw: tuple[tuple[int, int, int], ...]


def to_device(number: int, batch: MicroBatch, media_pad: int, device: torch.device) -> DeviceBatch:
    """Move the micro-batch of this number to `device`; `media_pad` is the id of the vision placeholder."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return DeviceBatch(
        number=number,
        tokens=move(batch.tokens),
        labels=move(batch.labels),
        loss_mask=move(batch.loss_mask),
        is_caption=move(batch.is_caption),
        document_lengths=batch.document_lengths,
        media_positions=move((batch.tokens == media_pad).nonzero().squeeze(1)),
        pixels=None if batch.pixels is None else move(batch.pixels),
        grid_thw=batch.grid_thw,
    )


class TokenCounts(NamedTuple):
    """Tokens of the global batch."""

    with_loss: int
    total: int
    """Padding included."""


def count_tokens(batches: Sequence[DeviceBatch], topology: Topology) -> TokenCounts:
    """Count the global batch's tokens; every rank gets the same."""
    counted = [batch.loss_mask.sum(dtype=torch.float64) for batch in batches]
    total = sum(batch.tokens.numel() for batch in batches)
    counts = torch.stack([torch.stack(counted).sum(), torch.tensor(float(total)).to(counted[0])])
    dist.all_reduce(counts, group=topology.groups.dp)
    with_loss, everything = counts.tolist()
    return TokenCounts(int(with_loss), int(everything))


def forward_micro_batch(
    batch: DeviceBatch,
    chunk: torch.nn.Module,
    as_plan: bool,
    engine: Engine | None = None,
    activations: ActivationManager | None = None,
) -> ForwardOutput:
    """Run one chunk; the last one yields losses and how to sum them.

    With `as_plan` the chunk does not run, but returns the plan that the overlapped schedule runs. `engine`
    has the features of a micro-batch where the tower is decoupled; `activations` knows how to save what the
    backward pass needs, and None leaves that to torch.
    """
    run = cast(Callable[..., Any], chunk.build_schedule_plan if as_plan else chunk)
    model: Any = getattr(chunk, "module", chunk)
    saving = None
    if activations is not None:
        saving = activations.forward_pass(PassKey(model.vp_stage or 0, batch.number))
    with nullcontext() if saving is None else saving.active():
        output = run(
            tokens=batch.tokens,
            documents=PackedDocuments.of(batch.document_lengths, batch.tokens.device),
            labels=batch.labels,
            media_positions=batch.media_positions,
            pixels=batch.pixels,
            grid_thw=batch.grid_thw,
            features=engine.leaf(batch.number) if engine is not None and model.pre_process else None,
        )
    if activations is not None and saving is not None:
        if as_plan:
            save_by_policy(output, saving, activations.hold_output)
        else:
            # The schedule holds a chunk's input for its gradient only, and its output for its history.
            if not model.pre_process:
                deallocate_data(model.language_model.decoder.input_tensor)
            if not model.post_process:
                activations.hold_output(output)
    return output, partial(sum_losses, batch)


def sum_losses(batch: DeviceBatch, losses: Tensor) -> LossOutput:
    """Sum the losses [T], or [1, T], of the tokens that count.

    The sum goes backward; megatron-core divides its gradient by the global batch's number of such tokens.
    """
    counted = losses.float().flatten() * batch.loss_mask
    num_tokens = batch.loss_mask.sum().to(torch.int)
    return counted.sum(), num_tokens, LossSums.of(counted.detach(), batch.loss_mask, batch.is_caption)


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums of losses and numbers of tokens, text apart from samples with media."""

    values: Tensor
    """[4] float64: text loss, text tokens, caption loss, caption tokens."""

    @classmethod
    def of(cls, losses: Tensor, loss_mask: Tensor, is_caption: Tensor) -> "LossSums":
        """Sum masked `losses` [T] and `loss_mask` [T] by kind."""
        caption = is_caption.double()
        losses, mask = losses.double(), loss_mask.double()
        caption_loss, caption_tokens = (losses * caption).sum(), (mask * caption).sum()
        return cls(
            torch.stack(
                [losses.sum() - caption_loss, mask.sum() - caption_tokens, caption_loss, caption_tokens]
            )
        )

    @classmethod
    def over_all_ranks(cls, sums: Sequence["LossSums"], topology: Topology) -> "LossSums":
        """Add up what the last stages report of their micro-batches; every rank gets the total."""
        total = torch.zeros(4, dtype=torch.float64, device=topology.device)
        for part in sums:
            total += part.values
        dist.all_reduce(total)
        return cls(total.cpu())

    @property
    def loss(self) -> float:
        """Mean loss per token in nats."""
        text, num_text, caption, num_caption = self.values.tolist()
        return (text + caption) / max(num_text + num_caption, 1)

    def held_out(self) -> dict[str, float]:
        """`eval_text_loss` and `eval_caption_loss` in nats per token, of the kinds that have tokens."""
        kinds = {"eval_text_loss": self.values[:2], "eval_caption_loss": self.values[2:]}
        return {name: float(loss / count) for name, (loss, count) in kinds.items() if count > 0}
