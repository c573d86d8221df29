"""Before anything is built: all ranks are of one job, which is told by what each of them would run.

Every rank calls these functions, in the same order, and all raise the same error.
"""

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch.distributed as dist

from k25_train.config.schema import Config
from k25_train.errors import ConfigError, K25Error
from k25_train.escapes import named
from k25_train.joining.agreement import Kind, Statement, describe, differences, digest, to_ask
from k25_train.joining.council import ANSWER_S, ERRORS, Council
from k25_train.joining.environment import RankEnvironment
from k25_train.joining.facts import AT_START, DATA, facts_at_start, with_notes
from k25_train.joining.network import own_name
from k25_train.joining.words import some_of

DATA_S = 3600.0
"""Longest time that the slowest node may need to read the index of the data after the fastest one."""


class SameJob:
    """The ranks of a job while they find out whether they are of one."""

    def __init__(self, store: dist.Store, where: RankEnvironment) -> None:
        self.council = Council(dist.PrefixStore("agreement", store), where.rank, where.world_size)
        self.where = where

    def check_start(self, config: Config) -> None:
        """Compare configuration, code, packages and environment. Raises `ConfigError` naming every fact that
        differs, its values, and the nodes that have them."""
        if not self.where.is_alone:
            self._compare("what they run", AT_START, facts_at_start(config))

    def load_data[Loader](
        self, load: Callable[[], Loader], facts: Callable[[Loader], Mapping[str, str]]
    ) -> Loader:
        """Read the data on every rank, and compare what they are; returns what `load` does.

        Raises `ConfigError` if they differ, and on all ranks what `load` raises on one, with its node.
        """
        if self.where.is_alone:
            return load()
        loaded: list[Loader] = []
        own: Mapping[str, str] = {}
        failure: K25Error | None = None
        try:
            loaded.append(load())
            # The first rank of a node speaks for it: this takes as long as reading the index did.
            own = facts(loaded[0]) if self.where.local_rank == 0 else {}
        except Exception as error:  # told to all, whatever it is; a fault of the code goes its own way
            failure = named(error)
            if failure is None:
                raise
        self._share("reading the data", failure)
        self._compare("what they read", (DATA,), {DATA.name: own})
        return loaded[0]

    def _compare(self, topic: str, kinds: Sequence[Kind], facts: Mapping[str, Mapping[str, str]]) -> None:
        said = self._hear(topic, {kind: digest(own) for kind, own in facts.items()})
        # What ranks agree about is not told.
        asked: dict[str, list[int]] = self.council.decide(f"asked {topic}", to_ask(said, kinds), None)
        if not asked:
            return
        ranks = sorted({rank for own in asked.values() for rank in own})
        own_values = with_notes({kind: facts[kind] for kind in asked})
        heard = self.council.ask(f"values of {topic}", ranks, own_values)
        error = None
        if said:
            values = dict(zip(ranks, heard, strict=True))
            error = ConfigError(describe(differences(said, values, kinds), said))
        self.council.decide(f"verdict on {topic}", None, error)

    def _hear(self, topic: str, digests: dict[str, str], limit_s: float = ANSWER_S) -> list[Statement]:
        """What all ranks state, on rank 0; nothing on the others."""
        where = self.where
        own = Statement(
            rank=where.rank, node=where.node, host=own_name(), local_rank=where.local_rank, digests=digests
        )
        return [Statement(**values) for values in self.council.tell(topic, asdict(own), limit_s)]

    def _share(self, topic: str, failure: K25Error | None) -> None:
        """Raise a failure of some ranks on all of them."""
        own = {"failure": "" if failure is None else f"{type(failure).__name__}: {failure}"}
        said = self._hear(topic, {**own, "code": code_of(failure)}, DATA_S)
        self.council.decide(f"verdict on {topic}", None, failure_of(said), limit_s=2 * DATA_S)


def failure_of(said: Sequence[Statement]) -> K25Error | None:
    """The error of the ranks that failed, with their nodes unless it is that of all; None if none did."""
    by_text: dict[str, list[Statement]] = {}
    for statement in said:
        by_text.setdefault(statement.digests["failure"], []).append(statement)
    failed = [(text, ranks) for text, ranks in by_text.items() if text]
    if not failed:
        return None
    kind, _, text = failed[0][0].partition(": ")
    if len(by_text) > 1:
        texts = [f"{some_of(ranks, said)}: {text.partition(': ')[2]}" for text, ranks in failed]
        text = "\n".join(["some nodes fail where others do not", *(f"  {line}" for line in texts)])
    error = ERRORS.get(kind, ConfigError)(text)
    error.code = next((code for one in said if (code := one.digests["code"])), "")
    if len(by_text) > 1:
        error.of_ranks = tuple(one.rank for _, ranks in failed for one in ranks)
    return error


def code_of(failure: BaseException | None) -> str:
    """Name of the system's error behind a failure, such as EIO; empty if there is none."""
    while failure is not None:
        if isinstance(failure, OSError) and failure.errno:
            return errno.errorcode.get(failure.errno, "")
        if isinstance(failure, K25Error) and failure.code:
            return failure.code
        failure = failure.__cause__
    return ""
