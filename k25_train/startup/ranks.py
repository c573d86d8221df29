"""How many ranks were started, by the variables that torchrun sets."""

import os

from k25_train.config.schema import Config
from k25_train.errors import ConfigError


def number_of(variable: str, default: int) -> int:
    """The whole number that an environment variable holds, `default` where it is not set.

    Raises:
        ConfigError: it holds something else.
    """
    text = os.environ.get(variable)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(
            f"{variable}={text!r}: must be a whole number, as torchrun sets it\n"
            f"  -> unset {variable} to run one process, or start the ranks with torchrun"
        )
    return int(text)


def check_world_size(config: Config) -> None:
    """Raise `ConfigError` unless as many processes were started as the configuration counts on."""
    started = number_of("WORLD_SIZE", 1)
    if started == config.world_size:
        return
    nodes, per_node = config.cluster.nodes, config.cluster.gpus_per_node
    raise ConfigError(
        f"{started} process(es) started, but cluster.nodes={nodes} x cluster.gpus_per_node={per_node} = "
        f"{config.world_size} ranks are configured: start them with "
        f"`torchrun --nnodes {nodes} --nproc-per-node {per_node} -m k25_train.train …`, or run alone with "
        "`parallelism=serial cluster.nodes=1 cluster.gpus_per_node=1`"
    )
