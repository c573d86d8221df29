"""A chain as a whole: stages composed, their first weights held against the models that these come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from k25_train.checkpoint import folders
from k25_train.checkpoint.initial_models import differences, names_of
from k25_train.checkpoint.storage.places import checkpoints_of
from k25_train.compose.filled import check_filled_in, check_weights_filled_in
from k25_train.compose.resolve import compose
from k25_train.compose.trainable import check_trainable
from k25_train.config.checkpoint import INIT_PARTS
from k25_train.config.leaves import plain_values
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.recipes.chain import Chain, Stage, is_place

_MOST_TOLD = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A stage with its configuration."""

    stage: Stage
    """As the chain has it."""
    arguments: tuple[str, ...]
    """Of the command that trains it: its experiment, where its weights come from, its settings."""
    config: Config
    """What these give."""

    @property
    def last_checkpoint(self) -> str:
        """The checkpoint that its last step writes, from which later stages start."""
        root = checkpoints_of(self.config.run.dir, self.config.checkpoint.dir)
        return str(folders.step_folder(root, self.config.train.steps))

    @property
    def num_tokens(self) -> int:
        """Tokens of all its steps."""
        train = self.config.train
        return train.batches.tokens_after(train.steps)


def compose_chain(chain: Chain) -> list[Composed]:
    """Compose every stage. Raises ConfigError listing what is wrong in each of them: keys and values, and
    weights that a stage would not find, or have no place for, in the models that it starts from."""
    done: dict[str, Composed] = {}
    problems: list[str] = []
    for stage in chain.stages:
        try:
            done[stage.name] = _composed(chain, stage, done)
        except ConfigError as error:
            problems.append(f"stage {stage.name}: {error}")
        except KeyError:
            # What it starts from does not compose, which is told already.
            continue
    if problems:
        raise ConfigError("\n".join([f"chain={chain.name} cannot run:", *problems]))
    return list(done.values())


def _composed(chain: Chain, stage: Stage, done: dict[str, Composed]) -> Composed:
    arguments = (
        f"experiment={stage.experiment}",
        f"run.dir={chain.run_dir(stage)}",
        *_weights(stage, done),
        *stage.overrides,
    )
    config = compose(arguments)
    check_trainable(config)
    for name in dict.fromkeys(stage.sources.values()):
        if not is_place(name):
            _check_fits(stage, name, config, done[name].config)
    _check_complete(stage, config)
    return Composed(stage=stage, arguments=arguments, config=config)


def _weights(stage: Stage, done: dict[str, Composed]) -> list[str]:
    """The settings that say which weights the stage starts from."""

    def place(source: str) -> str:
        return source if is_place(source) else done[source].last_checkpoint

    found = [] if stage.start is None else [f"checkpoint.init_from={place(stage.start)}"]
    if stage.parts:
        parts = ", ".join(f"{part}: {place(source)}" for part, source in stage.parts.items())
        found.append(f"checkpoint.init_parts={{{parts}}}")
    for key, patterns in (("init_fresh", stage.fresh), ("init_leave_out", stage.leave_out)):
        if patterns:
            found.append(f"checkpoint.{key}=[{', '.join(patterns)}]")
    return found


def _check_fits(stage: Stage, name: str, config: Config, source: Config) -> None:
    """Raise ConfigError if the model of an earlier stage is another one in the parts that come from it."""
    parts = [part for part, origin in stage.sources.items() if origin == name]
    fresh = set(stage.fresh)
    parts = [part for part in parts if f"{part}.*" not in fresh]
    wrong, _ = differences(plain_values(source.model), config.model, parts, f"stage {name}")
    if wrong:
        raise ConfigError(
            "\n  ".join([f"starts from {name}, which trains another model:", *wrong])
            + "\n  -> choose its model, or take other parts from it"
        )


def _check_complete(stage: Stage, config: Config) -> None:
    """Raise ConfigError if parts of the model have neither a source nor leave to start at random."""
    if not config.checkpoint.has_initial_weights:
        return
    lacking = [
        name
        for name in names_of(config.model)
        if name.split(".", 1)[0] not in stage.sources
        and not any(fnmatchcase(name, pattern) for pattern in stage.fresh)
    ]
    if lacking:
        parts = [part for part in INIT_PARTS if any(name.startswith(f"{part}.") for name in lacking)]
        raise ConfigError(
            f"{len(lacking)} tensors of {', '.join(parts)} have no source: "
            f"{', '.join(lacking[:_MOST_TOLD])}…\n"
            f"  -> name a stage in parts, or let them start at random: fresh: [{parts[0]}.*]"
        )


def check_runnable(stages: Sequence[Composed]) -> None:
    """Raise ConfigError for stages that a user has to complete before they run: data, and weights from
    outside of the chain."""
    problems = []
    for each in stages:
        try:
            check_weights_filled_in(each.config.checkpoint)
        except ConfigError as error:
            problems.append(f"stage {each.stage.name}: {error}")
        try:
            check_filled_in(each.config.data)
        except ConfigError as error:
            problems.append(f"stage {each.stage.name}: {error}")
    if problems:
        raise ConfigError("\n".join(["the chain has to be completed before it runs:", *problems]))
