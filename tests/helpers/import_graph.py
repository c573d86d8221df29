"""Who imports whom, read from the source: the drawing of the house, and the cycles in it.

`python -m tests.helpers.import_graph` prints every folder with its parts and what each of them imports of the
others. A command (`__main__.py`) lies on top of everything and is left out: nothing imports it.
"""

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from pathlib import Path

from tests.helpers.project_sources import CODE, REPO, imports_of, source_files

Graph = Mapping[str, set[str]]
"""Part -> the parts that it imports."""


def module_name(path: Path) -> str:
    """Dotted name of a file, `__init__` left out."""
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_imports() -> dict[str, set[str]]:
    """Dotted name of every module -> the modules of this project that it imports, commands left out."""
    files = {module_name(path): path for path in source_files(*CODE)}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        if not name.endswith(".__main__"):
            found[name] = {module for module in map(longest(files), imports_of(path)) if module} - {name}
    return found


def longest(names: Iterable[str]) -> "Lookup":
    """From an imported dotted name, which may be one within a module, to the module."""
    return Lookup(set(names))


class Lookup:
    """Finds the module that a dotted name lies in."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def __call__(self, imported: str) -> str | None:
        while imported and imported not in self._names:
            imported = imported.rpartition(".")[0]
        return imported or None


def parts_of(folder: str, imports: Graph) -> dict[str, set[str]]:
    """The modules and folders directly in a folder ("" is the whole) -> those of them that each imports."""
    graph: dict[str, set[str]] = {}
    for name, targets in imports.items():
        part = part_in(folder, name)
        if part is None:
            continue
        others = {part_in(folder, target) for target in targets} - {None, part}
        graph.setdefault(part, set()).update(other for other in others if other is not None)
    return graph


def part_in(folder: str, name: str) -> str | None:
    """Which direct part of a folder a module is or lies in, or None."""
    prefix = f"{folder}." if folder else ""
    if not name.startswith(prefix) or name == folder:
        return None
    return prefix + name.removeprefix(prefix).partition(".")[0]


def cycle_in(graph: Graph) -> list[str]:
    """Parts that import each other in a cycle, the first again at the end; empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def floors_of(graph: Graph) -> list[list[str]]:
    """The parts by floor: each imports only parts on floors below its own."""
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    floors = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        floors.append(ready)
        sorter.done(*ready)
    return floors


def folders(imports: Graph) -> list[str]:
    """Every folder that holds more than one part, the whole ("") first."""
    found = {""} | {name.rpartition(".")[0] for name in imports if "." in name}
    every = {".".join(name.split(".")[:depth]) for name in found for depth in range(len(name.split(".")) + 1)}
    return sorted(folder for folder in every if len(parts_of(folder, imports)) > 1)


def main() -> None:
    """Print every folder from its top floor down."""
    imports = module_imports()
    for folder in folders(imports):
        graph = parts_of(folder, imports)
        cycle = cycle_in(graph)
        print(f"\n{folder or 'the whole'}" + (f"  CYCLE: {' -> '.join(cycle)}" if cycle else ""))
        floors = [sorted(graph)] if cycle else reversed(floors_of(graph))
        for part in chain.from_iterable(floors):
            targets = ", ".join(sorted(target.rpartition(".")[2] for target in graph[part]))
            print(f"  {part.rpartition('.')[2]:22} {'-> ' + targets if targets else ''}")


if __name__ == "__main__":
    main()
