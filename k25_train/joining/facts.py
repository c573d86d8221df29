"""What has to be the same on all ranks of a job, read on each of them; each kind with its remedy.

Training compares it before anything is built, preflight before anything costs much.
"""

import hashlib
import platform
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from k25_train.config.basics import is_url
from k25_train.config.leaves import leaves, plain_values
from k25_train.config.schema import Config
from k25_train.joining.agreement import Facts, Kind
from k25_train.joining.variables import shown, variable_facts
from k25_train.revision import code_version

CONFIGURATION = Kind(
    "configuration",
    "give every node the same settings on its command line, paths from the root on, and the same conf/",
)
CODE = Kind(
    "code",
    "start every node from one checkout, or from the same commit with the same changes",
    per_node=True,
)
PACKAGES = Kind(
    "packages", "install the same versions on every node, or start all from one image", per_node=True
)
ENVIRONMENT = Kind(
    "environment",
    "unset it where it was set by hand (NCCL also reads ~/.nccl.conf and /etc/nccl.conf), or set it for all "
    "ranks with cluster.environment",
)
DATA = Kind(
    "data set",
    "copy or build it again where it differs, or name one on a file system that all nodes share (data.dir)",
    per_node=True,
)
AT_START = (CONFIGURATION, CODE, PACKAGES, ENVIRONMENT)
"""What is known before the data are read."""
MAY_DIFFER = {
    "data.dir": "a node may read a copy of its own; what is in it is compared",
    "data.tokenizer": "as data.dir",
    "data.cache_dir": "each node's own disk",
    "cluster.secrets": "a file in a home folder, which may be elsewhere; what is in it is compared",
    "cluster.slurm.container_credentials": "a file in a home folder; read before any rank starts",
}
"""Key or section of the configuration that nodes may have otherwise -> why."""
OWN_PACKAGES = ("k25_train", "parallel", "launch")
NOT_CODE = (".md",)
"""Files in these packages that are not part of what runs."""
COMPILED = "__pycache__"
"""Folder of what Python compiles, into which other ranks write meanwhile."""
INSTALLED = (
    "torch", "triton", "megatron-core", "emerging-optimizers", "transformer-engine", "deep-ep",
    "flash-attn", "numpy", "safetensors", "pillow", "av", "resvg-py", "tokenizers", "tiktoken", "fsspec",
    "hydra-core", "omegaconf", "PyYAML", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13", "nvidia-cublas-cu12", "nvidia-cublas", "nvidia-cuda-runtime-cu12",
    "nvidia-cuda-runtime", "nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13",
)  # fmt: skip
"""Distributions that compute, communicate, or read data."""


def facts_at_start(config: Config) -> dict[str, dict[str, str]]:
    """Kind of `AT_START` -> the facts of this process."""
    cluster = config.cluster
    own = [*cluster.environment, *cluster.overrides]
    return {
        CONFIGURATION.name: configuration_facts(config),
        CODE.name: code_facts(),
        PACKAGES.name: package_facts(),
        ENVIRONMENT.name: variable_facts(own=own, secrets=cluster.secrets),
    }


def configuration_facts(config: Config) -> dict[str, str]:
    """Dotted key -> value, but for those that nodes may have otherwise."""
    if not is_url(config.run.dir):
        config = replace(config, run=replace(config.run, dir=str(Path(config.run.dir).absolute())))
    found = leaves(plain_values(config))
    return {key: shown(key, _text(value)) for key, value in found if not _may_differ(key)}


def _may_differ(key: str) -> bool:
    return any(f"{key}.".startswith(f"{other}.") for other in MAY_DIFFER)


def _text(value: object) -> str:
    """A value as it is written in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@cache
def code_facts() -> dict[str, str]:
    """File of this project's packages -> a hash of it, whether it comes from a checkout or is installed."""
    found = {}
    for name in OWN_PACKAGES:
        folder = package_folder(name)
        for path in sorted(folder.rglob("*")):
            is_hidden = COMPILED in path.parts or path.name.startswith(".")
            if not is_hidden and path.suffix not in NOT_CODE and path.is_file():
                found[f"{name}/{path.relative_to(folder)}"] = hashlib.sha256(path.read_bytes()).hexdigest()[
                    :12
                ]
    return found


def package_folder(name: str) -> Path:
    """Where a package of this project is imported from."""
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


@cache
def package_facts() -> dict[str, str]:
    """Package -> its version; of torch also the build, which a version does not tell."""
    found = {"Python": platform.python_version(), "machine": platform.machine()}
    for name in INSTALLED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    if "torch" in sys.modules:
        import torch

        found["torch's commit"] = str(torch.version.git_version)
        found["torch's CUDA"] = str(torch.version.cuda)
        if torch.cuda.is_available():
            found["NCCL"] = str(torch.cuda.nccl.version())
    return found


def data_facts_of(config: Config) -> dict[str, str]:
    """What is true of the data on this node, as a checkpoint keeps it (`data/fingerprint.py`).

    Reads the index, which takes seconds per million samples. Raises `DataError` or `ConfigError` for a data
    set that cannot be read.
    """
    # Imported late: launch imports this module, and needs no numpy.
    from k25_train.data.loader import DataLoader

    with DataLoader(config.data, config.train, config.model.vision) as loader:
        return loader.facts()


def with_notes(facts: Facts) -> dict[str, Mapping[str, str]]:
    """Facts with what helps to explain a difference but is none: the commit of the code."""
    notes = {CODE.name: {"commit": code_version(package_folder(OWN_PACKAGES[0]).parent)}}
    return {kind: {**notes.get(kind, {}), **own} for kind, own in facts.items()}
