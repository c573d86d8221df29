"""How often a token crosses the network on its way to its experts, by dispatcher; torch-free."""

import math

from k25_train.config.schema import Config
from parallel.dispatcher import Dispatcher

EXCHANGES = 4
"""Of a layer and micro-batch: tokens and outputs forward, their gradients backward."""


def copies(config: Config, num_places: int, dispatcher: Dispatcher, *, routes_in_turn: bool = False) -> float:
    """Copies of a token that its experts' places get, on average over balanced routing.

    Args:
        config: how many experts there are, and how many a token has.
        num_places: ranks or nodes over which the experts of a layer are spread evenly.
        dispatcher: says whether there is one for each expert, or one for each place with any.
        routes_in_turn: see `OtherCode`.
    """
    num_experts, chosen = config.model.num_experts, config.model.num_experts_per_token
    if not dispatcher.sends_once_per_node:
        return chosen
    per_place = num_experts // num_places
    if routes_in_turn:
        firsts = range(0, num_experts, chosen)
        return sum((each + chosen - 1) // per_place - each // per_place + 1 for each in firsts) / len(firsts)
    nowhere = math.comb(num_experts - per_place, chosen) / math.comb(num_experts, chosen)
    return num_places * (1 - nowhere)


def copies_elsewhere(
    config: Config, num_places: int, dispatcher: Dispatcher, *, routes_in_turn: bool = False
) -> float:
    """Those of them that leave the place where the token is."""
    in_all = copies(config, num_places, dispatcher, routes_in_turn=routes_in_turn)
    return in_all * (num_places - 1) / num_places
