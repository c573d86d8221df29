"""torchrun, with the job's store at one address: `python -m launch.agent` takes torchrun's arguments.

torchrun's agent on the first node holds the store through which the ranks meet. torch would have it listen on
every interface; here it listens where the ranks look for it.
"""

import datetime
import sys
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import static_tcp_rendezvous
from torch.distributed.run import main as run

from k25_train.entry import FAULT, run_command
from k25_train.joining.listener import listen_at
from launch.output import keep_others_limited
from launch.temporary import temporary_folder


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


def main() -> None:
    """Run torchrun with the process's arguments."""
    run_command(_run, output_goes_on=True)


def _run() -> int:
    static_tcp_rendezvous.TCPStore = open_store  # type: ignore[misc, assignment]
    keep_others_limited()
    try:
        with temporary_folder():
            run()
    except ChildFailedError as error:
        # torchrun has shown it already; its own traceback would bury what the rank said.
        rank, failure = error.get_first_failure()
        print(
            f"rank {rank} failed first, with status {failure.exitcode}: its message is above", file=sys.stderr
        )
        return FAULT
    except SignalException as end:
        # Its ranks have been ended.
        print(f"torchrun was ended by {end.sigval.name}", file=sys.stderr)
        return 128 + end.sigval
    return 0


if __name__ == "__main__":
    main()
