"""What ranks hold for a checkpoint: every element of every tensor once, under the whole model's names."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.assembled import build
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout

pytestmark = pytest.mark.distributed


Parts = list[tuple[Any, Tensor]]
"""Parts with their elements."""


def pieces_of(
    context: RankContext, arguments: Sequence[str]
) -> tuple[Parts, Parts, dict[str, tuple[int, ...]]]:
    """This rank's pieces if it trains and if it does not, and the shapes that megatron-core would save."""
    from k25_train.checkpoint import pieces

    # Each rank has something of what is replicated, however little there is.
    pieces.SHARE_MULTIPLE = 1
    built = build(context, arguments)
    for number, part in enumerate(built.optimizer.chained_optimizers):
        for shard in part.shards().values():
            for key, moment in part.moments(shard).items():
                # Told apart from others, and from zeros.
                moment.fill_(number + len(key))
    trained, evaluated = (
        [(piece.part, piece.tensor.clone()) for piece in pieces.pieces(built.modules, optimizer)]
        for optimizer in (built.optimizer, None)
    )
    return trained, evaluated, megatron_shapes(built.modules)


def megatron_shapes(modules: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of whole tensors as megatron-core describes them, which sees the rank's experts."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    described = {
        tensor.key: tuple(tensor.global_shape)
        for module in modules
        for tensor in nested_values(_applied(apply_factories, module.module.sharded_state_dict(metadata={})))
        if isinstance(tensor, ShardedTensor)
    }
    ep_size = modules[0].ep_group.size()
    return {
        name: (shape[0] * ep_size, *shape[1:]) if ".mlp.experts." in name else shape
        for name, shape in described.items()
    }


def _applied(function: Any, state: Any) -> Any:
    function(state)
    return state


def parts_of_dry_run(_context: RankContext, arguments: Sequence[str], trains: bool) -> list[list[Any]]:
    """[rank] -> the parts that the dry run says it has."""
    from k25_train.checkpoint import pieces
    from parallel.megatron.platform import use_platform

    pieces.SHARE_MULTIPLE = 1
    use_platform("meta")
    from tests.helpers.dry_parts import dry_parts

    return dry_parts(arguments, trains=trains)


def assemble(by_rank: Sequence[Sequence[tuple[Any, Tensor]]]) -> dict[str, Tensor]:
    """Whole tensors from all ranks' parts, each element of which must come once."""
    whole: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for part, values in (each for rank in by_rank for each in rank):
        if part.name not in whole:
            whole[part.name] = torch.zeros(part.shape, dtype=part.dtype)
            times[part.name] = torch.zeros(part.info.numel, dtype=torch.int32)
        assert tuple(whole[part.name].shape) == part.shape
        assert (values.dtype, values.shape) == (part.dtype, (part.numel,))
        whole[part.name].view(-1)[part.start : part.stop] = values
        times[part.name][part.start : part.stop] += 1
    wrong = [name for name, count in times.items() if not bool((count == 1).all())]
    assert not wrong, wrong
    return whole


FROZEN = ("optim.vision_tower.trained=false", "optim=adamw")
LAYOUTS = {
    "pp2 vpp2 ep2": (layout(pp=2, vpp=2, ep=2, dp=2), ("train.dtype=bfloat16",)),
    "ep2 dp2 cp2, frozen tower, no stage of its own": (
        layout(ep=2, dp=2, cp=2),
        ("dep.mode=coupled", *FROZEN),
    ),
}


def whole_state(sizes: list[str], more: Sequence[str]) -> dict[str, Tensor]:
    """The whole state as the pieces of all ranks have it, under megatron-core's names."""
    by_rank = run_ranks(pieces_of, int(sizes[-1].split("=")[1]), [*sizes, *more])
    whole = assemble([trained for trained, _, _ in by_rank])
    weights = {name: each for name, each in whole.items() if not name.startswith("optimizer.")}
    alone = assemble([evaluated for _, evaluated, _ in by_rank])
    assert alone.keys() == weights.keys()
    assert all(torch.equal(alone[name], each) for name, each in weights.items())
    described = {name: shape for _, _, shapes in by_rank for name, shape in shapes.items()}
    for which, trains in enumerate((True, False)):
        (dry,) = run_ranks(parts_of_dry_run, 1, [*sizes, *more], trains)
        real = [[part for part, _ in rank[which]] for rank in by_rank]
        assert [sorted(parts, key=str) for parts in dry] == [sorted(parts, key=str) for parts in real]
    assert {name: tuple(each.shape) for name, each in weights.items()} == described
    return whole


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_ranks_together_have_every_element_once(name: str) -> None:
    sizes, more = LAYOUTS[name]
    found, alone = whole_state(sizes, more), whole_state(layout(), more)
    assert found.keys() == alone.keys()
    for tensor, values in alone.items():
        assert torch.equal(found[tensor], values), tensor
    prefix = "optimizer.state.param."
    masters = {key.removeprefix(prefix): value for key, value in alone.items() if key.startswith(prefix)}
    assert all(torch.equal(alone[key].float(), value) for key, value in masters.items())
    # Muon keeps one moment, AdamW two; what is frozen has none.
    seconds = sum("exp_avg_sq" in key for key in alone)
    is_frozen = FROZEN[0] in more
    assert seconds == len(masters) if is_frozen else 0 < seconds < len(masters)
    assert ("vision_tower.patch_embed.proj.weight" in masters) is not is_frozen
