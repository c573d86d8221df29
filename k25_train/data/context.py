"""What of a step's micro-batches a rank computes: all of it, or with context parallelism its tokens.

Every rank that shares a micro-batch reads all of it: a failure anywhere makes a whole document padding, and
labels are those of the micro-batch, so that one whose next token is on another rank is as right as any other.

    micro-batch   tokens [T]  labels [T]  items ...          agreed on by all ranks
                       |
                  plan_context(lengths, padding known from the index)
                       |
    rank          tokens [t]  labels [t]  items of which it holds a token

Shapes: M micro-batches of T tokens, of which a rank holds t = T / cp; V vision tokens and P patches of all of
them, W of items that this rank encodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from k25_train.data.step_batches import Documents, StepBatches
from parallel.context.plan import ContextPlan, plan_context


def context_plan(documents: Documents, cp: int) -> ContextPlan:
    """Which rank holds which tokens of a micro-batch.

    A sample whose words cannot be used counts as a document: who holds what follows from the index alone, and
    the ranks that send features know it before anything is read.
    """
    planned = set(documents.padding) - set(documents.unreadable)
    return plan_context(documents.lengths, planned, cp)


class WholeShare(NamedTuple):
    """All of a micro-batch: no other rank shares it."""


class ContextShare(NamedTuple):
    """A rank's share of a micro-batch."""

    plan: ContextPlan
    """Who holds what of it. Padding is here also what its words have made padding."""
    cp_rank: int
    """The rank's place among those that share it."""


class HeldItems(NamedTuple):
    """The vision tokens of a micro-batch that a rank holds, and their items."""

    positions: np.ndarray
    """[V] int64, where they are among the rank's tokens."""
    items: np.ndarray
    """Positions, among those of the micro-batch, of the items of which it holds any; ascending."""
    rows: np.ndarray
    """[V] int64, which rows of these items' features, one after another, they take."""


def held_items(
    media_positions: np.ndarray, num_tokens_of_items: Sequence[int], tokens: np.ndarray
) -> HeldItems:
    """What a rank that holds `tokens` [t] (positions in the micro-batch, ascending) holds of its items.

    Args:
        media_positions: where all vision tokens are in the micro-batch, in order of items.
        num_tokens_of_items: how many of them are each item's.
    """
    # 1. Which vision tokens are here, and where.
    places = np.searchsorted(tokens, media_positions)
    is_here = tokens[np.minimum(places, len(tokens) - 1)] == media_positions
    # 2. Their items, and where the rows of these begin once the others are left out.
    item_of_token = np.repeat(np.arange(len(num_tokens_of_items)), num_tokens_of_items)[is_here]
    items = np.unique(item_of_token)
    starts = np.array([0, *accumulate(num_tokens_of_items)], dtype=np.int64)
    starts_here = np.array([0, *accumulate(num_tokens_of_items[item] for item in items)], dtype=np.int64)
    moved = starts_here[np.searchsorted(items, item_of_token)] - starts[item_of_token]
    return HeldItems(places[is_here], items, np.flatnonzero(is_here) + moved)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldBatches:
    """What a rank computes on in a step."""

    batches: StepBatches
    """[M, t] of each kind; vision tokens, pixels and items that it holds. Documents are whole."""
    feature_rows: Tensor
    """[V] int32, which row of its micro-batch's features each vision token takes; [0] where all are taken in
    order."""
    shares: tuple[ContextShare | WholeShare, ...]
    """[micro-batch] -> what the rank holds of it."""

    @property
    def is_shared(self) -> bool:
        """Whether other ranks hold parts of the micro-batches."""
        return any(isinstance(share, ContextShare) for share in self.shares)

    def tensors(self) -> list[Tensor]:
        """All tensors, in the order in which `with_tensors` takes them."""
        return [*self.batches.tensors(), self.feature_rows]

    def with_tensors(self, tensors: Sequence[Tensor]) -> "HeldBatches":
        """The same with its tensors elsewhere."""
        *of_batches, feature_rows = tensors
        return replace(self, batches=self.batches.with_tensors(of_batches), feature_rows=feature_rows)


class Context(Protocol):
    """Which part of each micro-batch a rank computes: `WholeContext` or `SharedContext`."""

    def held(self, batches: StepBatches) -> HeldBatches:
        """The rank's part of the micro-batches of a step."""


class WholeContext:
    """All of it: no other rank shares the micro-batches (cp = 1)."""

    def held(self, batches: StepBatches) -> HeldBatches:
        """The micro-batches as they are."""
        shares = (WholeShare(),) * len(batches.documents)
        return HeldBatches(batches=batches, feature_rows=torch.zeros(0, dtype=torch.int32), shares=shares)


class SharedContext:
    """The tokens that `plan_context` gives to one of the ranks that share the micro-batches."""

    def __init__(self, cp_rank: int, cp_size: int) -> None:
        """`cp_rank` is this rank's place among the `cp_size` that share its micro-batches."""
        self._cp_rank = cp_rank
        self._cp_size = cp_size

    def held(self, batches: StepBatches) -> HeldBatches:
        """See `Context`. Of what the rank has not read there is still nothing."""
        plans = tuple(context_plan(each, self._cp_size) for each in batches.documents)
        positions = [plan.positions(self._cp_rank) for plan in plans]
        # 1. Tokens, and what is said of each.
        where = torch.from_numpy(np.stack(positions))
        of_tokens = (
            batches.tokens, batches.labels, batches.loss_mask, batches.source, batches.responses,
        )  # fmt: skip
        tokens, labels, loss_mask, source, responses = (
            each.gather(1, where) if each.shape[1] else each for each in of_tokens
        )
        policy = batches.policy
        if policy.numel():
            policy = policy.gather(2, where[:, None].expand(-1, policy.shape[1], -1))
        # 2. Vision tokens, and the items to encode for them.
        split = batches.media_positions.split(batches.num_media_positions)
        held = [
            held_items(media.long().numpy(), _num_tokens_of_items(documents, len(media)), own)
            for media, documents, own in zip(split, batches.documents, positions, strict=True)
        ]
        return HeldBatches(
            batches=replace(
                batches,
                tokens=tokens,
                labels=labels,
                loss_mask=loss_mask,
                source=source,
                policy=policy,
                responses=responses,
                media_positions=_joined([each.positions for each in held]),
                num_media_positions=tuple(len(each.positions) for each in held),
                pixels=_pixels_of(batches, held) if batches.has_pixels else batches.pixels,
                documents=tuple(map(_with_items, batches.documents, held)),
            ),
            feature_rows=_joined([each.rows for each in held]),
            shares=tuple(
                ContextShare(replace(plan, padding=frozenset(each.padding)), self._cp_rank)
                for plan, each in zip(plans, batches.documents, strict=True)
            ),
        )


def context_of(cp_rank: int, cp_size: int) -> Context:
    """What a rank computes, of `cp_size` that share their micro-batches."""
    return SharedContext(cp_rank, cp_size) if cp_size > 1 else WholeContext()


def _num_tokens_of_items(documents: Documents, num_media: int) -> list[int]:
    """Tokens of each item; none where the words, and so their positions, are not read."""
    return [grid.num_tokens for grid in documents.grid_thw] if num_media else []


def _with_items(documents: Documents, held: HeldItems) -> Documents:
    """The documents with the items that a rank holds a token of."""
    return documents._replace(
        grid_thw=tuple(documents.grid_thw[item] for item in held.items),
        item_documents=tuple(documents.item_documents[item] for item in held.items),
    )


def _pixels_of(batches: StepBatches, held: Sequence[HeldItems]) -> Tensor:
    """The patches [P, 3*p*p] of the items that this rank encodes."""
    found, first = [], 0
    for documents, own in zip(batches.documents, held, strict=True):
        starts = [0, *accumulate(grid.num_patches for grid in documents.grid_thw)]
        found += [batches.pixels[first + starts[item] : first + starts[item + 1]] for item in own.items]
        first += starts[-1]
    return torch.cat(found) if found else batches.pixels[:0]


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(torch.int32)
