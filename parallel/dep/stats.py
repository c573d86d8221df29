"""What the decoupled encoder did in a step: one rank's figures, and those of all ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.host.upload import upload


@dataclass(slots=True)
class VisionStats:
    """What one rank did in one step."""

    forward_s: float = 0.0
    """Time of forward passes. For parts of split items it includes waiting for their other ranks."""
    backward_s: float = 0.0
    """Time of recomputation and backward, including the same waiting."""
    exchange_s: float = 0.0
    """Time of sending and receiving, including waiting for slower ranks."""
    num_patches: int = 0
    """Patches that this rank encoded."""
    sent_bytes: int = 0
    """Bytes of features and gradients sent to other ranks."""
    split_bytes: int = 0
    """Bytes of keys and values of split items, and of their gradients, sent to other ranks."""
    exposed_s: float = 0.0
    """Time in which vision held the pipeline up. Upfront: all of it. In bubbles, on first stages: the work
    before their first pass and after their last one, and waiting for features."""
    peak_feature_bytes: int = 0
    """The most bytes of features and their gradients on the device at a time. Upfront: those at rest on a
    first stage. In bubbles: all that a rank holds, without what the backbone has taken."""

    @property
    def work_s(self) -> float:
        """Time in which the encoder worked."""
        return self.forward_s + self.backward_s


@dataclass(frozen=True, slots=True)
class VisionSummary:
    """Figures of one step over all ranks."""

    work_s_max: float
    """Seconds that the busiest rank's encoder worked."""
    work_s_mean: float
    """Seconds that the encoder worked, mean over ranks."""
    exposed_s_max: float
    """Seconds in which vision held the pipeline up, on the rank with the most (see `VisionStats`)."""
    patches_max: int
    """Patches of the rank that encoded the most."""
    patches_mean: float
    """Patches encoded, mean over ranks."""
    sent_bytes: int
    """Bytes of features and gradients sent between ranks, summed over all ranks."""
    split_bytes: int
    """Bytes of keys and values of split items, and of their gradients, sent between ranks."""
    peak_feature_bytes: int
    """The most bytes of features and their gradients on one device at a time."""

    @classmethod
    def over_all_ranks(cls, stats: VisionStats, device: torch.device) -> "VisionSummary":
        """Summarize every rank's figures with one collective; all ranks get the same result."""
        own = torch.tensor(
            [
                stats.work_s,
                stats.exposed_s,
                stats.num_patches,
                stats.peak_feature_bytes,
                stats.sent_bytes,
                stats.split_bytes,
            ],
            dtype=torch.float64,
        )
        # float64 holds counts of bytes exactly up to 2**53.
        gathered = torch.empty(dist.get_world_size() * len(own), dtype=torch.float64, device=device)
        dist.all_gather_into_tensor(gathered, upload(own, device))
        # Read once: each value that is read from a device waits for it.
        by_rank = gathered.view(-1, len(own)).cpu()
        work_max, exposed_max, patches_max, peak, *_ = by_rank.amax(dim=0).tolist()
        work_mean, _, patches_mean, *_ = by_rank.mean(dim=0).tolist()
        return cls(
            work_s_max=work_max,
            work_s_mean=work_mean,
            exposed_s_max=exposed_max,
            patches_max=int(patches_max),
            patches_mean=patches_mean,
            sent_bytes=int(by_rank[:, 4].sum()),
            split_bytes=int(by_rank[:, 5].sum()),
            peak_feature_bytes=int(peak),
        )
