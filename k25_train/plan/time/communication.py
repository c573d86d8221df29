"""Bytes that all ranks of a job send to each other in one training step, by kind; torch-free.

Counted here is what the mechanisms need: megatron-core pads each tensor of a gradient buffer to 64 elements
and the buffer to a multiple of 128 and of the ranks, and a few numbers per step (losses, token counts, the
gradient norm) are reduced in addition. Sequences are full: padding would go to no expert. What a decoupled
encoder sends depends on the images: of each vision token a feature and its gradient, `hidden_size` numbers
each in `dep.exchange_dtype`; and of each patch of an item that n ranks encode (`dep.split_items`), in each
layer, its keys and values, twice, and their gradients, each n - 1 times. A frozen tower is sent no gradient,
and its features are `merged_size` wide if the projector is trained. All of it is compared with what ranks
send: tests/distributed/{test_communication,test_dep_split}.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from k25_train.config.optimizer import OptimName
from k25_train.config.schema import Config
from k25_train.parameters.megatron import TrainedParameter
from k25_train.parameters.update_rules import rule_of
from k25_train.plan.expert_copies import EXCHANGES, copies, copies_elsewhere
from k25_train.plan.memory.latents import latent_width
from k25_train.plan.optimizer import encoder_parameters, updated_parameters
from k25_train.plan.weight_bytes import GRADIENT_BYTES, WEIGHT_BYTES

ROUTING_WEIGHT_BYTES = 4
"""The router works in float32."""
TOKEN_COUNT_BYTES = 8
"""Numbers of tokens are exchanged as int64 ahead of the tokens."""
LOAD_BYTES = 8
"""Tokens of each expert in the global batch, which move its bias, are counted in float64."""


@dataclass(frozen=True, slots=True)
class Volume:
    """Bytes of one kind of communication in one step, all ranks together."""

    payload_bytes: float
    """Bytes that the calls work on: a message; the whole buffer of a reduction or a gathering, once for each
    rank in it; all rows of an exchange, those that stay included."""
    sent_bytes: float
    """Bytes that leave ranks. Of a buffer over n ranks each sends (n - 1) / n, as a ring does, and of a
    reduction to all twice as much; of an exchange the expected value under balanced routing. Of matrices at
    most: what their owners hold of them stays."""


def communication(config: Config) -> dict[str, Volume]:
    """Kind -> volume, of the kinds that the layout has.

    `pipeline`: activations forward and their gradients backward, between stages. `all-to-all`: tokens to
    their experts and back, forward and backward. `all-to-all of weights`: the router's weight of each of
    these, forward and backward. `reduce-scatter`: gradients over data-parallel ranks, float32. `all-gather`:
    updated parameters. `latents`: of tokens of ranks that share sequences, forward and backward, and their
    float32 gradients. `matrices`: pieces of momentum to the owners that orthogonalise them, and of updates
    back (Muon). `bookkeeping`: how many tokens each expert gets, and of each shared sequence, the update of
    the routers' biases, the largest attention logits, for QK-Clip, and the load of every expert, for the
    metrics.
    """
    kinds = {
        "pipeline": _pipeline(config),
        **_expert_exchange(config),
        "latents": _latents(config),
        "reduce-scatter": _over_replicas(config, GRADIENT_BYTES),
        "all-gather": _over_replicas(config, WEIGHT_BYTES[config.train.dtype]),
        "matrices": _matrices(config),
        "bookkeeping": _bookkeeping(config),
    }
    return {kind: volume for kind, volume in kinds.items() if volume.sent_bytes}


def _pipeline(config: Config) -> Volume:
    """A message of [tokens, hidden] from each chunk to the next, and one back, for every micro-batch."""
    sizes = config.parallelism
    num_borders = sizes.pp * sizes.vpp - 1 if sizes.pp > 1 else 0
    message = _tokens(config) * config.model.hidden_size * WEIGHT_BYTES[config.train.dtype]
    total = 2 * num_borders * message * config.num_micro_batches * config.dp
    return Volume(total, total)


def _expert_exchange(config: Config) -> dict[str, Volume]:
    """Each token goes to `num_experts_per_token` experts and back, and its gradient the same way; with other
    dispatchers than `alltoall` once to each rank that has any of them."""
    sizes = config.parallelism
    # A group of one moves nothing.
    leaving = copies_elsewhere(config, sizes.ep, sizes.dispatcher)
    in_all = copies(config, sizes.ep, sizes.dispatcher)
    tokens = _moe_passes(config) * _tokens(config)
    hidden = config.model.hidden_size * WEIGHT_BYTES[config.train.dtype]
    each = {"all-to-all": EXCHANGES * hidden, "all-to-all of weights": 2 * ROUTING_WEIGHT_BYTES}
    return {name: Volume(tokens * in_all * size, tokens * leaving * size) for name, size in each.items()}


def _latents(config: Config) -> Volume:
    """The latent of each token goes to all other ranks that share its sequence, in each layer, twice; the
    gradient that each of them has for it comes back."""
    ranks, model = config.parallelism.cp, config.model
    element = WEIGHT_BYTES[config.train.dtype]
    each = latent_width(model) * (2 * element + GRADIENT_BYTES)
    passes = model.num_layers * config.num_micro_batches * config.dp
    gathered = passes * _tokens(config) * each
    return Volume(gathered * ranks if ranks > 1 else 0, gathered * (ranks - 1))


def _over_replicas(config: Config, bytes_per_weight: int) -> Volume:
    """One buffer per rank, of trained weights: dense ones over all replicas, the rank's experts over the
    replicas of these, a decoupled encoder's over all ranks."""
    total = sum(parameter.size for parameter in updated_parameters(config))
    experts = sum(parameter.size for parameter in updated_parameters(config) if parameter.is_expert)
    encoder = sum(parameter.size for parameter in encoder_parameters(config))
    dense = total - experts - encoder
    payload = sent = 0.0
    for num_weights, num_replicas in (
        (dense, config.dp_cp),
        (experts, config.expert_dp),
        (encoder, config.world_size),
    ):
        if num_replicas > 1:
            payload += num_weights * bytes_per_weight * num_replicas
            sent += num_weights * bytes_per_weight * (num_replicas - 1)
    return Volume(payload, sent)


def _matrices(config: Config) -> Volume:
    """Every matrix goes to its owner once and its update back, experts too: owners are sought among all
    data-parallel ranks, of an encoder's matrices among all ranks."""
    of_encoder = _muon_elements(config, encoder_parameters(config))
    elements = of_encoder if config.world_size > 1 else 0
    if config.dp_cp > 1:
        elements += _muon_elements(config, updated_parameters(config)) - of_encoder
    total = 2 * elements * WEIGHT_BYTES[config.optim.muon.exchange_dtype]
    return Volume(total, total)


def _muon_elements(config: Config, parameters: Iterable[TrainedParameter]) -> int:
    return sum(
        parameter.size
        for parameter in parameters
        if rule_of(*parameter, config.optim, config.model).update is OptimName.muonclip
    )


def _bookkeeping(config: Config) -> Volume:
    ep, cp, dp, model = config.parallelism.ep, config.parallelism.cp, config.dp_cp, config.model
    # A replica's ranks have as many passes together as one rank that has all of its tokens.
    counts = _moe_passes(config) * cp * ep * model.num_experts * TOKEN_COUNT_BYTES if ep > 1 else 0
    shared = _moe_passes(config) * cp * config.train.micro_batch_size * (model.num_experts + 1)
    shared *= TOKEN_COUNT_BYTES if cp > 1 and model.balance_loss_coeff else 0
    biases = model.num_moe_layers * dp * model.num_experts * LOAD_BYTES if dp > 1 else 0
    world = config.world_size
    # Those of a step that is sampled.
    is_clipped = config.optim.qk_clip_threshold is not None and world > 1
    maxima = world * model.num_layers * model.num_attention_heads * 4 if is_clipped else 0
    # Of all layers' experts, with their largest biases before and after: how evenly they are loaded.
    loads = world * model.num_layers * (model.num_experts + 2) * LOAD_BYTES if world > 1 else 0
    of_all = maxima + loads
    sent = counts * (ep - 1) / ep + biases * 2 * (dp - 1) / dp + of_all * 2 * (world - 1) / world
    sent += shared * 2 * (cp - 1) / cp
    return Volume(counts + biases + of_all + shared, sent)


def _tokens(config: Config) -> int:
    """Tokens of a micro-batch."""
    return config.train.micro_batch_size * config.train.seq_len


def _moe_passes(config: Config) -> int:
    """How often a micro-batch passes a layer with experts, over all replicas."""
    return config.model.num_moe_layers * config.num_micro_batches * config.dp
