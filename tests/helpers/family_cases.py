"""What every family of tasks is held to: options that make it, and services to play its scripts with."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

from k25_train.environments.environment import Services
from k25_train.environments.family import Family
from k25_train.environments.registry import FAMILIES, make_family
from k25_train.environments.sandboxes.base import SandboxLimits
from k25_train.environments.sandboxes.on_demand import OnDemand
from k25_train.environments.sandboxes.opening import open_sandboxes
from k25_train.environments.toolsets.search.corpus import Document
from k25_train.environments.toolsets.search.index import build
from k25_train.rl.rewards.judges import open_judges

NAMES = sorted(FAMILIES)
LIMITS = SandboxLimits(
    cpus=1.0, memory_bytes=1 << 30, disk_bytes=1 << 28, processes=128, output_bytes=1 << 20, ttl_s=600
)


@cache
def small_index(folder: Path) -> Path:
    """A corpus of forty made-up packages with four modules each."""
    path = folder / "docs.sqlite"
    verbs = ("reads", "writes", "draws", "sorts", "joins", "cuts", "packs", "sends", "plays", "checks")
    things = ("tables", "graphs", "sounds", "maps")
    documents = []
    for number in range(40):
        package = f"{verbs[number % 10][:-1]}er{things[number // 10]}"
        version = f"{number % 7 + 2}.{number % 5}.{number}"
        documents.append(
            Document(
                name=f"{package}/description",
                title=f"{package} {version}: {verbs[number % 10]} {things[number // 10]}",
                text=f"What {package} is for. " * 20,
            )
        )
        for part in range(4):
            verb, thing = verbs[(number + part) % 10], things[number // 10]
            quote = f"Here it {verb} {thing} number {number} of part {part}."
            documents.append(
                Document(name=f"{package}/m{part}", title=f"{package}.m{part}: {quote}", text=quote * 5)
            )
    build(path, documents)
    return path


def family_of(name: str, folder: Path, **options: str) -> Family[Any]:
    """A family, as easy as it comes unless options say otherwise."""
    if name == "search":
        options["index"] = str(small_index(folder))
    return make_family(name, options)


@asynccontextmanager
async def services() -> AsyncIterator[Services]:
    """Real sandboxes and judges."""
    judges = open_judges(30.0, 2, places=4)
    sandboxes = OnDemand(lambda: open_sandboxes("bubblewrap", LIMITS, run="families", most=4, secret=[]))
    try:
        yield Services(sandboxes=sandboxes, judging=judges, tool_timeout_s=30)
    finally:
        await sandboxes.close()
        await judges.close()
