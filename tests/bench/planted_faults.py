"""Planted faults in real parts, in real seconds: how long until the log names task, phase and cause of each.

    python -m tests.bench.planted_faults

    hung tool       an environment's step that never returns
    lost group      work that was sent to a shard, and has not arrived
    stale weights   an engine whose answers are of an older version
    judge 500       a judge's server that answers 500 to every request
    full disk       the journal's file system has no room; needs root, to mount one of 64 KiB
    dead shard      a shard's process is killed in the middle of a response

`rollout.manager.stuck_s` is 3. Seconds count from when the fault strikes. A full disk is noticed by the next
record of a rollout, so that the length of its turn (here up to 2 s) counts. Bar: 10 s each; exits with 1
where one is missed.
"""

import asyncio
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from k25_train.rollout.journal import Journal
from k25_train.rollout.journal_state import admitted
from k25_train.rollout.records import Record
from k25_train.rollout.trajectory import Group
from k25_train.rollout.trajectory import Response as Rolled
from tests.helpers.planted import (
    AsksServer,
    CallsPython,
    Log,
    Trial,
    answering_500,
    hanging,
    local,
    respond,
    sharded,
    talking,
    until_named,
)
from tests.helpers.scripted_engine import ScriptedEngine
from tests.helpers.tiny_disk import fill, tiny_disk

BAR_S = 10.0
PAGE_BYTES, RECORD_BYTES = 4096, 200
"""Of the small file system, and about a record of a group."""
TASK = "files/7#0"


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault, and what the line that names it has to say."""

    name: str
    words: tuple[str, ...]
    """Task, phase and cause."""
    plant: Trial
    needs_root: bool = False


HUNG = (TASK, "stuck", "phase tool", "python")
LOST = (TASK, "group 0", "phase given", "no event loop has it")
STALE = (TASK, "phase generate", "version -1 where 0 is due")
JUDGE = (TASK, "phase judge", "500")
FULL = (TASK, "phase record", "No space left on device")
DEAD = (TASK, "group 0", "phase segment", "exit status -9")


async def hung_tool(folder: Path, log: Log) -> None:
    """A tool never answers."""
    async with local(log, prompts=CallsPython()) as rollouts:
        await until_named(log, HUNG, respond(rollouts, hanging(log)), BAR_S)


async def lost_group(folder: Path, log: Log) -> None:
    """The message with the work is dropped, once."""
    async with sharded(folder, log, pause_s=0.0) as shards:
        send = shards.link.send

        async def lossy(peer: bytes, message: Record) -> None:
            if message.header["kind"] == "work" and not log.planted_at:
                log.strike()
            else:
                await send(peer, message)

        shards.link.send = lossy  # type: ignore[method-assign]
        await until_named(log, LOST, respond(shards.rollouts), BAR_S)


async def stale_weights(folder: Path, log: Log) -> None:
    """The first answer is of an older version; another engine is there."""
    engines = [ScriptedEngine(name="a", faults=["old"]), ScriptedEngine(name="b")]
    async with local(log, engines=engines) as rollouts:
        log.strike()
        await until_named(log, STALE, respond(rollouts), BAR_S)


async def judge_500(folder: Path, log: Log) -> None:
    """The judge's server fails."""
    async with answering_500(log) as url, local(log, judging=AsksServer(url)) as rollouts:
        await until_named(log, JUDGE, respond(rollouts), BAR_S)


async def full_disk(folder: Path, log: Log) -> None:
    """The journal's disk is filled behind the group's admission; turns go on until a record is refused."""
    with tiny_disk(folder / "disk") as disk:
        journal = Journal(disk / "journal", notice=log.tell)
        # A file has its last page to itself: it has to be written full, too.
        number = 0
        while number < 1 or -journal_size(disk / "journal") % PAGE_BYTES > RECORD_BYTES:
            group = Group(number=number, task="files/7", epoch=0, version=0, stamp={}, responses=[Rolled()])
            journal.append(admitted(group))
            journal.flush()
            number += 1
        fill(disk)
        log.strike()
        try:
            # Records are written behind the rollout's back: the one of a later turn is refused.
            async with local(log, engines=[ScriptedEngine(pause_s=0.03)]) as rollouts:
                await until_named(log, FULL, respond(rollouts, talking(), journal.append), BAR_S)
        finally:
            journal.close()


async def dead_shard(folder: Path, log: Log) -> None:
    """The shard is killed once a turn of the response has come."""
    async with sharded(folder, log, pause_s=0.5) as shards:

        def kill(record: Record) -> None:
            if not log.planted_at:
                log.strike()
                os.kill(shards.starter.pid(0), signal.SIGKILL)

        await until_named(log, DEAD, respond(shards.rollouts, append=kill), BAR_S)


def journal_size(folder: Path) -> int:
    """Bytes of its files."""
    return sum(path.stat().st_size for path in folder.iterdir())


FAULTS = (
    Fault("hung tool", HUNG, hung_tool),
    Fault("lost group", LOST, lost_group),
    Fault("stale weights", STALE, stale_weights),
    Fault("judge 500", JUDGE, judge_500),
    Fault("full disk", FULL, full_disk, needs_root=True),
    Fault("dead shard", DEAD, dead_shard),
)


def tried(fault: Fault) -> Log:
    """Plant it, and return what was told."""
    log = Log()
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(fault.plant(Path(folder), log))
    return log


def main() -> int:
    """Plant all; 1 where one was not named in time."""
    table = Table("fault", "seconds", "bar", "", "line", title="planted faults")
    missed: list[str] = []
    for fault in FAULTS:
        if fault.needs_root and os.geteuid():
            table.add_row(fault.name, "", "", "skipped", "needs root, to mount a small file system")
            continue
        log = tried(fault)
        found = log.naming(fault.words)
        if found is not None and found[0] <= BAR_S:
            table.add_row(fault.name, f"{found[0]:.1f}", f"{BAR_S:g}", "ok", found[1])
            continue
        missed.append(fault.name)
        said = "; ".join(line for _, line in log.lines) or "nothing"
        seconds = f"{found[0]:.1f}" if found else "never"
        table.add_row(fault.name, seconds, f"{BAR_S:g}", "MISSED", f"no {fault.words}, but: {said}")
    Console(width=160, markup=False).print(table)
    print(f"faults not named within {BAR_S:g} s: {', '.join(missed) or 'none'}   bar none")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
