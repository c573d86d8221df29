"""What NCCL's connections between nodes are, read from its own log: RDMA from GPU memory, RDMA, or TCP.

NCCL falls back without an error: to the host's memory where cards cannot reach the GPU's, and to TCP where it
finds no card. It says so in its log, once per connection.
"""

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from launch.preflight.findings import Finding, failed, passed, skipped, warned

TRANSPORT = "transport between nodes"
GPU_MEMORY = "GDRDMA"
"""NCCL's word for RDMA from and to GPU memory."""
SOCKET = "Socket"
CONNECTION = re.compile(r"\[(?:send|receive)\] via (?:NET|COLLNET)/([^/\n]+)(\S*)")
"""A line per connection, e.g. `Channel 03/0 : 1[1] -> 9[1] [send] via NET/IB/3/GDRDMA`; names of plugins have
spaces (`AWS Libfabric`), and GDRDMA may be followed by its way (`GDRDMA(PCI)`)."""
SETTINGS = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET"}
FILE = "NCCL_DEBUG_FILE"


class Log:
    """NCCL's log of this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def transports(self) -> dict[str, int]:
        """Kind of connection, e.g. `IB/GDRDMA`, `IB` or `Socket` -> number of them."""
        return parse_transports(self._text())

    def warnings(self) -> list[str]:
        """NCCL's warnings, which it would otherwise have printed."""
        return [line for line in self._text().splitlines() if "NCCL WARN" in line]

    def _text(self) -> str:
        return "".join(
            file.read_text(encoding="utf-8", errors="replace") for file in sorted(self._folder.iterdir())
        )


@contextlib.contextmanager
def recorded_log() -> Iterator[Log]:
    """Let NCCL, which must not have been used before in this process, write its log into a file meanwhile.

    Its warnings are printed at the end. It keeps writing to the file's last name if it is used later.
    """
    folder = Path(tempfile.mkdtemp(prefix="k25-nccl-"))
    log = Log(folder)
    values = SETTINGS | {FILE: str(folder / "%h.%p")}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield log
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for line in log.warnings():
            print(line, file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)


def parse_transports(text: str) -> dict[str, int]:
    """Kind of connection -> number of them, in NCCL's log."""
    return dict(
        Counter(
            f"{network}/{GPU_MEMORY}" if f"/{GPU_MEMORY}" in rest else network
            for network, rest in CONNECTION.findall(text)
        )
    )


def judge_transports(
    by_rank: Mapping[int, Mapping[str, int]], ranks: Mapping[str, Collection[int]], absent: str
) -> dict[str, Finding]:
    """Node -> finding on its connections to other nodes.

    Args:
        by_rank: rank -> kind of connection -> number; without ranks that connected to none.
        ranks: node -> its ranks.
        absent: why a node without any connection has none.
    """
    findings = {}
    for node, own in ranks.items():
        counts = sum((Counter(by_rank.get(rank, {})) for rank in own), Counter[str]())
        total = sum(counts.values())
        direct = sum(n for kind, n in counts.items() if kind.endswith(f"/{GPU_MEMORY}"))
        kinds = ", ".join(f"{n} by {kind}" for kind, n in sorted(counts.items()))
        if not total:
            findings[node] = skipped(TRANSPORT, absent)
        elif SOCKET in counts:
            rule = "cluster.fabric names RDMA cards; TCP is many times slower"
            remedy = "see network cards and RoCE v2 GID, and whether libibverbs and its drivers are installed"
            findings[node] = failed(TRANSPORT, kinds, rule, remedy)
        elif direct < total:
            rule = f"NCCL should move data from and to GPU memory ({GPU_MEMORY})"
            remedy = "see GPUDirect RDMA and GPU to network card; NCCL_NET_GDR_LEVEL in cluster.environment"
            findings[node] = (warned if direct else failed)(TRANSPORT, kinds, rule, remedy)
        else:
            findings[node] = passed(TRANSPORT, kinds)
    return findings
