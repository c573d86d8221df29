"""The weights that a new run starts from: of an import, or of checkpoints of other runs, part by part.

`checkpoint.init_from` names a source for the whole model, `checkpoint.init_parts` others for parts of it. Of
a source weights alone count, of the parts that come from it. Float32 masters are taken where it has
them; moments come along on request (`checkpoint.init_optimizer`), with the number of updates by which AdamW
corrects them; steps and data are those of a new run. Each byte is read once, by the rank that updates it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from k25_train.checkpoint.agreement import on_every_rank, on_first_rank
from k25_train.checkpoint.checking import check_content
from k25_train.checkpoint.continuity import ORIGIN
from k25_train.checkpoint.files.parts import Part
from k25_train.checkpoint.files.stored import is_of_torch
from k25_train.checkpoint.initial_models import names_of
from k25_train.checkpoint.initial_plan import MASTERS, Source, check_model, plan_of, sources_of
from k25_train.checkpoint.integrity import check_is_checkpoint, verify
from k25_train.checkpoint.loading import complete, fill, misfits, open_together
from k25_train.checkpoint.manifest import read_manifest
from k25_train.checkpoint.pieces import OPTIMIZER_STATE, Piece, pieces
from k25_train.checkpoint.storage.kinds import Place
from k25_train.checkpoint.storage.places import place_of
from k25_train.config.checkpoint import Verify
from k25_train.config.parts import ModelPart
from k25_train.config.schema import Config
from k25_train.errors import CheckpointError

_MOST_TOLD = 8


@dataclass(frozen=True, slots=True)
class Started:
    """What a run has started from."""

    notes: tuple[str, ...]
    """Lines for people: the mapping."""
    facts: Mapping[str, str]
    """For the manifests of the run's checkpoints."""


def start_from_weights(
    config: Config, modules: Sequence[DistributedDataParallel], optimizer: ChainedOptimizer | None
) -> Started:
    """Give the modules, and the masters of their optimizer, the weights that the configuration names.

    Called by every rank, before the first step.

    Raises `CheckpointError`, on every rank, if a source is missing, damaged or of another model, if it lacks
    tensors that `init_fresh` does not name, or has some without a place in the model that `init_leave_out`
    does not name; and for patterns that mean nothing.
    """
    settings, model = config.checkpoint, config.model
    sources, notes = [], []
    for text, parts in sources_of(settings).items():
        source, differences = _open(text, parts, config)
        sources.append(source)
        notes += differences
    plan = on_first_rank(lambda: plan_of(sources, names_of(model), settings))
    wanted = [piece for piece in pieces(modules, optimizer) if _weight_of(piece) not in plan.fresh]
    for source in sources:
        _read_from(source, [piece for piece in wanted if source.takes(_weight_of(piece))])
    complete(modules, trains=optimizer is not None)
    if optimizer is not None:
        notes += [note for source in sources for note in _count(source, optimizer, config)]
    facts = {f"{ORIGIN}{part}": _told(source) for source in sources for part in source.parts}
    return Started((*notes, *plan.lines), facts)


def origin_of(folder: Place) -> dict[str, str]:
    """What a checkpoint says of the weights that its run has started from. Raises `CheckpointError`."""
    return {key: value for key, value in read_manifest(folder).facts.items() if key.startswith(ORIGIN)}


def _open(text: str, parts: tuple[str, ...], config: Config) -> tuple[Source, list[str]]:
    """A source by its path or URL, and allowed differences of its model. Called by every rank."""
    folder = on_first_rank(lambda: place_of(text))
    on_first_rank(lambda: _check_is_there(folder, text, config))
    manifest = on_first_rank(lambda: verify(folder))
    differences = on_first_rank(lambda: check_model(folder, config.model, parts))
    if is_of_torch(manifest) and config.checkpoint.verify is Verify.full:
        check_content(folder, manifest)
    stored = open_together(folder, manifest, config.checkpoint)
    settings = config.checkpoint
    gives_state = settings.init_optimizer and text == settings.init_from
    return Source(folder, parts, stored, gives_state=gives_state), differences


def _check_is_there(folder: Place, text: str, config: Config) -> None:
    try:
        check_is_checkpoint(folder)
    except CheckpointError as error:
        key = "init_from" if text == config.checkpoint.init_from else "init_parts"
        raise CheckpointError(
            f"checkpoint.{key}: {error}\n  -> name a checkpoint that there is, or train it first"
        ) from error


def _weight_of(piece: Piece) -> str:
    """The weight that a piece is of, or whose master, moment or other state it is of."""
    name = piece.part.name
    return name.split(".", 3)[3] if name.startswith(f"{OPTIMIZER_STATE}.") else name


@torch.no_grad()
def _read_from(source: Source, wanted: Sequence[Piece]) -> None:
    """Fill this rank's weights and masters. What is updated is read once, into its master."""
    masters = {
        (piece.part.name, piece.part.start): piece.tensor
        for piece in wanted
        if piece.part.name.startswith(MASTERS)
    }
    reads: list[Piece] = []
    copies: list[tuple[Tensor, Tensor]] = []
    keys: dict[str, set[str]] = {}
    for piece in wanted:
        part = piece.part
        if part.name.startswith(f"{OPTIMIZER_STATE}."):
            # Masters are read below, and what the source did not train has no moments to come along.
            if not part.name.startswith(MASTERS) and (weight := _weight_of(piece)) in source.moments:
                reads.append(piece)
                keys.setdefault(weight, set()).add(part.name.split(".", 3)[2])
            continue
        target = masters.get((f"{MASTERS}{part.name}", part.start), piece.tensor)
        name = source.name_of(part.name)
        reads.append(
            Piece(Part(name, source.stored.info(name).dtype, part.shape, part.start, part.stop), target)
        )
        if piece.tensor.data_ptr() != target.data_ptr():
            copies.append((piece.tensor, target))
    found = on_every_rank(lambda: _other_rules(source, keys) or misfits(source.stored, reads))
    on_first_rank(lambda: _check_fits(source, found))
    on_every_rank(lambda: fill(source.stored, reads))
    for weights, master in copies:
        weights.copy_(master)


def _other_rules(source: Source, keys: Mapping[str, set[str]]) -> list[str]:
    """A line for each weight that another rule has updated in the source, some of them: its moments are of
    another kind, whatever they are called."""
    lines = [
        f"{weight}: updated by another rule there, with {', '.join(sorted(source.moments[weight]))}, not "
        f"{', '.join(sorted(own))}"
        for weight, own in sorted(keys.items())
        if source.moments[weight] != own
    ]
    return lines[:_MOST_TOLD]


def _count(source: Source, optimizer: ChainedOptimizer, config: Config) -> list[str]:
    """Go on with the number of updates of a source that gives its moments; lines for people. Called by every
    rank."""
    if not source.gives_state:
        return []
    num_updates = on_first_rank(lambda: source.stored.num_updates)
    for part in optimizer.chained_optimizers:
        part.count_from(num_updates)
    trained = {name.split(".", 1)[0] for name in source.moments}
    fresh = [part.value for part in ModelPart if part in config.optim.trained and part.value not in trained]
    but = f"; fresh for {', '.join(fresh)}, which it has none of" if fresh else ""
    return [f"optimizer state after {num_updates:,} updates from {source.folder}{but}"]


def _check_fits(source: Source, found: Sequence[Sequence[str]]) -> None:
    if lines := sorted({line for each in found for line in each}):
        remedy = "\n  -> choose the model and update rules of the source"
        remedy += ", or checkpoint.init_optimizer=false" if source.gives_state else ""
        raise CheckpointError(
            "\n  ".join([f"{source.folder} does not fit the model:", *lines[:_MOST_TOLD]]) + remedy
        )


def _told(source: Source) -> str:
    """What a source is, for a manifest: where, which step, and what of."""
    manifest = source.stored.manifest
    of = manifest.facts.get("import.source")
    return f"{source.folder} (step {manifest.step}" + (f", imported from {of})" if of else ")")
