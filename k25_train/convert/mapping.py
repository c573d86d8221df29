"""Which tensors of a folder make which of ours: everything found, nothing left over, shapes compared.

Each of our tensors, laid flat, is a row of segments, one per tensor of the folder: rows that are joined,
experts that are stacked and convolutions that are flattened follow each other in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod

import torch

from k25_train.config.model import ModelConfig
from k25_train.convert.names import Change, Renamed, Rule, renamed
from k25_train.convert.number_formats import SourceTensor, check_readable
from k25_train.errors import CheckpointError
from k25_train.export.released import shown
from k25_train.parameters import table
from k25_train.parameters.entry import ParameterEntry, fill, pattern_of


@dataclass(frozen=True, slots=True)
class Segment:
    """A tensor of the folder within one of ours."""

    source: SourceTensor
    """What is read."""
    change: Change
    """What is done to it."""
    numel: int
    """Elements of ours that it makes."""


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """One of our tensors."""

    name: str
    """In checkpoints."""
    shape: tuple[int, ...]
    """As training holds it, with all experts."""
    dtype: torch.dtype
    """In which it is written."""
    segments: tuple[Segment, ...]
    """What it is made of, in order."""


@dataclass(slots=True)
class Row:
    """A line of the table of a mapping."""

    source: str
    """Names in the folder, with `*` for numbers."""
    target: str
    """Ours, or why there is none."""
    formats: set[str] = field(default_factory=set)
    """Number formats."""
    change: Change = Change.none
    """What is done."""
    count: int = 0
    """Tensors of the folder."""


@dataclass(frozen=True, slots=True)
class TensorMapping:
    """A folder's tensors and ours."""

    tensors: tuple[PlannedTensor, ...]
    """Ours, in the order of the forward pass."""
    rows: tuple[Row, ...]
    """What to show, in the order of the folder."""
    missing: tuple[str, ...]
    """Ours that the folder does not make, which was allowed."""


@dataclass(frozen=True, slots=True)
class Named:
    """What the user named."""

    leave_out: Sequence[str] = ()
    """Patterns of the folder's names that are not taken."""
    allow_missing: Sequence[str] = ()
    """Patterns of our names that need not be made."""


def map_tensors(
    weights: Mapping[str, SourceTensor],
    model: ModelConfig,
    parts: Sequence[str],
    dtype: torch.dtype,
    named: Named,
) -> TensorMapping:
    """Find what makes each tensor of these parts of the model.

    Args:
        weights: of the folder.
        model: whose tensors are made.
        parts: first words of their names.
        dtype: of what is written; buffers are float32.
        named: what may be left out and missing.

    Raises CheckpointError that lists what is left over, missing, or has another shape, and patterns that fit
    nothing.
    """
    rows: dict[str, Row] = {}
    found: dict[str, list[tuple[Renamed, SourceTensor]]] = {}
    unknown, left_out = [], set()
    for name, weight in weights.items():
        known = renamed(name)
        is_named = any(fnmatchcase(name, pattern) for pattern in named.leave_out)
        if known is not None and known.rule.released and not is_named and _entry_of(known, model, parts):
            check_readable(weight)
            found.setdefault(known.released, []).append((known, weight))
            continue
        if is_named or (known is not None and not known.rule.released):
            why = "left out as asked" if is_named or known is None else f"left out: {known.rule.why}"
            _add(rows, name, why, weight, Change.none)
            if known is not None:
                left_out.add(known.released)
        else:
            unknown.append(name)
    tensors, missing = _plan(found, left_out, model, parts, dtype, rows)
    lacking = [name for name in missing if not any(fnmatchcase(name, each) for each in named.allow_missing)]
    problems = _problems(weights, unknown, lacking, missing, named)
    if problems:
        raise CheckpointError("\n".join(problems))
    return TensorMapping(tuple(tensors), _in_order(rows, weights), tuple(missing))


def _plan(
    found: dict[str, list[tuple[Renamed, SourceTensor]]],
    left_out: set[str],
    model: ModelConfig,
    parts: Sequence[str],
    dtype: torch.dtype,
    rows: dict[str, Row],
) -> tuple[list[PlannedTensor], list[str]]:
    """Our tensors that are made, and the names of those that are not, though nothing was left out by name."""
    tensors, missing = [], []
    unused = dict(found)
    for entry, number in table.TABLE.places(model):
        if entry.name.split(".", 1)[0] not in parts:
            continue
        name, shape = fill(entry.stacked_name, number), entry.stacked_shape(model)
        segments: list[Segment] = []
        absent: list[str] = []
        for released, one_shape in _wanted(entry, number, model, found):
            pieces = unused.pop(released, [])
            if not pieces:
                absent.append(released)
            segments += _segments(released, pieces, one_shape, model)
            for known, weight in pieces:
                _add(rows, weight.name, pattern_of(name), weight, known.rule.change)
        if not absent:
            kind = torch.float32 if entry.kind.is_buffer else dtype
            tensors.append(PlannedTensor(name, shape, kind, tuple(segments)))
        elif segments:
            raise CheckpointError(f"{name}: is made in part only: {shown(absent)} are missing")
        elif not left_out.issuperset(absent) and fill(_stacked(entry), number) not in left_out:
            missing.append(name)
    if unused:
        names = shown([weight.name for pieces in unused.values() for _, weight in pieces])
        raise CheckpointError(
            f"{names}: experts are there both stacked and one by one; leave one out by --leave-out"
        )
    return tensors, missing


def _wanted(
    entry: ParameterEntry, number: int, model: ModelConfig, found: Mapping[str, object]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name in the release and shape of all that make one of our tensors; the stack, if it is there."""
    shape = entry.released_shape(model)
    if entry.is_expert and (stacked := fill(_stacked(entry), number)) in found:
        yield stacked, entry.stacked_shape(model)
        return
    for expert in range(model.num_experts if entry.is_expert else 1):
        for released in entry.released:
            yield fill(released, number, expert), shape


def _stacked(entry: ParameterEntry) -> str:
    """What transformers 5 calls a stack of experts, the prefix being the release's; laid out as ours."""
    prefix = entry.released[0].partition(".experts.*.")[0]
    return f"{prefix}.experts.{entry.name.rpartition('.')[2].removesuffix('.weight')}"


_STACKED = {_stacked(entry): entry for entry in table.TABLE.entries if entry.is_expert}


def _entry_of(known: Renamed, model: ModelConfig, parts: Sequence[str]) -> ParameterEntry | None:
    """The entry of the table that a tensor is part of, if the model has it in a layer of that number."""
    pattern = pattern_of(known.released)
    entry = table.TABLE.by_released_name.get(pattern) or _STACKED.get(pattern)
    if entry is None or entry.name.split(".", 1)[0] not in parts:
        return None
    numbers = [int(part) for part in known.released.split(".") if part.isdigit()]
    if not entry.site.is_decoder_layer and ".blocks." not in entry.name:
        return entry
    is_there = numbers[0] in entry.site.numbers(model)
    return entry if is_there and (len(numbers) < 2 or numbers[1] < model.num_experts) else None


def _segments(
    released: str,
    pieces: list[tuple[Renamed, SourceTensor]],
    shape: tuple[int, ...],
    model: ModelConfig,
) -> list[Segment]:
    """What makes one tensor of the release, in the order of its parts. Raises CheckpointError."""
    pieces = sorted(pieces, key=lambda piece: piece[0].rule.part)
    rules = [known.rule for known, _ in pieces]
    if pieces and [rule.part for rule in rules] != list(range(rules[0].num_parts)):
        names = shown([weight.name for _, weight in pieces])
        raise CheckpointError(f"{released}: comes twice or in part, as {names}; leave one out by --leave-out")
    segments = []
    for known, weight in pieces:
        expected = _expected(known.rule, weight, shape)
        if weight.shape != expected:
            raise CheckpointError(
                f"{weight.codes.path}: {weight.name} has shape {list(weight.shape)} instead of "
                f"{list(expected)}, which the model's {released} has"
            )
        segments.append(Segment(weight, known.rule.change, prod(shape) // known.rule.num_parts))
    return segments


def _expected(rule: Rule, weight: SourceTensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a tensor of the folder must have."""
    if rule.change is Change.resample:
        positions = weight.shape[0] if weight.shape else 0
        is_square = round(positions**0.5) ** 2 == positions
        return (positions if is_square else -1, shape[-1])
    return (shape[0] // rule.num_parts, *shape[1:])


def _add(rows: dict[str, Row], name: str, target: str, weight: SourceTensor, change: Change) -> None:
    row = rows.setdefault(pattern_of(name), Row(pattern_of(name), target, change=change))
    row.formats.add(weight.dtype)
    row.count += 1


def _in_order(rows: dict[str, Row], weights: Mapping[str, SourceTensor]) -> tuple[Row, ...]:
    patterns = dict.fromkeys(pattern_of(name) for name in weights)
    return tuple(rows[pattern] for pattern in patterns if pattern in rows)


def _problems(
    weights: Mapping[str, SourceTensor],
    unknown: list[str],
    lacking: list[str],
    missing: list[str],
    named: Named,
) -> list[str]:
    problems = []
    if unknown:
        problems.append(
            f"{len(unknown):,} tensors of the folder have no place in the model: {shown(unknown)}\n"
            "  -> name those that may be left out: --leave-out PATTERN"
        )
    if lacking:
        problems.append(
            f"{len(lacking):,} tensors of the model are not in the folder: {shown(lacking)}\n"
            "  -> name those that may be missing: --allow-missing PATTERN; a run gives them random values if "
            "checkpoint.init_fresh names them"
        )
    unused = [each for each in named.leave_out if not any(fnmatchcase(name, each) for name in weights)]
    unused += [each for each in named.allow_missing if not any(fnmatchcase(name, each) for name in missing)]
    if unused:
        problems.append(f"no tensor is meant by {', '.join(unused)}: correct the pattern, or leave it out")
    return problems
