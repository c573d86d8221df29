"""torchrun, with the job's store at one address, and ranks that are watched.

    python -m launch.agent [--ends=FILE] [torchrun's arguments]

torchrun's agent on the first node holds the store through which the ranks meet. torch would have it listen on
every interface; here it listens where the ranks look for it. How ranks end is noted in FILE (`ends`), and one
that ends with status 0 before its command is done has failed: torchrun would wait for the others, and they
for it.
"""

import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic import multiprocessing
from torch.distributed.elastic.multiprocessing import SubprocessContext
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous
from torch.distributed.run import main as run

from k25_train.entry import FAULT, run_command
from k25_train.joining.listener import listen_at
from launch.blame.evidence import LEFT_EARLY
from launch.ends import EndsLog, NoLog, RankWatch
from launch.output import keep_others_limited
from launch.temporary import temporary_folder

ENDS = "--ends="


def open_store(
    address: str,
    port: int,
    num_nodes: int,
    is_master: bool,
    timeout: datetime.timedelta,
    **options: Any,
) -> dist.TCPStore:
    """What the static rendezvous calls in place of `TCPStore`; only node 0 listens."""
    if is_master:
        listener = listen_at(address, port, is_alone=num_nodes == 1)
        # The store closes it.
        options["master_listen_fd"] = listener.detach()
    return dist.TCPStore(address, port, num_nodes, is_master, timeout, **options)


def watched(watch: RankWatch) -> Callable[..., SubprocessContext]:
    """What starts ranks in place of torch's context: it tells `watch` how they end."""

    class Watched(SubprocessContext):
        """torch's, which looks at its ranks several times a second."""

        def _start(self) -> None:
            watch.begin(self.error_files)
            super()._start()

        def _poll(self) -> Any:
            self._note(is_closing=False)
            result = super()._poll()
            if result is not None:
                # torch has ended the ranks that were left.
                self._note(is_closing=True)
                watch.end()
            return result

        def _note(self, *, is_closing: bool) -> None:
            for local_rank, handler in self.subprocess_handlers.items():
                process = handler.proc
                if (status := process.poll()) is not None:
                    rank = int(self.envs[local_rank]["RANK"])
                    file = self.error_files[local_rank]
                    # From here on, torch sees the status that counts.
                    process.returncode = watch.note(rank, process.pid, status, file, is_closing=is_closing)

    return Watched


def main() -> None:
    """Run torchrun with the process's arguments."""
    run_command(_run, output_goes_on=True)


def _run() -> int:
    static_tcp_rendezvous.TCPStore = open_store  # type: ignore[misc, assignment]
    keep_others_limited()
    ends = [argument for argument in sys.argv[1:2] if argument.startswith(ENDS)]
    del sys.argv[1 : 1 + len(ends)]
    log = EndsLog(Path(ends[0].removeprefix(ENDS))) if ends else NoLog()
    multiprocessing.SubprocessContext = watched(RankWatch(log))  # type: ignore[misc, assignment]
    try:
        with temporary_folder():
            run()
    except ChildFailedError as error:
        # torchrun has shown it already; its own traceback would bury what the rank said.
        rank, failure = error.get_first_failure()
        said = "its message is above"
        if failure.exitcode == LEFT_EARLY:
            said = "it ended with status 0 before its command was done, and the others waited for it"
        print(f"rank {rank} failed first, with status {failure.exitcode}: {said}", file=sys.stderr)
        return FAULT
    except SignalException as end:
        # Its ranks have been ended.
        print(f"torchrun was ended by {end.sigval.name}", file=sys.stderr)
        return 128 + end.sigval
    return 0


if __name__ == "__main__":
    main()
