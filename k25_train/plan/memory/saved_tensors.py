"""Which tensors a forward pass leaves for its backward pass, from the configuration alone; torch-free.

What kernels keep for themselves differs between devices, see `Kernels`. For the CPU this list is held against
what autograd saves, tensor by tensor (tests/unit/plan/test_activations.py).

Shapes: T tokens of a micro-batch, L of a document, D hidden, H heads, Q and V widths of a head's query and
value, F of a feed-forward part, E experts of a layer, k of a token, R rows that arrive at a rank's experts.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import prod

from k25_train.config.basics import DType
from k25_train.config.model import ModelConfig
from k25_train.plan.memory.attention_saves import attention_outputs, document_boundaries, normed_heads
from k25_train.plan.memory.kernels import AttentionKernel, Kernels
from k25_train.plan.memory.latents import latent_width
from k25_train.plan.memory.saved_tensor import (
    BOOL_BYTES,
    COMPLEX_BYTES,
    FLOAT_BYTES,
    INDEX_BYTES,
    SavedTensor,
    exact,
)
from k25_train.plan.pass_sizes import PassSizes
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from parallel.activations.policy import Policy


class SavedTensors:
    """Lists what each part of a chunk saves, under a choice of policies.

    The choice matters to the list: what is made again needs its inputs, and saves nothing inside.
    """

    def __init__(
        self,
        model: ModelConfig,
        dtype: DType,
        kernels: Kernels,
        policies: Mapping[str, Policy],
        sizes: PassSizes,
    ) -> None:
        self._model, self._kernels, self._policies, self._sizes = model, kernels, policies, sizes
        self._element_bytes = WEIGHT_BYTES[dtype]
        self._is_float32 = dtype is DType.float32

    def layer(self, *, is_moe: bool) -> list[SavedTensor]:
        """What a decoder layer saves."""
        return [*self._attention(), *(self._moe() if is_moe else self._dense())]

    def layer_input(self) -> list[SavedTensor]:
        """What is left of a layer that runs again before its backward pass."""
        return [self._named("norm.input", (self._sizes.tokens, 1, self._model.hidden_size))]

    def mtp(self, *, is_moe: bool, runs_again: bool) -> list[SavedTensor]:
        """What a layer of multi-token prediction saves: norms of features and of the next token's embedding,
        both joined, a decoder layer, the last norm and logits of its own."""
        tokens, hidden = self._sizes.tokens, self._model.hidden_size
        if runs_again:
            return [*self.layer_input(), *self.layer_input(), *self.last_chunk()]
        joined = self._named("rest", (tokens, 1, 2 * hidden))
        norms = [
            each for _ in range(2) for each in self._norm("norm.input", "norm.output", (tokens, 1, hidden))
        ]
        return [*norms, joined, *self.layer(is_moe=is_moe), *self.last_chunk()]

    def every_chunk(self, layers: Iterable[int]) -> list[SavedTensor]:
        """What all layers of a chunk, counted from 0, save only once: the turns of the rotary pairs; where
        documents begin; and which tokens are padding, which the balance loss leaves out."""
        tokens, found = self._sizes.tokens, []
        has_experts = [self._model.is_moe(layer) for layer in layers]
        if has_experts:
            shape = (tokens, 1, self._model.qk_rope_head_dim // 2)
            found.append(exact("mla.rotations", shape, COMPLEX_BYTES))
            found += document_boundaries(self._kernels.attention, self._sizes)
        if any(has_experts) and self._model.balance_loss_coeff:
            found.append(exact("router.scores", (tokens, 1), BOOL_BYTES))
        return found

    def first_chunk(self) -> list[SavedTensor]:
        """Token ids, and what vision in the first chunk saves at most. Positions of vision tokens, 8 bytes
        each, are not counted."""
        return [exact("rest", (1, self._sizes.tokens), INDEX_BYTES), *self._tower(), *self._projector()]

    def last_chunk(self) -> list[SavedTensor]:
        """What the final norm and the loss save."""
        tokens = self._sizes.tokens
        return [
            *self._norm("norm.input", "norm.output", (tokens, 1, self._model.hidden_size)),
            *self._logits(),
            exact("head.logits", (tokens,), INDEX_BYTES),
        ]

    def _logits(self) -> Iterator[SavedTensor]:
        """None where pieces of them are made again, from the last norm's output and labels."""
        if not self._recomputes("head.logits"):
            yield exact("head.logits", (self._sizes.tokens, self._model.vocab_size), self._element_bytes)

    def _attention(self) -> Iterator[SavedTensor]:
        model, tokens = self._model, self._sizes.tokens
        heads, width = model.num_attention_heads, model.q_head_dim
        pads_values = self._kernels.attention.pads_values
        value_width = width if pads_values else model.v_head_dim
        yield from self._norm("norm.input", "norm.output", (tokens, 1, model.hidden_size))
        if model.has_latent_attention:
            yield from self._latents()
        else:
            yield from normed_heads(model, tokens, self._element_bytes)
        if self._sizes.cp > 1:
            yield from self._over_shared_sequences()
            return
        if pads_values and self._recomputes("mla.up_proj"):
            yield self._made("mla.up_proj", (tokens, heads, model.v_head_dim))
        pairs = model.num_key_value_heads or heads
        for held, last in ((heads, width), (pairs, width), (pairs, value_width)):
            yield self._made("mla.up_proj", (tokens, held, last))
        kernel = self._kernels.attention
        yield from attention_outputs(kernel, self._sizes, heads, value_width, self._element_bytes)
        if kernel is not AttentionKernel.transformer_engine:
            yield self._made("attention.joined", (tokens, heads * model.v_head_dim))
        yield from self._norm("norm.input", "norm.output", (tokens, 1, model.hidden_size))

    def _over_shared_sequences(self) -> Iterator[SavedTensor]:
        """Attention where ranks share sequences: the rank's queries and latents, its output and sums'
        logarithms; keys and values are made again, of whichever rank's tokens."""
        model, tokens = self._model, self._sizes.tokens
        heads = model.num_attention_heads
        yield self._made("mla.up_proj", (tokens, heads, model.q_head_dim))
        yield self._made("mla.up_input", (tokens, latent_width(model)))
        yield exact("attention.output", (tokens, heads, model.v_head_dim), self._element_bytes)
        yield exact("attention.output", (tokens, heads), FLOAT_BYTES)
        yield from self._norm("norm.input", "norm.output", (tokens, 1, model.hidden_size))

    def _latents(self) -> Iterator[SavedTensor]:
        """Norms of the compressed query and key-value of latent attention."""
        model, tokens = self._model, self._sizes.tokens
        # A query that is not compressed is projected from the first norm's output, as the key-value is.
        latent, is_shared = model.key_value_widths[-2], self._sizes.cp > 1
        for compressed in model.query_widths[1:-1]:
            yield from self._norm("mla.latent", "mla.up_input", (tokens, compressed))
        yield from self._norm(
            "mla.latent",
            "mla.up_input",
            (tokens, latent),
            # The rotary key is in the same tensor as the compressed key-value, and recomputed keys need it.
            read_from=(tokens, latent + model.qk_rope_head_dim),
            has_other_reader=self._recomputes("mla.up_proj") and not is_shared,
            # Latents are copies.
            is_read=not is_shared or self._recomputes("mla.up_input"),
        )

    def _dense(self) -> Iterator[SavedTensor]:
        yield from self._swiglu("dense", self._model.dense_ffn_hidden_size)

    def _moe(self) -> Iterator[SavedTensor]:
        model = self._model
        if model.num_shared_experts:
            yield from self._swiglu("shared_expert", model.num_shared_experts * model.expert_ffn_hidden_size)
        yield from self._router()
        yield from self._dispatch()
        yield from self._experts()

    def _swiglu(self, part: str, width: int) -> Iterator[SavedTensor]:
        tokens, inner = self._sizes.tokens, f"{part}.down_input"
        yield self._named(f"{part}.swiglu_input", (tokens, 1, 2 * width))
        if not (self._recomputes(inner) or self._kernels.swiglu_is_fused):
            yield exact(inner, (tokens, 1, width), self._element_bytes)
        yield self._made(inner, (tokens, 1, width))

    def _router(self) -> Iterator[SavedTensor]:
        """Scores, choice and weights, and again for the balance loss."""
        tokens, experts, chosen = (
            self._sizes.tokens,
            self._model.num_experts,
            self._model.num_experts_per_token,
        )
        scores, choice, total = (tokens, experts), (tokens, chosen), (tokens, 1)
        yield exact("router.scores", scores, FLOAT_BYTES)
        yield exact("router.scores", choice, INDEX_BYTES)
        if chosen > 1:
            yield exact("router.scores", total, FLOAT_BYTES)
            yield exact("router.scores", choice, FLOAT_BYTES)
        if self._model.balance_loss_coeff:
            yield exact("router.scores", scores, FLOAT_BYTES)
            yield exact("router.scores", total, FLOAT_BYTES)
            yield exact("router.scores", choice, INDEX_BYTES)
            yield exact("router.scores", (self._sizes.num_sequences, experts), FLOAT_BYTES)
            yield exact("router.scores", (), FLOAT_BYTES)

    def _dispatch(self) -> Iterator[SavedTensor]:
        """Which pairs of a token and an expert are sent, twice, where each token's begin, how received rows
        are sorted and put back; and where each expert's rows end."""
        model, tokens, local = self._model, self._sizes.tokens, self._sizes.local_experts
        is_fused, index_bytes = self._kernels.permutation_is_fused, INDEX_BYTES
        if is_fused:
            index_bytes = 4
            yield exact("rest", (tokens, 2 * model.num_experts + 1), index_bytes)
        else:
            sent = ((tokens - self._sizes.padding_tokens) * model.num_experts_per_token,)
            yield exact("rest", sent, index_bytes)
            yield exact("rest", sent, index_bytes)
            yield exact("rest", (tokens,), index_bytes)
        if 1 < local < model.num_experts:
            yield exact("rest", (self._sizes.expert_rows,), index_bytes)
            yield exact("rest", (self._sizes.expert_rows,), index_bytes)
        yield exact("rest", (local,), 4)

    def _experts(self) -> Iterator[SavedTensor]:
        rows, width = self._sizes.expert_rows, self._model.expert_ffn_hidden_size
        yield self._named("moe.up_input", (rows, self._model.hidden_size))
        yield self._named("moe.swiglu_input", (rows, 2 * width))
        is_fused = self._kernels.swiglu_is_fused
        if is_fused or self._recomputes("moe.down_input") or self._is_float32:
            yield exact("moe.probs", (rows,), FLOAT_BYTES)
        if not (is_fused or self._recomputes("moe.down_input")):
            if not self._is_float32:
                yield exact("moe.down_input", (rows, 1), self._element_bytes)
            # SiLU of the gates, and SwiGLU without the router's weights.
            yield exact("moe.down_input", (rows, width), self._element_bytes)
            yield exact("moe.down_input", (rows, width), self._element_bytes)
        yield self._made("moe.down_input", (rows, width))

    def _tower(self) -> Iterator[SavedTensor]:
        """A bound, in sum: how many tensors there are, and whether one is a view, depends on the items."""
        vision, patches = self._model.vision, self._sizes.patches
        width, heads = vision.hidden_size, vision.num_attention_heads
        if not patches:
            return
        # A block saves input and output of both norms, the joint projection of queries, keys and values,
        # rotated queries and keys, attention's output, the same joined unless one call made all of it, and
        # both sides of GELU.
        is_one_call = self._kernels.vision_attention is AttentionKernel.varlen
        block = (10 if is_one_call else 11) * width + 2 * vision.ffn_hidden_size
        yield exact("vision.encoder", (vision.num_layers * patches, block), self._element_bytes)
        # Statistics of two norms, and the attention kernel's.
        yield exact("vision.encoder", (vision.num_layers * patches, 4 + heads), FLOAT_BYTES)
        yield exact("vision.encoder", (patches, width // heads // 2), COMPLEX_BYTES)
        # The last norm's, whose input lies with the pixels in the line below.
        yield exact("vision.encoder", (patches, 2), FLOAT_BYTES)
        pixels = 3 * vision.patch_size**2
        yield exact("vision.encoder", (patches, pixels + width), self._element_bytes)

    def _projector(self) -> Iterator[SavedTensor]:
        """Its norm's input, and what its two matrices and GELU read."""
        vision, tokens = self._model.vision, self._sizes.vision_tokens
        if tokens:
            yield exact("vision.encoder", (tokens, 4 * vision.merged_size), self._element_bytes)
            yield exact("vision.encoder", (tokens, 2 * vision.merge_size**2), FLOAT_BYTES)

    def _norm(
        self,
        inputs: str,
        outputs: str,
        shape: tuple[int, ...],
        *,
        read_from: tuple[int, ...] | None = None,
        has_other_reader: bool = False,
        is_read: bool = True,
    ) -> Iterator[SavedTensor]:
        """A norm of `shape`; its input is a view of `read_from`, always saved if it `has_other_reader`. Its
        output is saved by what reads it, if anything does."""
        fused, is_made_again = self._kernels.norm_is_fused, self._recomputes(outputs)
        if fused or is_made_again or self._is_float32 or has_other_reader:
            yield self._named(inputs, read_from or shape)
        if not is_made_again:
            yield exact(outputs, (*shape[:-1], 1), FLOAT_BYTES)
            if not fused:
                yield exact(outputs, shape, FLOAT_BYTES)
            if not fused and not self._is_float32:
                yield exact(outputs, shape, FLOAT_BYTES)
        if is_read:
            yield self._made(outputs, shape)

    def _recomputes(self, name: str) -> bool:
        return self._policies[name] is Policy.recompute

    def _named(self, name: str, shape: tuple[int, ...], *, is_made_again: bool = False) -> SavedTensor:
        num_bytes = prod(shape) * self._element_bytes
        return SavedTensor(
            name=name,
            shape=shape,
            num_bytes=num_bytes,
            memory_bytes=num_bytes,
            may_be_rounded=len(shape) > 1,
            is_made_again=is_made_again,
        )

    def _made(self, name: str, shape: tuple[int, ...]) -> SavedTensor:
        return self._named(name, shape, is_made_again=self._recomputes(name))
