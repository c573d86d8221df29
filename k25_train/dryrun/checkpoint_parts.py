"""What each rank of the job saves and loads, by one built rank of each stage: ranges without memory.

They are those that `k25_train/checkpoint/pieces.py` gives on the rank itself.
"""

from collections.abc import Mapping, Sequence

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from k25_train.checkpoint.files.parts import Part
from k25_train.checkpoint.pieces import MASTER, part_of, replicated, share_of, state_part_of
from k25_train.checkpoint.whole import held_tensors
from k25_train.dryrun.rank import BuiltRank, gradient_buffers, optimizer_parts
from parallel.megatron.sharded_optimizer import shard_ranges

StateKeys = Mapping[nn.Parameter, tuple[str, ...]]
"""Parameter -> keys of what its optimizer keeps about it, the master included."""


def parts_by_rank(ranks: Sequence[BuiltRank], *, trains: bool = True) -> list[list[Part]]:
    """[rank of the job] -> its parts, in the order of its pieces' kinds.

    Args:
        ranks: the first rank of each pipeline stage.
        trains: whether there is an optimizer.
    """
    by_rank: list[list[Part]] = [[] for _ in range(ranks[0].topology.world_size)]
    for built in ranks:
        topology, keys = built.topology, _state_keys(built, trains)
        of_stage = by_rank[topology.pp_rank * topology.stage_size :][: topology.stage_size]
        for chunk in built.chunks:
            _add(of_stage, chunk, keys, topology.ep_size, trains)
    # Every rank has a replica of the encoder, and all of them share in each.
    for encoder in ranks[0].encoders:
        _add(by_rank, encoder, _state_keys(ranks[0], trains), 1, trains)
    return by_rank


def _state_keys(built: BuiltRank, trains: bool) -> StateKeys:
    return {
        parameter: (MASTER, *part.optimizer_state_keys)
        for part in (optimizer_parts(built.optimizer) if trains else ())
        for buffer in part.buffers
        for parameter in buffer.params
    }


def _add(
    by_rank: Sequence[list[Part]],
    module: DistributedDataParallel,
    keys: StateKeys,
    ep_size: int,
    trains: bool,
) -> None:
    """Add the parts of a module to those of its ranks, of which every `ep_size`-th has the same experts."""
    num_ranks = len(by_rank)

    def holders(ep_rank: int, is_expert: bool) -> range:
        """Ranks that have the same elements; none if an earlier `ep_rank` stood for them."""
        if is_expert:
            return range(ep_rank, num_ranks, ep_size)
        return range(num_ranks if ep_rank == 0 else 0)

    for ep_rank in range(ep_size):
        held = {each.parameter: each for each in held_tensors(module, ep_rank)}
        for buffer, is_expert in gradient_buffers(module) if trains else ():
            ranks = holders(ep_rank, is_expert)
            for shard, rank in enumerate(ranks):
                for parameter, start, stop in shard_ranges(buffer, shard, len(ranks)):
                    own = (held[parameter], start, stop)
                    state = (state_part_of(*own, key) for key in keys[parameter])
                    by_rank[rank] += [part_of(*own), *state]
        for each in replicated(module, trains=trains, ep_rank=ep_rank):
            for number, rank in enumerate(holders(ep_rank, each.tensors[0].is_expert)):
                by_rank[rank] += [part_of(*own) for own in share_of(each, number)]
