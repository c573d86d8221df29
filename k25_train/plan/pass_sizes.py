"""The sizes of a micro-batch, for which memory and time of a pass are planned; torch-free."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from k25_train.config.schema import Config
from k25_train.config.vision import VisionPart
from k25_train.plan.assumptions import AS_CONFIGURED, Assumptions
from k25_train.plan.batch_sizes import causal_pairs
from parallel.config import ContextExchange

if TYPE_CHECKING:
    from parallel.context.plan import ContextPlan

FEWEST_DOCUMENTS = 32
"""Documents that there is room for in any micro-batch where a kernel's plan depends on their number. Source:
Transformer Engine 2.20 fills up to as many itself (`fused_attn/utils.cu`, `get_max_batch_size`)."""


def document_room(num_documents: int) -> int:
    """How many documents there is room for: powers of two, of which few occur."""
    return max(FEWEST_DOCUMENTS, 1 << (num_documents - 1).bit_length())


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSizes:
    """The sizes of a micro-batch."""

    documents: tuple[int, ...]
    """Tokens of each document of all its sequences; padding is in the place of one."""
    padding_tokens: int
    """Tokens that are padding, which goes to no expert."""
    num_sequences: int
    """Sequences of the micro-batch."""
    expert_rows: int
    """Tokens that arrive at the experts of one rank in one layer, at least 1; a token that goes to several of
    these experts counts as often."""
    local_experts: int
    """Routed experts of a layer on one rank."""
    patches: int
    """Patches that a trained tower in the first chunk encodes; 0 if there is none."""
    vision_tokens: int
    """Vision tokens that a trained projector in the first chunk makes; 0 if there is none."""
    cp: int = 1
    """Ranks that share the tokens of these documents evenly; all other fields are one rank's."""
    exchange: ContextExchange = ContextExchange.ring
    """How they get each other's latents; of no account where a rank has all tokens."""

    @property
    def all_tokens(self) -> int:
        """Tokens of the micro-batch on all ranks that share it, padding included."""
        return sum(self.documents)

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch on one rank, padding included."""
        return -(-self.all_tokens // self.cp)

    @property
    def token_pairs(self) -> int:
        """Pairs of a token and one of its document up to itself, of the rank that has the most."""
        if self.cp == 1:
            return causal_pairs(self.documents)
        shared = self._shared
        return max(map(shared.num_pairs, range(self.cp)))

    @property
    def num_blocks(self) -> int:
        """Blocks of keys that a rank attends to one after another."""
        return self.cp if self.exchange is ContextExchange.ring else 1

    @property
    def made_keys(self) -> int:
        """Tokens whose keys and values a rank makes in a pass, of the rank that makes the most: each piece of
        a document needs those of the document up to its end."""
        if self.cp == 1:
            return self.tokens
        return max(sum(piece.stop for piece in pieces) for pieces in self._shared.pieces)

    @property
    def held_keys(self) -> int:
        """Of these, as many as it has at a time. Of its own block, the later half of its tokens attends to
        all, the earlier one to itself."""
        return self.made_keys if self.num_blocks == 1 else min(self.made_keys, 3 * self.tokens // 2)

    @property
    def block_tokens(self) -> int:
        """Tokens whose latents a rank has at a time: all of the micro-batch's, or those of one rank."""
        return self.all_tokens // self.num_blocks

    @property
    def _shared(self) -> "ContextPlan":
        # It imports numpy, which takes longer than most plans.
        from parallel.context.plan import plan_context

        return plan_context(self.documents, (), self.cp)


def balanced_sizes(config: Config, assumptions: Assumptions = AS_CONFIGURED) -> PassSizes:
    """A micro-batch whose tokens are spread over experts as assumed; no more than all tokens arrive."""
    even = _tokens(config) * config.model.num_experts_per_token
    largest = largest_sizes(config, assumptions).expert_rows
    expert_rows = min(round(even * assumptions.expert_imbalance), largest)
    return _pass_sizes(config, assumptions, expert_rows, assumptions.vision_share, num_frames=1)


def largest_sizes(config: Config, assumptions: Assumptions = AS_CONFIGURED) -> PassSizes:
    """A micro-batch of which all tokens are of the longest video chunks, and go to as many of one rank's
    experts as they can."""
    local_experts = config.model.num_experts // config.parallelism.ep
    each = min(config.model.num_experts_per_token, local_experts)
    expert_rows = config.parallelism.ep * _tokens(config) * each
    return _pass_sizes(config, assumptions, expert_rows, 1.0, config.model.vision.pos_emb_time)


def _tokens(config: Config) -> int:
    """Tokens of a micro-batch on one rank."""
    return -(-config.train.micro_batch_size * config.train.seq_len // config.parallelism.cp)


def _pass_sizes(
    config: Config, assumptions: Assumptions, expert_rows: int, vision_share: float, num_frames: int
) -> PassSizes:
    train, trained_parts = config.train, config.vision_placement.trained_first_stage_parts
    vision_tokens = math.ceil(vision_share * _tokens(config))
    patches = vision_tokens * num_frames * config.model.vision.merge_size**2
    return PassSizes(
        documents=_documents(train.seq_len, assumptions.document_tokens) * train.micro_batch_size,
        padding_tokens=0,
        num_sequences=train.micro_batch_size,
        expert_rows=max(expert_rows, 1),
        local_experts=config.model.num_experts // config.parallelism.ep,
        patches=patches if VisionPart.tower in trained_parts else 0,
        vision_tokens=vision_tokens if VisionPart.projector in trained_parts else 0,
        cp=config.parallelism.cp,
        # Where nothing is chosen yet (`plan/context.py`), what needs the least memory.
        exchange=config.parallelism.cp_exchange or ContextExchange.ring,
    )


def _documents(seq_len: int, document_tokens: int | None) -> tuple[int, ...]:
    """Lengths of a sequence's documents: all alike but the last, which fills the sequence."""
    each = min(document_tokens or seq_len, seq_len)
    rest = seq_len % each
    return (each,) * (seq_len // each) + ((rest,) if rest else ())
