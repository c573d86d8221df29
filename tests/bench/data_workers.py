"""Images/s of worker processes that read and decode the same images: ours, Grain's, and torch's DataLoader.

`python -m tests.bench.data_workers [NUM_WORKERS] [DIR]`; ends non-zero where ours is behind the better one.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.data.loader import DataLoader
from k25_train.data.mix.plan import media_of
from k25_train.data.units import GroupedReading, MediaUnit
from k25_train.data.workers.pool import WorkerPool

NUM_IMAGES, STEPS, ROUNDS = 200, 40, 2


class Images:
    """The same units for the others: each is one image's patches."""

    def __init__(self, config: Config, units: Sequence[MediaUnit]) -> None:
        self._config = config
        self._units = units
        self._loaders: dict[int, DataLoader] = {}
        """By process."""

    def __len__(self) -> int:
        return len(self._units)

    def __getitem__(self, number: int) -> Any:
        torch.set_num_threads(1)
        if os.getpid() not in self._loaders:
            config = self._config
            self._loaders[os.getpid()] = DataLoader(config.data, config.train, config.model.vision)
        found: Any = self._loaders[os.getpid()].read_unit(self._units[number])
        return found.items[0].numpy()


def ours(config: Config, units: Sequence[MediaUnit]) -> Callable[[], int]:
    """A pool that is warm, with one stream of units over all rounds, as Grain has."""
    pool = GroupedReading(WorkerPool(config, []), config.model.vision)
    found = pool.read([*units] * (ROUNDS + 1))
    return lambda: sum(1 for _ in zip(units, found, strict=False))


def torchs(config: Config, units: Sequence[MediaUnit]) -> Callable[[], int]:
    """DataLoader with workers that stay."""
    loader = torch.utils.data.DataLoader(
        Images(config, units), batch_size=None, num_workers=config.data.workers, persistent_workers=True
    )
    return lambda: sum(1 for _ in loader)


def grains(config: Config, units: Sequence[MediaUnit]) -> Callable[[], int]:
    """MultiprocessPrefetch, whose processes start with each iterator: one over all rounds."""
    import grain  # type: ignore[import-not-found, import-untyped, unused-ignore]

    options = grain.MultiprocessingOptions(num_workers=config.data.workers)
    data = grain.MapDataset.source(Images(config, units)).repeat(ROUNDS + 1).to_iter_dataset()
    found = iter(data.mp_prefetch(options))
    return lambda: sum(1 for _, _ in zip(units, found, strict=False))


def main(arguments: Sequence[str]) -> int:
    """Measure each in turn, the first round of each apart."""
    num_workers = int(arguments[0]) if arguments else 2
    more = [f"data.dir={arguments[1]}"] if len(arguments) > 1 else []
    config = compose(["experiment=smoke", f"data.workers={num_workers}", *more])
    with DataLoader(config.data, config.train, config.model.vision) as loader:
        units = [
            MediaUnit(source, media, None)
            for step in range(STEPS)
            for source, _, media in media_of(loader.plan(step).sequences)
            if media.segment.type == "image"
        ][:NUM_IMAGES]
    best: dict[str, float] = {}
    for name, make in {"ours": ours, "torch": torchs, "grain": grains}.items():
        count = make(config, units)
        count()
        for _ in range(ROUNDS):
            started = time.perf_counter()
            number = count()
            best[name] = max(best.get(name, 0.0), number / (time.perf_counter() - started))
        print(f"{name:6} {best[name]:8.1f} images/s with {num_workers} workers", flush=True)
    ahead = best["ours"] / max(best["torch"], best["grain"])
    print(f"ours has {ahead:.2f} times the images/s of the better one")
    return int(ahead < 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
