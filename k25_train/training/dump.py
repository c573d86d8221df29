"""Write held-out batches and the loss of every token, for comparison with another implementation.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.
"""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from k25_train.data.context import ContextShare, WholeContext, WholeShare
from k25_train.errors import ConfigError
from k25_train.model.moonvit_positions import normalised
from k25_train.training.activations import KeepEverything
from k25_train.training.device_batch import DeviceBatch, to_device
from k25_train.training.forward import forward_micro_batch
from k25_train.training.run import Run
from parallel.config import DepMode


@torch.no_grad()
def dump_batches(run: Run, folder: Path) -> None:
    """Write `batch_<replica>_<n>.safetensors` for each micro-batch of this rank's replica. Called by every
    rank.

    Each holds tokens, labels, loss_mask, source and losses [T], document_lengths, media_positions [V],
    grid_thw [N, 3] and pixels [P, 588], normalised. Of ranks that share micro-batches the first one writes.
    Raises `ConfigError` if the pipeline has more than one stage, or the tower is decoupled: pixels, tokens
    and losses are then on different ranks.
    """
    if run.topology.pp_size > 1:
        raise ConfigError(f"dump={folder} needs parallelism.pp=1, not {run.topology.pp_size}")
    if run.config.dep.mode is not DepMode.coupled:
        raise ConfigError(f"dump={folder} needs dep.mode=coupled, not {run.config.dep.mode.value}")
    # With one stage and a coupled tower a rank computes micro-batches alone, or with those that share them.
    folder.mkdir(parents=True, exist_ok=True)
    (chunk,) = run.chunks
    chunk.eval()
    agreed = run.reader.read_evaluation(run.config.train.eval_sequences)
    wholes = to_device(WholeContext().held(agreed.read.batches), torch.device("cpu"))
    held = run.reader.to_device(agreed).micro_batches
    for index, (whole, batch) in enumerate(zip(wholes, held, strict=True)):
        losses, _ = forward_micro_batch(
            batch,
            chunk,
            as_schedule_plan=False,
            objective=run.objective,
            leaf=run.tower.evaluating.leaf,
            activations=KeepEverything(),
        )
        losses = put_together(losses.flatten(), batch.share, run.topology.groups.cp)
        if run.topology.cp_rank == 0:
            save_file(contents(whole, losses), folder / f"batch_{run.topology.dp_rank}_{index}.safetensors")


def put_together(losses: Tensor, share: ContextShare | WholeShare, group: dist.ProcessGroup) -> Tensor:
    """The losses [T] of a whole micro-batch, in its order, out of those [T / cp] that each rank of the group
    has. Called by every one of them."""
    if isinstance(share, WholeShare):
        return losses
    of_ranks = losses.new_empty(group.size(), losses.numel())
    dist.all_gather_into_tensor(of_ranks.view(-1), losses, group=group)
    order = torch.from_numpy(np.concatenate([share.plan.positions(rank) for rank in range(group.size())]))
    return of_ranks.cpu().view(-1)[order.argsort()]


def contents(batch: DeviceBatch, losses: Tensor) -> dict[str, Tensor]:
    """The tensors of one file, on the CPU."""
    tensors = {
        "tokens": batch.tokens.long(),
        "labels": batch.labels.long(),
        "loss_mask": batch.targets.loss_mask,
        "source": batch.targets.source,
        "losses": losses.float(),
        "document_lengths": torch.tensor(batch.document_lengths),
        "media_positions": batch.media_positions,
        "grid_thw": torch.tensor(batch.grid_thw, dtype=torch.long).view(-1, 3),
    }
    if batch.pixels is not None:
        tensors["pixels"] = normalised(batch.pixels)
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
