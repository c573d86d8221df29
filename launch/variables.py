"""Environment variables of the ranks: what follows from a cluster's file, joined with what its site wants."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from k25_train.config.cluster import ClusterConfig, Device
from k25_train.config.site import SiteVariable
from k25_train.errors import ConfigError

DECIDED = {
    "NCCL_IB_DISABLE": "hcas", "NCCL_NET": "hcas", "NCCL_IB_GID_INDEX": "gid_index",
    "NCCL_IB_ROCE_VERSION_NUM": "gid_index", "NCCL_IB_ADDR_FAMILY": "address_family",
    "NCCL_SOCKET_FAMILY": "address_family", "NCCL_COMM_ID": "interface",
}  # fmt: skip
"""Variable -> the key of `cluster.fabric` that it would make void, even where that key leads to others."""
HARMLESS = {("NCCL_IB_DISABLE", "0"), ("NCCL_NET", "IB")}
"""Values with which it would not."""
LIMITS = (
    "NCCL_MAX_CTAS", "NCCL_MIN_CTAS", "NCCL_MAX_NCHANNELS", "NCCL_MIN_NCHANNELS", "NCCL_MAX_NRINGS",
    "NCCL_MIN_NRINGS", "NCCL_MAX_P2P_NCHANNELS", "NCCL_MIN_P2P_NCHANNELS", "NCCL_NVLS_NCHANNELS",
    "NCCL_CGA_CLUSTER_SIZE",
)  # fmt: skip
"""Variables that would set one limit for all communicators, in place of that of each."""

NODE_NAME = "K25_NODE_NAME"
"""Variable in which a pod has Kubernetes' name of its node."""
FOREIGN = ("NCCL_",)
"""Beginnings of names of variables that the cluster's file alone sets, never the shell that starts a job."""
UNREAD = ("NCCL_VERSION",)
"""Variables of these names that images set and no library reads."""


class Variable(NamedTuple):
    """An environment variable of every rank."""

    name: str
    value: str
    reason: str
    """Why the variable has this value, in one line."""


def with_site(computed: Sequence[Variable], cluster: ClusterConfig) -> list[Variable]:
    """The variables that follow from the cluster's file, with what its site overrides and adds.

    Raises `ConfigError` if the file contradicts itself.
    """
    known = {variable.name: variable for variable in computed}
    for name, site in cluster.overrides.items():
        if name not in (*known, *LIMITS) and decided_by(name, site.value, cluster) is None:
            raise ConfigError(
                f"cluster.overrides.{name}={site.value}: nothing else in the cluster's file leads to this "
                "variable, so there is nothing to override: move it to cluster.environment"
            )
    for name, site in cluster.environment.items():
        check_addition(name, site, cluster, known)
    for name in sorted(cluster.secrets.keys() & known.keys()):
        raise ConfigError(
            f"cluster.secrets.{name}: follows from the rest of the cluster's file: leave it out"
        )
    # In place where they override, otherwise at the end.
    wanted = {**known, **_of_site(cluster.overrides)}
    added = {name: one for name, one in _of_site(cluster.environment).items() if name not in wanted}
    return [*wanted.values(), *added.values()]


def check_addition(
    name: str, site: SiteVariable, cluster: ClusterConfig, known: Mapping[str, Variable]
) -> None:
    """Raise `ConfigError` for an entry of `cluster.environment` that contradicts the rest of the file."""
    where = f"cluster.environment.{name}={site.value}"
    if name in known and known[name].value != site.value:
        raise ConfigError(
            f"{where}: contradicts {known[name].value}, which follows from the rest of the cluster's file "
            f"({known[name].reason}): leave it out, change what it follows from, or move it to "
            "cluster.overrides"
        )
    if name in LIMITS and cluster.device is Device.cuda:
        raise ConfigError(
            f"{where}: would set one limit for all communicators, each of which has its own, so that all of "
            "them fit a GPU together (parallel/communicators.py): change it there, or move this to "
            "cluster.overrides"
        )
    key = decided_by(name, site.value, cluster)
    if key is not None and name not in known:
        raise ConfigError(
            f"{where}: would make cluster.fabric.{key} void: set that key, or move this to cluster.overrides"
        )


def decided_by(name: str, value: str, cluster: ClusterConfig) -> str | None:
    """The key of the fabric that a variable would make void; None if there is no fabric or no such key."""
    if cluster.fabric is None or (name, value) in HARMLESS:
        return None
    return DECIDED.get(name)


def unset_foreign() -> str:
    """The line of shell that unsets `FOREIGN` variables."""
    return "unset " + " ".join(f'"${{!{start}@}}"' for start in FOREIGN)


def foreign_in(shell: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """Variables of a shell that its ranks do not get, or get with another value.

    Args:
        shell: its variables.
        wanted: those that follow from the cluster's file.
    """
    found = [name for name in shell if name.startswith(FOREIGN) and name not in UNREAD]
    return sorted(name for name in found if shell[name] != wanted.get(name))


def without_foreign(shell: Mapping[str, str]) -> dict[str, str]:
    """The variables of a shell without those that only the cluster's file sets."""
    return {name: value for name, value in shell.items() if not name.startswith(FOREIGN)}


def secrets_of(cluster: ClusterConfig) -> dict[str, str]:
    """Name -> value of the variables that are kept in files, as the batch script reads them.

    Raises `ConfigError` if a file cannot be read; it shows no value.
    """
    found = {}
    for name, path in cluster.secrets.items():
        try:
            found[name] = Path(path).expanduser().read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"cluster.secrets.{name}={path}: cannot be read ({type(error).__name__}): write the value "
                "into this file, readable by you only"
            ) from error
    return found


def _of_site(variables: Mapping[str, SiteVariable]) -> dict[str, Variable]:
    return {name: Variable(name, site.value, site.reason) for name, site in variables.items()}
