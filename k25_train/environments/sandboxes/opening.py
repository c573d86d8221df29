"""Opens the kind of sandboxes that a configuration names."""

from collections.abc import Callable, Sequence
from pathlib import Path

from k25_train.environments.sandboxes.apptainer import open_instances
from k25_train.environments.sandboxes.base import Sandboxes, SandboxLimits
from k25_train.environments.sandboxes.bubblewrap import open_bubblewrap
from k25_train.environments.sandboxes.container import open_containers
from k25_train.environments.sandboxes.kubernetes import open_pods
from k25_train.environments.sandboxes.owners import this_process
from k25_train.environments.sandboxes.remote import Driver, RemoteSandboxes

_DRIVERS: dict[str, Callable[[str], Driver]] = {
    "container": open_containers,
    "kubernetes": open_pods,
    "apptainer": open_instances,
}


def open_sandboxes(
    kind: str,
    limits: SandboxLimits,
    *,
    image: str = "",
    run: str,
    most: int,
    secret: Sequence[Path],
) -> Sandboxes:
    """Sandboxes of a kind; `reconcile` once before the first is opened.

    Args:
        kind: `environment.sandbox.kind`: bubblewrap, container, kubernetes or apptainer.
        limits: of each.
        image: `environment.sandbox.image`; empty for bubblewrap.
        run: name of the run, for labels.
        most: how many may be open at once.
        secret: folders of which no sandbox sees anything, such as the run's.

    Raises MachineError, with the remedy, where the machine cannot have them.
    """
    if kind == "bubblewrap":
        return open_bubblewrap(limits, run=run, most=most, secret=secret)
    driver = _DRIVERS[kind](image)
    return RemoteSandboxes(driver, limits, owner=this_process(run), most=most, secret=secret)
