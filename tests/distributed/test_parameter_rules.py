"""The rules of the parameters that a model really has: each has one, and its matrices are the true ones."""

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.tiny_model import build_random_model

pytestmark = pytest.mark.distributed


def parameters_of_the_tiny_model(context: RankContext) -> dict[str, Tensor]:
    model = build_random_model(context)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def built() -> dict[str, Tensor]:
    return run_ranks(parameters_of_the_tiny_model, 1)[0]


def test_the_plan_lists_what_is_built(built: dict[str, Tensor]) -> None:
    from k25_train.parameters.megatron import iterate_parameters
    from tests.helpers.hf_reference import tiny_model_config

    listed = {parameter.name: parameter.shape for parameter in iterate_parameters(tiny_model_config())}
    assert {name: tuple(parameter.shape) for name, parameter in built.items()} == listed


@pytest.mark.parametrize("per_head", [False, True])
def test_each_matrix_of_muon_is_one_of_the_checkpoint(built: dict[str, Tensor], per_head: bool) -> None:
    """Blocks of rows, as Muon cuts them, against the tensors that the checkpoint would hold."""
    from k25_train.compose.resolve import compose
    from k25_train.config.optimizer import OptimName
    from k25_train.export.released import to_hf
    from k25_train.model.weights import ChunkPlace
    from k25_train.parameters.update_rules import rule_of
    from tests.helpers.hf_reference import tiny_model_config

    model = tiny_model_config()
    optim = compose(["experiment=smoke", "optim=muonclip", f"optim.muon.per_head={per_head}"]).optim
    whole = ChunkPlace(first_layer=0, first_expert=0)
    num_matrices = 0
    for name, parameter in built.items():
        rule = rule_of(name, tuple(parameter.shape), optim, model)
        if rule.update is OptimName.adamw:
            continue
        matrices = parameter.flatten(0, -2).chunk(rule.num_matrices)
        true = list(to_hf(dict(whole.global_tensors(name, parameter))).values())
        if name.endswith("wqkv.weight"):
            # Fused in the checkpoint as well: the query's rows, the key's, the value's.
            true = list(true[0].split(model.vision.hidden_size))
        elif per_head and name.endswith(("q_up_proj.weight", "kv_up_proj.weight")):
            true = list(true[0].unflatten(0, (model.num_attention_heads, -1)))
        assert len(matrices) == len(true), name
        assert all(map(torch.equal, matrices, true)), name
        num_matrices += len(matrices)
    # A layer: 5 of attention, 3 of an MLP; 2 of the 3 layers: a router, 8 more MLPs; a block of the tower: 6.
    heads = 2 * (model.num_attention_heads - 1) if per_head else 0
    assert num_matrices == 3 * (5 + heads + 3) + 2 * (1 + 8 * 3) + 6 * model.vision.num_layers + 2
