"""The tiny model with random weights, for tests that run on a rank of `tests.helpers.ranks`.

Imports megatron-core only inside the functions: the process that collects the tests does without it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.ranks import RankContext

LENGTHS = (20, 1, 33, 10)
"""Documents of a micro-batch of one sequence of 64 tokens."""


def build_random_model(context: RankContext, **model_overrides: Any) -> Any:
    """The tiny model on one rank with random weights, matrices large enough to tell things apart."""
    from k25_train.model.weights import initialize
    from tests.helpers.hf_reference import tiny_model_config
    from tests.helpers.model_chunks import SERIAL, WHOLE_MODEL, build_whole_model, start, train_config

    config = tiny_model_config(**model_overrides)
    model = build_whole_model(config, train_config(), start(context, SERIAL, config.num_layers))
    initialize(model, WHOLE_MODEL, seed=5, std=0.1)
    return model


def random_tokens(num: int, seed: int = 3) -> Tensor:
    return torch.randint(0, 240, (num,), generator=torch.Generator().manual_seed(seed))


def documents(lengths: tuple[int, ...] = LENGTHS, padding: tuple[int, ...] = ()) -> Any:
    from k25_train.model.packed_documents import PackedDocuments

    return PackedDocuments.of(lengths, torch.device("cpu"), padding)


def modules_of(model: torch.nn.Module, name: str) -> Iterator[Any]:
    """The modules of the class called `name`."""
    return (module for module in model.modules() if type(module).__name__ == name)


def expert_loop(tokens: Tensor, counts: list[int], weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Reference: each token through its own expert, one expert after another."""
    width = down.shape[2]
    outputs = []
    for expert, part in enumerate(tokens.split(counts)):
        gate, up = part @ gate_up[expert, :width].T, part @ gate_up[expert, width:].T
        scale = weights.split(counts)[expert][:, None]
        outputs.append((F.silu(gate) * up * scale) @ down[expert].T)
    return torch.cat(outputs)
