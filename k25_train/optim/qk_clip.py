"""QK-Clip (K2 report, arXiv 2507.20534, section 2.1 and appendix D) keeps attention logits from growing:
query and key weights are scaled down after the update, head by head.

With S the largest logit of a head in this step's forward passes and tau the threshold, the factor is
gamma = min(1, tau / S). The head's rows of the query's last projection are multiplied by sqrt(gamma), those
of its rotary part by gamma, and its key rows of the key-value up-projection by sqrt(gamma). The rotary key,
which all heads share, and the values are not scaled: every logit of the head is gamma times what it was, and
no other head is affected. Only every `optim.qk_clip_interval`-th step is sampled and clips: by the logits of
an earlier step, a head would be scaled down once more for what has been cured since.

The float32 masters are scaled, between the update and their copy to the model, so that weights and masters
are clipped alike, whatever their dtypes, wherever a shard begins and ends, and wherever masters rest.

Shapes: L layers of the whole model, H heads, N elements of a shard.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor, nn

from k25_train.config.model import ModelConfig
from k25_train.config.schema import Config

_ATTENTION_PARTS = ("core_attention", "query_projection", "linear_kv_up_proj")
"""Attributes that identify a latent attention module; only the model knows the class."""


@dataclass(frozen=True, slots=True)
class ClipResult:
    """What QK-Clip measured and did in a step, the same on every rank."""

    max_logits: tuple[float, ...]
    """The largest logit of each layer, before the update; infinite where a logit was NaN. Empty if QK-Clip is
    off, and in steps that are not sampled."""
    heads_clipped: int
    """Number of heads whose weights were scaled down."""


NOTHING_SEEN = ClipResult(max_logits=(), heads_clipped=0)
"""The result of a step that is not sampled, or without QK-Clip."""


def is_sampled(step: int, interval: int) -> bool:
    """Whether a step, counted from 1, is one of those whose logits are recorded: the first, then every
    `interval`-th. It depends on the step alone, so that a resumed run goes on as an uninterrupted one."""
    return (step - 1) % interval == 0


@dataclass(frozen=True, slots=True)
class _Weight:
    """A matrix with rows to scale."""

    parameter: nn.Parameter
    layer: int
    is_query: bool


class NoClip:
    """QK-Clip that is off: attention records nothing, and no weight is scaled."""

    def start(self, step: int) -> None:
        """Nothing."""

    def gather(self) -> None:
        """Nothing."""

    def finish(self, *, updated: bool) -> ClipResult:
        """Nothing was seen."""
        return NOTHING_SEEN


class QkClip:
    """QK-Clip of the attention layers on this rank, with any optimizer. Built and called by every rank.

    In a step: `start` before the first forward pass, `gather` after the last backward pass, then the
    optimizer's step, then `finish`. In steps between two samples all of them do nothing.
    """

    def __init__(
        self,
        chunks: Iterable[nn.Module],
        optimizer: MegatronOptimizer,
        model: ModelConfig,
        threshold: float,
        interval: int,
        device: torch.device,
    ) -> None:
        """Find the attention layers, whatever wraps them, and let them record their largest logits.

        Args:
            optimizer: a chain of `ShardedOptimizer`s, with their state on the device or the host.
            threshold: tau, in units of the softmax's input.
            interval: steps from one sample to the next; the first step is one.
            device: device of the model.
        """
        self._model = model
        self._threshold = threshold
        self._interval = interval
        self._samples = True
        self._device = device
        self._attentions: list[Any] = [
            module
            for chunk in chunks
            for module in chunk.modules()
            if all(hasattr(module, name) for name in _ATTENTION_PARTS)
        ]
        self.start(step=1)
        assert isinstance(optimizer, ChainedOptimizer)
        for part in optimizer.chained_optimizers:
            own = part.shards()
            part.transform_updates(
                {
                    weight.parameter: partial(self._clip, weight)
                    for weight in _weights(self._attentions)
                    if weight.parameter in own
                }
            )
        self._maxima: Tensor | None = None

    def start(self, step: int) -> None:
        """Let attention record in this step, counted from 1, if it is one of those that are sampled."""
        self._samples = is_sampled(step, self._interval)
        for attention in self._attentions:
            attention.core_attention.record_max_logits = self._samples

    @torch.no_grad()
    def gather(self) -> None:
        """Reduce the layers' recorded maxima over micro-batches and ranks, and reset them for the next step.

        One collective for all layers; nothing waits for the device.
        """
        if not self._samples:
            return
        shape = (self._model.num_layers, self._model.num_attention_heads)
        maxima_LH = torch.full(shape, -torch.inf, device=self._device)
        for attention in self._attentions:
            core = attention.core_attention
            if core.max_logits is not None:
                # Whether a NaN survives a maximum over ranks depends on their order: make it infinite.
                maxima_LH[core.layer_number - 1] = core.max_logits.nan_to_num(
                    nan=torch.inf, posinf=torch.inf, neginf=-torch.inf
                )
                core.max_logits = None
        dist.all_reduce(maxima_LH, dist.ReduceOp.MAX)
        self._maxima = maxima_LH

    def finish(self, *, updated: bool) -> ClipResult:
        """The result of the step; no head counts as clipped unless `updated`. Waits for the device.

        Raises `RuntimeError` naming layers that recorded nothing: their logits would grow unnoticed.
        """
        if not self._samples:
            return NOTHING_SEEN
        assert self._maxima is not None, "gather comes first"
        maxima_LH, self._maxima = self._maxima.cpu(), None
        silent = (maxima_LH == -torch.inf).any(1).nonzero().flatten().tolist()
        if silent:
            raise RuntimeError(
                f"optim.qk_clip_threshold={self._threshold:g}, but layers {silent} recorded no attention "
                "logits: their attention must set core_attention.max_logits in training passes; null "
                "switches QK-Clip off"
            )
        num_clipped = int((clip_factors(maxima_LH, self._threshold) < 1).sum()) if updated else 0
        return ClipResult(tuple(maxima_LH.amax(1).tolist()), num_clipped)

    @torch.no_grad()
    def _clip(self, weight: _Weight, values: Tensor, start: int) -> None:
        """Scale updated masters [n] of a weight, which begin at its element `start`."""
        if self._maxima is None:
            return
        model = self._model
        factors_H = clip_factors(self._maxima[weight.layer], self._threshold)
        nope, rope, value = model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
        if weight.is_query:
            row_scales = query_row_scales(factors_H, nope, rope)
        else:
            row_scales = key_value_row_scales(factors_H, nope, value)
        scale_rows(values, start, row_scales, weight.parameter.shape[1])


def _weights(attentions: Iterable[Any]) -> Iterator[_Weight]:
    for attention in attentions:
        layer = attention.core_attention.layer_number - 1
        yield _Weight(attention.query_projection.weight, layer, True)
        yield _Weight(attention.linear_kv_up_proj.weight, layer, False)


def build_qk_clip(
    chunks: Iterable[nn.Module], optimizer: MegatronOptimizer, config: Config, device: torch.device
) -> QkClip | NoClip:
    """QK-Clip with `optim.qk_clip_threshold`; `NoClip` if that is null, or the language model not trained."""
    threshold, interval = config.optim.qk_clip_threshold, config.optim.qk_clip_interval
    if threshold is None or not config.optim.language_model.trained:
        return NoClip()
    return QkClip(chunks, optimizer, config.model, threshold, interval, device)


def clip_factors(maxima: Tensor, threshold: float) -> Tensor:
    """gamma = min(1, threshold / maximum) of each head, in the shape of `maxima`.

    A maximum that is not finite clips nothing: the gradient of such a step is not finite either.
    """
    too_large = (maxima > threshold) & maxima.isfinite()
    return torch.where(too_large, threshold / maxima, 1.0)


def query_row_scales(factors_H: Tensor, nope: int, rope: int) -> Tensor:
    """Scales [H * (nope + rope)] of the rows of the query's last projection."""
    plain, rotary = factors_H.sqrt()[:, None].expand(-1, nope), factors_H[:, None].expand(-1, rope)
    return torch.cat((plain, rotary), dim=1).flatten()


def key_value_row_scales(factors_H: Tensor, nope: int, value: int) -> Tensor:
    """Scales [H * (nope + value)] of the rows of the key-value up-projection; values are not scaled."""
    keys = factors_H.sqrt()[:, None].expand(-1, nope)
    return torch.cat((keys, keys.new_ones(len(keys), value)), dim=1).flatten()


def scale_rows(shard: Tensor, start: int, row_scales: Tensor, num_columns: int) -> None:
    """Scale rows of a matrix [rows, num_columns] in place; `shard` [N] is its flat part from `start` on.

    A shard may begin and end within a row: whole rows are scaled in one operation, the cut ones separately.
    """
    # 1. Where the first whole row begins, and how many there are.
    first_row, skipped = divmod(start, num_columns)
    to_border = min(-start % num_columns, shard.numel())
    num_whole, rest = divmod(shard.numel() - to_border, num_columns)
    whole_from = first_row + math.ceil(skipped / num_columns)
    # 2. Scale the end of a row, whole rows, the beginning of a row.
    head, body, tail = shard.split([to_border, num_whole * num_columns, rest])
    if to_border:
        head.mul_(row_scales[first_row])
    body.view(num_whole, num_columns).mul_(row_scales[whole_from : whole_from + num_whole, None])
    if rest:
        tail.mul_(row_scales[whole_from + num_whole])
