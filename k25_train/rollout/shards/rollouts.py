"""The first rank's side of shards: who has which work, and who gets it when a shard dies.

    respond ─► the shard of (group, sample) ─► records ─► append ─► the journal
                    │ dies, or gives no sign of life
                    └► started again: its work is given out again, as far as the journal has it

A response stays with its shard, which may keep its environment open between two rounds.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

from k25_train.errors import RolloutError
from k25_train.rollout.asking import Generates
from k25_train.rollout.engines.base import EngineError
from k25_train.rollout.manager.roll_call import Entry, RollCall
from k25_train.rollout.manager.snapshot import Snapshot, together
from k25_train.rollout.records import Record
from k25_train.rollout.shards.link import Link
from k25_train.rollout.shards.members import NOBODY, Given, Member, Starter
from k25_train.rollout.shards.messages import (
    generated_message,
    record_of,
    request_of,
    work_message,
)
from k25_train.rollout.shards.shard import ALIVE_S
from k25_train.rollout.work import Append, Work

SILENT_S = 15.0
"""Time without a sign of life after which a shard counts as dead. Our choice."""
START_S = 120.0
"""Time that a shard gets until its first one, and as much until it is built. Our choice."""
MOST_DEATHS = 20
"""Deaths of a shard without a response between them, or with the same response each time, after which a run
ends. Our choice."""
END_S = 10.0
"""Time that a shard gets to end by itself. Our choice."""


class ShardedRollouts:
    """See `Rollouts`."""

    def __init__(
        self,
        link: Link,
        starter: Starter,
        num_shards: int,
        begin: Record,
        engines: Generates,
        *,
        count: Callable[[str], None],
        notice: Callable[[str], None],
        stuck_s: float,
    ) -> None:
        """
        Args:
            link: to all shards.
            starter: starts them.
            num_shards: how many.
            begin: what each is built from.
            engines: for shards that ask the first rank for tokens.
            count: told what has happened, by kind.
            notice: tells what there is to know.
            stuck_s: seconds without a record after which work that no shard has counts as lost.
        """
        self._link = link
        self._starter = starter
        self._begin = begin
        self._engines = engines
        self._count, self._notice = count, notice
        self.members = [Member(number) for number in range(num_shards)]
        """Shards by number."""
        known = lambda: {name for member in self.members for name in member.known()}  # noqa: E731
        self._roll_call = RollCall(stuck_s, known, notice, time.monotonic)
        self._number = 0
        self._version = -1
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: Exception | None = None

    async def start(self) -> None:
        """Start all shards, and wait for none."""
        for member in self.members:
            member.heard = time.monotonic() + START_S
            await self._starter.start(member.number, member.incarnation, member.name.decode())
        self._spawn(self._lasting(self._receive_on()))
        self._spawn(self._lasting(self._watch_on()))

    async def respond(self, work: Work, append: Append) -> None:
        """See `Rollouts`."""
        if self._failure is not None:
            raise self._failure
        member = self.members[(work.group + work.sample) % len(self.members)]
        number, self._number = self._number, self._number + 1
        given = Given(work, append, asyncio.get_running_loop().create_future())
        member.given[number] = given
        try:
            with self._roll_call.given(given.name, work.group) as entry:
                given.append = _heard_by(entry, given, append)
                if member.is_there:
                    await self._give(member, number, given)
                await given.done
        except asyncio.CancelledError:
            await self._link.send(member.name, Record({"kind": "cancel", "number": number}))
            raise
        finally:
            member.given.pop(number, None)

    async def announce(self, version: int) -> None:
        """See `Rollouts`."""
        self._version = version
        for member in self.members:
            if member.is_there:
                await self._link.send(member.name, self._version_message())

    async def snapshot(self) -> Snapshot:
        """See `Rollouts`: as shards said with their latest signs of life."""
        said = [member.figures["snapshot"] for member in self.members if "snapshot" in member.figures]
        return together([Snapshot.from_json(each) for each in said])

    async def close(self) -> None:
        """See `Rollouts`."""
        await asyncio.gather(*(self._tell(member, Record({"kind": "drain"})) for member in self.members))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._starter.end(member.number, END_S) for member in self.members))
        self._link.close()

    async def _receive_on(self) -> None:
        by_name = {member.name: member for member in self.members}
        while True:
            try:
                peer, message = await self._link.receive()
            except ValueError as error:
                self._notice(f"a message of a shard cannot be read: {error}")
                continue
            if peer not in by_name:
                by_name = {member.name: member for member in self.members}
            # What an earlier incarnation still says is of nobody: its work was given out again.
            if (member := by_name.get(peer)) is not None and member.name == peer:
                await self._take(member, message)

    async def _take(self, member: Member, message: Record) -> None:
        header = message.header
        # While it is built, imports may hold its event loop up for long.
        is_built = header["kind"] == "built"
        member.heard = time.monotonic() if is_built else max(member.heard, time.monotonic())
        given = member.given.get(header.get("number", -1))
        match header["kind"]:
            case "hello":
                member.heard = time.monotonic() + START_S
                # Its queue may be full: others are heard meanwhile.
                self._spawn(self._welcome(member))
            case "alive":
                member.has = frozenset(message.arrays["numbers"].tolist())
                member.tells(header["figures"], self._count)
            case "unbuilt":
                self._fail(f"shard {member.number} cannot be built: {header['why']}")
            case "notice":
                self._notice(f"shard {member.number}: {header['text']}")
            case "record" if given:
                self._append(given, record_of(message))
            case "done" if given and not given.done.done():
                member.deaths = 0
                given.done.set_result(None)
            case "failed" if given and not given.done.done():
                error = EngineError if header["of"] == "engine" else RolloutError
                given.done.set_exception(error(header["why"]))
            case "generate":
                self._spawn(self._generate(member.name, message))

    async def _welcome(self, member: Member) -> None:
        name = member.name
        await self._link.send(name, self._begin)
        await self._link.send(name, self._version_message())
        if member.name != name:
            return
        member.is_there = True
        for number, each in list(member.given.items()):
            # It may have died, or the work ended, while others were sent.
            if member.name == name and number in member.given:
                await self._give(member, number, each)

    async def _give(self, member: Member, number: int, given: Given) -> None:
        if given.sent_to != member.incarnation:
            given.sent_to = member.incarnation
            await self._link.send(member.name, work_message(number, given.work))

    def _version_message(self) -> Record:
        return Record({"kind": "version", "version": self._version})

    def _append(self, given: Given, record: Record) -> None:
        try:
            given.append(record)
        except Exception as error:
            # The journal's; whoever waits for the response is told.
            if not given.done.done():
                given.done.set_exception(error)

    async def _generate(self, peer: bytes, message: Record) -> None:
        number = message.header["number"]
        try:
            answer = generated_message(number, await self._engines.generate(request_of(message)))
        except Exception as error:
            why = str(error) if isinstance(error, EngineError) else f"{type(error).__name__}: {error}"
            serving = self._engines.num_serving
            answer = Record({"kind": "refused", "number": number, "why": why, "serving": serving})
        await self._link.send(peer, answer)

    async def _watch_on(self) -> None:
        while True:
            due = time.monotonic() + ALIVE_S
            await asyncio.sleep(ALIVE_S)
            # What this event loop is late is no silence of others.
            late_s = max(time.monotonic() - due, 0.0)
            await asyncio.gather(*(self._look_at(member, late_s) for member in self.members))
            await self._find_lost()

    async def _look_at(self, member: Member, late_s: float) -> None:
        member.heard += late_s
        await self._tell(member, Record({"kind": "alive"}))
        why = self._starter.is_dead(member.number)
        if not why and time.monotonic() - member.heard > SILENT_S:
            why = f"no sign of life for {SILENT_S:g} s"
        if why:
            await self._again(member, why)

    async def _tell(self, member: Member, message: Record) -> None:
        """Send what may be missed: a shard that takes nothing is not waited for."""
        if member.is_there:
            with suppress(TimeoutError):
                async with asyncio.timeout(ALIVE_S):
                    await self._link.send(member.name, message)

    async def _find_lost(self) -> None:
        """Give work out again that no shard has."""
        lost = set(self._roll_call.look())
        for member in self.members if lost else ():
            for number, given in list(member.given.items()):
                if given.name in lost and member.is_there:
                    self._count("lost")
                    given.sent_to = NOBODY
                    await self._give(member, number, given)

    async def _again(self, member: Member, why: str) -> None:
        """Start a dead shard again; what it had is given out once it says hello."""
        await self._starter.end(member.number, 0.0)
        member.begin_again(time.monotonic() + START_S)
        deadly = [given.name for given in member.given.values() if given.deaths > MOST_DEATHS]
        self._count("shard_deaths")
        self._notice(
            f"shard {member.number} is dead ({why}): it is started again, and goes on with "
            f"{member.interrupted()} as far as the journal has them"
        )
        if member.deaths > MOST_DEATHS or deadly:
            what = f"shard {member.number} died {MOST_DEATHS + 1} times in a row, last: {why}"
            if deadly:
                what += f"; each time it had {', '.join(deadly[:3])}"
            self._fail(f"{what}. Nothing is lost: put right what kills it, and start again")
            return
        await self._starter.start(member.number, member.incarnation, member.name.decode())

    async def _lasting(self, call: Awaitable[None]) -> None:
        """Whatever ends what has to go on ends the run: nobody would be heard, or watched, any more."""
        try:
            await call
        except Exception as error:
            self._fail(f"shards are given up: {type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        """Have all that wait raise it, and all that come."""
        self._failure = RolloutError(why)
        for member in self.members:
            for given in member.given.values():
                if not given.done.done():
                    given.done.set_exception(self._failure)

    def _spawn(self, call: Awaitable[None]) -> None:
        task = asyncio.ensure_future(call)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _heard_by(entry: Entry, given: Given, append: Append) -> Append:
    """Records are appended, and heard of."""

    def heard(record: Record) -> None:
        given.latest = record.header["kind"]
        entry.heard(given.latest)
        append(record)

    return heard
