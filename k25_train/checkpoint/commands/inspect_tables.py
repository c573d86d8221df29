"""Tables of `k25-checkpoint inspect`."""

import time
from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from k25_train.checkpoint.commands.contents import Alike, Amount, alike
from k25_train.checkpoint.commands.facts import Facts
from k25_train.checkpoint.commands.groups import State, parameter_of, state_of
from k25_train.checkpoint.commands.sizes import in_units
from k25_train.checkpoint.commands.statistics import Statistics
from k25_train.checkpoint.files.parts import TensorInfo
from k25_train.parameters.entry import numbers_in
from k25_train.tables import fitting_table
from k25_train.units import format_count, format_duration

_COLUMNS = {
    "weights": (State.weight,),
    "masters": (State.master,),
    "moments": (State.first_moment, State.second_moment),
    "other": (State.other,),
}
"""Columns of the table of contents."""


def facts_table(facts: Facts) -> Table:
    """Name and value of what is known of the checkpoint as a whole."""
    manifest = facts.manifest
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    sound = "sound" if manifest.is_sound else f"unsound: {manifest.why_unsound}"
    proven = ", proven: a sound step was taken from it" if facts.is_proven else ""
    age = format_duration(max(0.0, time.time() - facts.saved_at_s))
    clock = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(facts.saved_at_s))
    files = manifest.files.values()
    largest = max((file.num_bytes for file in files), default=0)
    rows = {
        "checkpoint": facts.folder,
        "holds": _holds(facts),
        "state": f"{sound}{proven}",
        "saved": f"{clock}, {age} ago",
        "model": facts.model,
        "layout": ", ".join(f"{name} {value}" for name, value in facts.layout.items()),
        "files": f"{len(files):,} with {in_units(facts.num_bytes)}, the largest {in_units(largest)}",
        "format": _format(facts),
        "losses": _losses(facts),
        "mixture": "\n".join(facts.mixtures),
    }
    for name, value in rows.items():
        if value:
            table.add_row(Text(name), Text(value))
    return table


def _holds(facts: Facts) -> str:
    manifest = facts.manifest
    if manifest.kind == "weights":
        return "weights to start from"
    updates = "" if facts.num_updates is None else f", {facts.num_updates:,} updates"
    return f"a run after step {manifest.step:,}{updates}"


def _format(facts: Facts) -> str:
    manifest = facts.manifest
    if not manifest.has_checksums:
        return f"{manifest.version}, without checksums"
    return f"{manifest.version}, " + (
        "SHA-256 of each file" if manifest.version < 3 else "xxh3 of each block"
    )


def _losses(facts: Facts) -> str:
    losses = facts.manifest.losses
    return f"{sum(losses) / len(losses):.4f}, mean of the last {len(losses)} steps" if losses else ""


def data_table(facts: Facts, width: int) -> Table:
    """How far each source was read."""
    rows = [
        {
            "source": name,
            "sequences": f"{values.get('num_sequences', 0):,}",
            "tokens": format_count(int(values.get("num_tokens", 0))),
            "epochs": f"{values.get('epochs_used', 0.0):.3f}",
        }
        for name, values in facts.data.items()
    ]
    return fitting_table("Data so far", rows, width, left=("source",))


def amounts_table(found: Mapping[str, Mapping[State, Amount]], width: int) -> Table:
    """Bytes by part of the model and what is kept."""
    present = {state for row in found.values() for state in row}
    columns = {name: states for name, states in _COLUMNS.items() if present & {*states}}
    total = {state: sum((row.get(state, Amount()) for row in found.values()), Amount()) for state in present}
    rows = [{"part": part, **_amounts_row(row, columns)} for part, row in (*found.items(), ("all", total))]
    return fitting_table("Contents", rows, width, least=("tensors", "parameters"), left=("part",))


def _amounts_row(row: Mapping[State, Amount], columns: Mapping[str, Sequence[State]]) -> dict[str, str]:
    whole = sum(row.values(), Amount())
    cells = {
        "tensors": f"{whole.num_tensors:,}",
        "parameters": format_count(row.get(State.weight, Amount()).num_elements),
    }
    for name, states in columns.items():
        num_bytes = sum(row.get(state, Amount()).num_bytes for state in states)
        cells[name] = in_units(num_bytes) if num_bytes else ""
    return cells | {"bytes": in_units(whole.num_bytes)}


def alike_tables(
    tensors: Mapping[str, TensorInfo], found: Mapping[str, Statistics], width: int
) -> Iterator[Table]:
    """A table for weights and for each kind of optimizer state; layers that are alike share a row."""
    for state, of_state in _by_state(tensors).items():
        groups = alike(of_state)
        if state not in (State.weight, State.other) and not found:
            continue  # the same names and shapes again
        rows = [_alike_row(each, found) for each in groups]
        title = f"{state.value[:1].upper()}{state.value[1:]}"
        yield _tensors_table(title, rows, width)


def _alike_row(each: Alike, found: Mapping[str, Statistics]) -> dict[str, str]:
    row = _row(_short(parameter_of(each.name)), each.info, each.num_bytes)
    if not found:
        return row
    norms = _norms(each.statistics(found))
    layer = _number_in(each.largest(found)) if len(each.members) > 1 else ""
    counts = {name: norms.pop(name) for name in ("zero", "not finite")}
    return row | norms | {"in layer": layer} | counts


def tensors_tables(
    tensors: Mapping[str, TensorInfo], found: Mapping[str, Statistics], width: int
) -> Iterator[Table]:
    """The same with a row for each tensor."""
    for state, of_state in _by_state(tensors).items():
        rows = [
            _row(parameter_of(name), info, info.num_bytes) | (_norms(found[name]) if found else {})
            for name, info in of_state.items()
        ]
        yield _tensors_table(f"{state.value[:1].upper()}{state.value[1:]}", rows, width)


def _tensors_table(title: str, rows: list[dict[str, str]], width: int) -> Table:
    least = ("bytes", "dtype", "l2", "in layer", "zero", "shape")
    left = ("tensor", "shape", "dtype")
    return fitting_table(title, rows, width, least=least, left=left, wraps=("tensor",))


def _by_state(tensors: Mapping[str, TensorInfo]) -> dict[State, dict[str, TensorInfo]]:
    found: dict[State, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        found.setdefault(state_of(name), {})[name] = info
    return {state: found[state] for state in State if state in found}


def _row(name: str, info: TensorInfo, num_bytes: int) -> dict[str, str]:
    return {
        "tensor": name,
        "shape": " × ".join(map(str, info.shape)) or "scalar",
        "dtype": str(info.dtype).removeprefix("torch."),
        "bytes": in_units(num_bytes),
    }


def _norms(found: Statistics) -> dict[str, str]:
    share = found.num_zero / found.num_elements if found.num_elements else 0.0
    return {
        "l2": f"{found.norm:.4g}",
        "rms": f"{found.rms:.3g}",
        "max abs": f"{found.max_abs:.3g}",
        "zero": f"{share:.1%}" if found.num_zero else "0",
        "not finite": f"{found.num_not_finite:,}",
    }


def _short(name: str) -> str:
    """A name without what all names of the language model begin with."""
    return name.removeprefix("language_model.").removeprefix("decoder.")


def _number_in(name: str) -> str:
    """The number of its layer or block."""
    return ".".join(numbers_in(name))
