"""The folder of an attempt as ranks, torchrun, SLURM and kernels leave it, for tests of who is to blame."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch import kernel_log
from launch.attempts import Attempts
from launch.blame.evidence import Evidence
from launch.blame.judge import judge
from launch.blame.verdict import Verdict
from launch.ends import EndsLog, log_of
from launch.history import Attempt
from launch.witnesses import collect

START_S = 1_795_992_000.0
"""When the attempt's first rank ends, since the epoch."""
FACTS: Mapping[str, Any] = {
    "kind": "DataError", "text": "", "is_fault": False, "is_shared": False, "is_of_peer": False, "code": "",
    "path": "", "instead": "", "raw": "", "of_ranks": [],
}  # fmt: skip
"""What a rank says of an error, as `k25_train.farewell` writes it."""
PEER_GONE = FACTS | {
    "kind": "MachineError",
    "text": "a connection between ranks failed: [gloo/transport/tcp/pair.cc:534] Connection closed by peer",
    "is_of_peer": True,
}


class RecordedAttempt:
    """An attempt on nodes n1 to n3 with two ranks each: what happened, then who is to blame."""

    def __init__(self, run: Path, num_nodes: int = 3) -> None:
        self.run = run
        self.attempts = Attempts(run)
        self.attempt: Attempt = self.attempts.start(7, [f"n{n + 1}" for n in range(num_nodes)], "abc")
        self.lost: dict[str, str] = {}
        self.silent_start = ""
        for number, node in enumerate(self.attempt.nodes, start=2):
            self._log(node).add(event="begin", addresses=[node, f"10.0.0.{number}", "127.0.0.1"])

    @property
    def folder(self) -> Path:
        """The attempt's folder."""
        return self.attempts.folder(self.attempt)

    def _log(self, node: str) -> EndsLog:
        return EndsLog(log_of(self.folder, node))

    def end(
        self, rank: int, status: int, at_s: float = 0.0, *, is_closing: bool = False, **error: Any
    ) -> "RecordedAttempt":
        """A rank ends, `at_s` after the first; `error` has what differs from `FACTS`."""
        self._log(self.attempt.nodes[rank // 2]).add(
            event="end", rank=rank, pid=1000 + rank, status=status, at_s=START_S + at_s,
            is_closing=is_closing, error={**FACTS, **error} if error else None,
        )  # fmt: skip
        return self

    def victims(self, *ranks: int, at_s: float = 0.3, peer: str = "") -> "RecordedAttempt":
        """Ranks end because a peer is gone; gloo may say which."""
        for rank in ranks:
            text = f"{PEER_GONE['text']} [{peer}]:31337" if peer else PEER_GONE["text"]
            self.end(rank, 2, at_s, **PEER_GONE | {"raw": text})
        return self

    def closed(self, *ranks: int, at_s: float = 1.0, status: int = -15) -> "RecordedAttempt":
        """torchrun ends the ranks that are left on its node."""
        for rank in ranks:
            self.end(rank, status, at_s, is_closing=True)
        return self

    def kernel(self, node: str, *texts: str) -> "RecordedAttempt":
        """The kernel of a node says something, of which only what matters is kept."""
        found = [line for text in texts if (line := kernel_log.classify(text)) is not None]
        lines = [{"kind": line.kind, "text": line.text, "pid": line.pid} for line in found]
        self._log(node).add(event="kernel", skipped="", lines=lines)
        return self

    def stall(self, *, silent: tuple[int, ...] = (), culprits: tuple[int, ...] = ()) -> "RecordedAttempt":
        """The watchdog reports a stall."""
        folder = self.run / "logs"
        folder.mkdir(exist_ok=True)
        doing = {str(rank): "step 8: train > forward" for rank in (*silent, *culprits)}
        found = {"first": 0, "silent": silent, "culprits": culprits, "cycle": [], "doing": doing}
        (folder / "stall.json").write_text(json.dumps(found))
        return self

    def srun(self, *lines: str) -> "RecordedAttempt":
        """srun reports, in this order."""
        with self.attempts.srun_log(self.attempt).open("a") as log:
            log.writelines(f"srun: error: {line}\n" for line in lines)
        return self

    def rank_log(self, rank: int, text: str) -> "RecordedAttempt":
        """A rank's log ends with this."""
        (self.folder / f"rank_{rank}.log").write_text(text)
        return self

    @property
    def evidence(self) -> Evidence:
        """What is collected of it."""
        return collect(self.attempts, self.attempt, 2, self.lost, self.silent_start)

    @property
    def verdict(self) -> Verdict:
        """Who is to blame."""
        return judge(self.evidence)
