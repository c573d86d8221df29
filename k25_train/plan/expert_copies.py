"""How often a token crosses the network on its way to its experts, by dispatcher; torch-free."""

import math

from k25_train.config.schema import Config
from k25_train.plan.weight_bytes import WEIGHT_BYTES
from parallel.dispatcher import Dispatcher

EXCHANGES = 4
"""Of a layer and micro-batch: tokens and outputs forward, their gradients backward."""


def copies(config: Config, num_places: int, dispatcher: Dispatcher) -> float:
    """Copies of a token that its experts' places get, on average over balanced routing.

    Args:
        num_places: ranks or nodes over which the experts of a layer are spread evenly.
        dispatcher: says whether there is one for each expert, or one for each place with any.
    """
    num_experts, chosen = config.model.num_experts, config.model.num_experts_per_token
    if not dispatcher.sends_once_per_node:
        return chosen
    per_place = num_experts // num_places
    nowhere = math.comb(num_experts - per_place, chosen) / math.comb(num_experts, chosen)
    return num_places * (1 - nowhere)


def copies_elsewhere(config: Config, num_places: int, dispatcher: Dispatcher) -> float:
    """Those of them that leave the place where the token is."""
    return copies(config, num_places, dispatcher) * (num_places - 1) / num_places


def bytes_between_nodes(config: Config, dispatcher: Dispatcher) -> float:
    """What a rank sends to other nodes in a step, of tokens on their way to experts and back."""
    # Ranks of a group are neighbours (`parallel/topology.py`).
    num_nodes = max(1, config.parallelism.ep // config.cluster.gpus_per_node)
    tokens = config.train.global_batch_size * config.train.seq_len
    width = config.model.hidden_size * WEIGHT_BYTES[config.train.dtype]
    rows = tokens * config.model.num_moe_layers * copies_elsewhere(config, num_nodes, dispatcher)
    return EXCHANGES * rows * width / config.world_size
