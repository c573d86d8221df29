"""What can be said about a rank's place before torch is loaded, which takes seconds."""

import contextlib
from collections.abc import Iterator

from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.joining.environment import RankEnvironment, read_environment
from k25_train.joining.network import NetworkError, check_is_own, listen, resolve


class JoinError(ConfigError):
    """The ranks of a job cannot find each other."""


def check_place(config: Config) -> None:
    """Check the place of this process in the job.

    Raises:
        ConfigError: a variable is wrong, or another number of processes was started than is configured.
        JoinError: the host at which ranks meet does not resolve or, on the rank that has to open the job's
            store there, is another machine; or the port is taken.
    """
    where = place_in(config)
    if not where.is_alone:
        with naming_variables(where):
            address = reachable_name(where)
            if where.opens_store:
                with listen(where.port) as listener:
                    check_is_own(address, listener)


def place_in(config: Config) -> RankEnvironment:
    """The place of this process in the job.

    Raises `ConfigError` if a variable is wrong, or the configuration counts on another number of processes.
    """
    where = read_environment()
    check_world_size(config, where)
    return where


@contextlib.contextmanager
def naming_variables(where: RankEnvironment) -> Iterator[None]:
    """Raise `JoinError` with the variables in place of `NetworkError`."""
    try:
        yield
    except NetworkError as error:
        raise JoinError(
            f"MASTER_ADDR={where.address} MASTER_PORT={where.port} in the environment of rank {where.rank}: "
            f"{error}{where.origin}"
        ) from error


def check_world_size(config: Config, where: RankEnvironment) -> None:
    """Raise `ConfigError` unless as many processes were started as the configuration counts on."""
    if where.world_size == config.world_size:
        return
    nodes, per_node = config.cluster.nodes, config.cluster.gpus_per_node
    module = "k25_train.train" if config.algorithm is None else "k25_train.rl"
    raise ConfigError(
        f"{where.world_size} process(es) started, but cluster.nodes={nodes} x "
        f"cluster.gpus_per_node={per_node} = {config.world_size} ranks are configured: start them with "
        f"`torchrun --nnodes {nodes} --nproc-per-node {per_node} -m {module} …`, or run alone with "
        "`parallelism=serial cluster.nodes=1 cluster.gpus_per_node=1`"
        + ("" if where.is_alone else where.origin)
    )


def reachable_name(where: RankEnvironment) -> str:
    """The host at which ranks meet.

    That is this machine if all ranks are here, even if its own name does not resolve, which is the address
    that `torchrun --standalone` uses. Raises `NetworkError` if the name does not resolve.
    """
    try:
        resolve(where.address)
    except NetworkError:
        if not where.is_on_one_node:
            raise
        return "127.0.0.1"
    return where.address
