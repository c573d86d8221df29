"""The first process of a pod: meets the other pods, checks the nodes, trains, and says how that ended.

    python -m launch.kubernetes.pod CONFIG

Kubernetes sends it SIGTERM when the pod has to go; the ranks then finish their step, save and stop.
"""

import contextlib
import os
import signal
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from k25_train.compose.command_line import load_saved
from k25_train.config.schema import Config
from k25_train.entry import run_command
from k25_train.errors import K25Error
from k25_train.joining import network
from k25_train.joining.network import NetworkError, say
from launch import rendezvous, started_by
from launch.attempts import Attempts
from launch.forwarding import FORWARDED, Forwarding
from launch.gathering import GatheringError
from launch.kubernetes.manifest import section
from launch.kubernetes.outcomes import FAILED, FINISHED, STOPPED, UNFIT
from launch.kubernetes.pod_spec import FIRST_NODE
from launch.torchrun import Place, find_place, meet, start_command

INDEX = "JOB_COMPLETION_INDEX"
"""Kubernetes' number of the pod within its job."""
SEEN_WITHIN_S = 30.0
"""How long a pod looks for the last step in the metrics, which the first one writes: file systems cache."""


class SignalledError(K25Error):
    """The pod has to go, and has no ranks."""


def main() -> None:
    """Be the first process of a pod."""
    run_command(_run, output_goes_on=True)


def _run() -> int:
    # At once: the first process of a container ignores signals that it does not handle.
    forwarding = Forwarding()
    (path,) = started_by.arguments("CONFIG")
    config = load_saved(Path(path))
    kubernetes = section(config)
    node, first = started_by.number(INDEX), started_by.variable(FIRST_NODE)
    place = find_place(config, node, f"{first}:{kubernetes.port}" if config.cluster.nodes > 1 else None)
    try:
        return run_ranks(config, place, forwarding, ["--config", path], is_first=node == 0)
    except SignalledError:
        say("told to end before it had ranks: the JobSet starts all pods again")
        return STOPPED
    except (NetworkError, rendezvous.RendezvousError, GatheringError) as error:
        # Pods that are still fetching the image will be there next time.
        say(f"{type(error).__name__}: {error}")
        return FAILED


@contextlib.contextmanager
def ending_at_signals(forwarding: Forwarding) -> Iterator[None]:
    """Raise `SignalledError` at a signal, also at one that has come: waiting takes minutes, and has no ranks
    that would save."""

    def end(number: int, _frame: types.FrameType | None) -> None:
        forwarding.received.append(number)
        raise SignalledError(signal.Signals(number).name)

    before = {number: signal.signal(number, end) for number in FORWARDED}
    try:
        if forwarding.received:
            raise SignalledError(signal.Signals(forwarding.received[0]).name)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_ranks(
    config: Config, place: Place, forwarding: Forwarding, arguments: Sequence[str], *, is_first: bool
) -> int:
    """Check the nodes, and train; the pod's exit status. Raises what says that nodes do not come together."""
    with ending_at_signals(forwarding):
        wait_for_name(place.address, rendezvous.JOIN_S)
    if section(config).preflight:
        status = start(config, place, forwarding, "launch.preflight", arguments)
        if status and not forwarding.received:
            say(
                "preflight failed: the first pod's log says on which nodes; repair them, or name them in "
                "cluster.kubernetes.exclude, and create the JobSet again"
            )
            return UNFIT
    # Another port: a pod that comes early would otherwise find the store of the preflight.
    place = replace(place, port=place.port + 1)
    status = start(config, place, forwarding, "k25_train.any_run", arguments)
    if status == 0 and has_finished(config, 0.0 if is_first else SEEN_WITHIN_S):
        return FINISHED
    if status == 0 or forwarding.received:
        say("stopped before the last step: the JobSet starts all pods again")
        return STOPPED
    return FAILED


def start(config: Config, place: Place, forwarding: Forwarding, module: str, arguments: Sequence[str]) -> int:
    """Run a module on this node's ranks, once all nodes are there; its status. Raises `SignalledError`."""
    with ending_at_signals(forwarding):
        meet(config, place)
    # Ranks that have just been started would die of the signal.
    if forwarding.received:
        return STOPPED
    # The manifest has set the variables.
    return forwarding.run(start_command(config, place, module, arguments), os.environ)


def wait_for_name(host: str, limit_s: float) -> None:
    """Return once the first pod's name resolves, which takes a while after it was created.

    Raises `NetworkError` after `limit_s`.
    """
    start_s, told_s = time.monotonic(), 0.0
    while True:
        try:
            network.resolve(host)
        except NetworkError as error:
            waited_s = time.monotonic() - start_s
            if waited_s >= limit_s:
                raise
            if waited_s - told_s >= network.PROGRESS_S:
                told_s = waited_s
                say(f"{error}; {waited_s:.0f} of at most {limit_s:g} s")
            time.sleep(1.0)
        else:
            return


def has_finished(config: Config, within_s: float) -> bool:
    """Whether the metrics have the last step, or do so within this time."""
    attempts, deadline = Attempts(Path(config.run.dir)), time.monotonic() + within_s
    while True:
        last = attempts.progress().last
        if last is not None and last >= config.train.steps:
            return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)


if __name__ == "__main__":
    main()
