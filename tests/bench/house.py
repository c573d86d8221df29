"""Is the house in order: measures of files, functions, types, comments, imports and words, with their bars.

    python -m tests.bench.house

Exits with 1 if a measure falls short of its bar. The hard bars are unit tests in tests/unit/repo as well.
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.helpers.import_graph import cycle_in, folders, module_imports, parts_of
from tests.helpers.measures import (
    Source,
    comment_density,
    deepest_nesting,
    file_lengths,
    functions_by_length,
    germanisms_in,
    has_docstring,
    is_typed,
    median,
    percentile,
    prose_of,
    public_functions,
    read_source,
    tests_for_none,
)
from tests.helpers.project_sources import CODE, REPO, imports_of, in_test_modules, source_files

MAX_MEDIAN_LINES, MAX_P90_LINES, MAX_FUNCTION_LINES, MAX_NESTING = 130, 240, 70, 4
MIN_COMMENTS = 4.0
"""Comment lines per 100 lines of code."""
COMMENTED = ("parallel", "k25_train/training")
"""Folders that have so many comments."""
MAX_NONE_IN_TRAINING = 12
"""A third of the tests for None that `training/` had when its options were None."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A number of the source, and what it may be."""

    name: str
    found: float | str
    bar: str
    """Empty if there is none."""
    is_met: bool


def at_most(name: str, found: float, most: float, detail: str = "") -> Measure:
    """A measure with an upper bar."""
    return Measure(name, f"{found:g}{detail}", f"<= {most:g}", found <= most)


def at_least(name: str, found: float, least: float, unit: str = "") -> Measure:
    """A measure with a lower bar."""
    return Measure(name, f"{found:.3g}{unit}", f">= {least:g}{unit}", found >= least)


def sources_in(*folders: str) -> list[Source]:
    """Parsed files of these folders."""
    return [read_source(path) for path in source_files(*folders)]


def lengths() -> Iterator[Measure]:
    """Files and functions are short."""
    sources = sources_in(*CODE)
    files, functions = file_lengths(sources), functions_by_length(sources)
    yield at_most("lines of a file, median", median(files), MAX_MEDIAN_LINES)
    yield at_most("lines of a file, 90th percentile", percentile(files, 0.9), MAX_P90_LINES)
    yield Measure("lines of a file, largest", files[-1], "", True)
    yield Measure("functions above 60 lines", sum(lines > 60 for lines, _ in functions), "", True)
    yield at_most("functions above 70 lines", sum(lines > MAX_FUNCTION_LINES for lines, _ in functions), 0)
    longest, name = functions[0]
    yield at_most("longest function", longest, MAX_FUNCTION_LINES, f" {name}")
    nesting = max(deepest_nesting(function) for source in sources for function in source.functions)
    yield at_most("blocks within blocks", nesting, MAX_NESTING)


def descriptions() -> Iterator[Measure]:
    """Functions say their types and what they do; comments say why, and where in the algorithm one is."""
    public = [function for source in sources_in(*CODE) for function in public_functions(source)]
    yield at_least("public functions with every type", 100 * share(map(is_typed, public)), 100, " %")
    yield at_least("public functions with a docstring", 100 * share(map(has_docstring, public)), 97, " %")
    for folder in dict.fromkeys((*CODE, *COMMENTED, "tests")):
        name, found = f"comment lines per 100 of code, {folder}/", comment_density(sources_in(folder))
        if folder in COMMENTED:
            yield at_least(name, found, MIN_COMMENTS)
        else:
            yield Measure(name, f"{found:.3g}", "", True)


def share(holds: Iterable[bool]) -> float:
    """How many of them are true, of all."""
    values = list(holds)
    return sum(values) / len(values)


def imports() -> Iterator[Measure]:
    """No cycles, no arrows back up, no test module that another needs."""
    graph = module_imports()
    cycle = cycle_in(graph)
    yield Measure("import cycle of files", " -> ".join(cycle) or "none", "none", not cycle)
    cycles = [found for folder in folders(graph) if (found := cycle_in(parts_of(folder, graph)))]
    described = "; ".join(" -> ".join(found) for found in cycles)
    yield Measure("folders with arrows back", described or "none", "none", not cycles)
    importing = sum(bool(in_test_modules(imports_of(path))) for path in source_files("tests"))
    yield at_most("modules that import a test module", importing, 0)


def options() -> Iterator[Measure]:
    """Options that are off are twins that do nothing, not None."""
    step = read_source(REPO / "k25_train/training/step.py")
    yield at_most("tests for None, training/step.py", tests_for_none(step), 0)
    of_training = sum(map(tests_for_none, sources_in("k25_train/training")))
    yield at_most("tests for None, training/", of_training, MAX_NONE_IN_TRAINING)


def words() -> Iterator[Measure]:
    """Prose in the field's own English."""
    for folder in (*CODE, "tests"):
        found = sum(germanisms_in(prose_of(source)) for source in sources_in(folder))
        yield at_most(f"Germanisms, {folder}/", found, 0)
    pages = [path for path in REPO.rglob("*.md") if not is_foreign(path)]
    yield at_most("Germanisms, *.md", germanisms_in(path.read_text() for path in pages), 0)


def is_foreign(path: Path) -> bool:
    """Whether a file came with set-up, data or a run."""
    return path.relative_to(REPO).parts[0] in (".venv", "datasets", "runs", ".pytest_cache")


def main() -> None:
    """Print every measure with its bar."""
    table = Table("measure", "found", "bar", "", title="the house")
    is_in_order = True
    for part in (lengths, descriptions, imports, options, words):
        for each in part():
            verdict = "" if not each.bar else "ok" if each.is_met else "FALLS SHORT"
            table.add_row(each.name, str(each.found), each.bar, verdict)
            is_in_order &= each.is_met
        table.add_section()
    Console().print(table)
    sys.exit(not is_in_order)


if __name__ == "__main__":
    main()
