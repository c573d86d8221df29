"""The data's configuration: sources, their mixture, and how they are read."""

from dataclasses import dataclass
from enum import Enum

from k25_train.config.basics import FILL_IN, not_from_home, not_negative
from k25_train.config.sources import MixFrom, SourceConfig, folder_of, source_path, sources_problems
from parallel.config import Problem, not_positive

HUNG_READ_ATTEMPTS = 3
"""How often a read that does not return is tried before the run ends by its file's name. Our choice."""
UNIT_READ_TIMEOUTS = 4
"""Read timeouts after which a worker that has not finished what it reads and decodes is ended; above
`HUNG_READ_ATTEMPTS`, so that a read is found out first, which names the bytes. Our choice."""
MAX_WORKERS_LOST = 2
"""Workers that may die of, or hang in, the same unit. Our choice: the kernel ends whatever process it likes
when memory runs out, but hardly twice the same."""


class ReadIn(Enum):
    """Where batches are planned, read and decoded."""

    process = "process"
    """In a process of each rank's own, next to the one that trains. Needs Linux."""
    thread = "thread"
    """In a thread of the process that trains, which it delays while kernels are launched."""


class Decoder(Enum):
    """What decodes and resizes images."""

    pillow = "pillow"
    """Pillow: the release's resampling to the bit."""
    dali = "dali"
    """NVIDIA DALI for what it does faithfully, Pillow for the rest."""


@dataclass(slots=True, kw_only=True)
class AugmentConfig:
    """Random changes of images, keyed by (seed, source, item, epoch). Source: that K2.5 augments, keeping
    coordinates and orientation consistent, is in appendix C.1; how much is not disclosed."""

    crop: float
    """Largest share of a side that is cut off; 0 crops nothing."""
    flip: float
    """Probability of mirroring left and right."""
    colour: float
    """Largest relative change of brightness, contrast and saturation; 0 changes nothing."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        return [
            Problem(name, value, "must be at least 0 and below 1", "use 0")
            for name in ("crop", "flip", "colour")
            if not 0 <= (value := getattr(self, name)) < 1
        ]

    @property
    def is_off(self) -> bool:
        """Whether nothing is changed."""
        return not (self.crop or self.flip or self.colour)


@dataclass(slots=True, kw_only=True)
class DataConfig:
    """Sources, mixture and order of samples, and how they are read."""

    dir: str
    """Folder or URL that the sources' relative paths start from."""
    tokenizer: str | None
    """Path of a `tokenizer.json` or of a Kimi `tiktoken.model`; null is that of the shard sets among the
    sources."""
    sources: dict[str, SourceConfig]
    """The sources by name."""
    vision_ratio: float | None
    """Share of the tokens in sequences with images or video, held constant; null leaves it to the weights.
    Source: constant through training, value not disclosed (K2.5, section 4.1)."""
    zero_vision: bool
    """Whether a source with images or video is refused and nothing can decode any: K2.5's text-only
    fine-tuning that activates visual tool use (section 4.4)."""
    schedule: dict[str, MixFrom]
    """Changes of the mixture by a name of their own, each from a step on."""
    shuffle: bool
    """Whether samples are drawn in an order that depends on the seed."""
    limit_samples: int | None
    """Number of samples of each source that are used, the first ones; null is all of them."""
    max_skipped_samples: int | float
    """Unusable samples that a run tolerates, as a number or, below 1 and with a decimal point, as a share of
    the samples seen so far; one more stops it."""
    prefetch_steps: int
    """Steps whose batches are prepared ahead of use; 0 prepares each when it is needed."""
    read_in: ReadIn
    """Where that is done (`process` or `thread`); batches are the same. Our choice."""
    workers: int
    """Processes per rank that read and decode; 0 leaves it to the one that plans."""
    decoder: Decoder
    """What decodes and resizes images (`pillow` or `dali`)."""
    augment: AugmentConfig
    """Random changes of images."""
    read_timeout_s: float
    """Longest time that one read of a file or an object may take before it is tried again; a worker that
    takes four times as long for something is replaced."""
    cache_dir: str | None
    """Folder on each node's own disk that keeps what was read from URLs; null keeps nothing."""
    cache_gib: float
    """Most that the cache holds."""
    requests_per_s: float | None
    """Most requests per second that one node makes to object stores; null is no limit."""

    @property
    def num_timeouts(self) -> int:
        """Read timeouts until what hangs for ever is named."""
        return UNIT_READ_TIMEOUTS * MAX_WORKERS_LOST if self.workers else HUNG_READ_ATTEMPTS

    def path_of(self, source: SourceConfig) -> str:
        """Where a source is: its path below `dir`, or itself if it is absolute or a URL."""
        return source_path(self.dir, source.path)

    @property
    def with_media(self) -> list[str]:
        """Names of the sources that may have images or video, as far as the configuration tells."""
        if self.zero_vision:
            return []
        return [name for name, source in self.sources.items() if source.may_have_media]

    def paths(self) -> dict[str, str]:
        """Key -> path or URL of all that is read: sources, their indexes, the tokenizer; none that a template
        leaves open."""
        given = {f"data.sources.{name}.path": source.path for name, source in self.sources.items()}
        given |= {f"data.sources.{name}.index": source.index or "" for name, source in self.sources.items()}
        places = {key: source_path(self.dir, path) for key, path in given.items() if _is_given(path)}
        tokenizer = self.tokenizer or ""
        return places | ({"data.tokenizer": tokenizer} if _is_given(tokenizer) else {})

    def folders(self) -> list[str]:
        """Folders or URLs that hold all of it."""
        sources = {f"data.sources.{name}.path": source for name, source in self.sources.items()}
        return [
            path if key in sources and sources[key].is_folder else folder_of(path)
            for key, path in self.paths().items()
        ]

    def open_paths(self) -> dict[str, str]:
        """Key -> what a template says in the place of a path that the user has to fill in."""
        places = {f"data.sources.{name}.path": source.path for name, source in self.sources.items()}
        places["data.tokenizer"] = self.tokenizer or ""
        return {key: path for key, path in places.items() if path.startswith(FILL_IN)}

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = not_negative(self, ("prefetch_steps", "workers"))
        found += not_positive(self, ("read_timeout_s", "cache_gib"))
        found += not_from_home(self, ("dir", "tokenizer", "cache_dir"))
        if "\0" in self.dir or not self.dir.strip():
            found.append(
                Problem("dir", self.dir, "must name a folder", "build one: python -m k25_train.data build")
            )
        if self.workers > 0 and self.read_in is ReadIn.thread:
            rule = "needs data.read_in=process: a thread of the rank cannot fork them"
            found.append(
                Problem("workers", self.workers, rule, "use data.read_in=process, or data.workers=0")
            )
        for name in ("limit_samples", "requests_per_s"):
            if getattr(self, name) is not None:
                found += not_positive(self, (name,))
        skipped = self.max_skipped_samples
        if skipped < 0 or (isinstance(skipped, float) and skipped >= 1):
            rule = "must be a whole number of samples, or a share of them below 1"
            found.append(Problem("max_skipped_samples", skipped, rule, "use 100, or 0.001"))
        found += [each._replace(key=f"augment.{each.key}") for each in self.augment.problems()]
        if self.zero_vision:
            found += self._vision_problems()
        return found + sources_problems(self.sources, self.vision_ratio, self.schedule)

    def _vision_problems(self) -> list[Problem]:
        """What asks for images or video though there are none."""
        ratios = {"vision_ratio": self.vision_ratio}
        ratios |= {f"schedule.{name}.vision_ratio": mix.vision_ratio for name, mix in self.schedule.items()}
        found = [
            Problem(key, ratio, "must be null with data.zero_vision, which has no images", "use null")
            for key, ratio in ratios.items()
            if ratio is not None
        ]
        for name, source in self.sources.items():
            media = [kind for kind in source.kinds if kind != "text"]
            if media:
                rule = "has images or video, and data.zero_vision refuses them"
                found.append(Problem(f"sources.{name}.kinds", media, rule, "use [text]"))
        return found


def _is_given(path: str) -> bool:
    return path != "" and not path.startswith(FILL_IN)
