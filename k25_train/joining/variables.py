"""Environment variables that all ranks must have alike: those that decide what libraries do, by name."""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from k25_train.config.forms import PASSWORD_IN_URL
from k25_train.config.site import is_secret

COMPARED = re.compile(
    r"(NCCL|GLOO|TORCH|TORCHINDUCTOR|PYTORCH|CUDA|CUBLAS|CUBLASLT|CUDNN|NVTE|NVSHMEM|DEEP_EP|TRITON|UCX|UCC"
    r"|MEGATRON|OMP|KMP|GOMP|MKL|OPENBLAS|DNNL)_\w+"
)
"""Variables of libraries for communication and computing."""
MAY_DIFFER = {
    "which of its devices a node gives to the job, or to a rank": r"CUDA_VISIBLE_DEVICES",
    "names of interfaces and cards, and rows of their tables, which nodes may have otherwise": (
        r"\w+_SOCK(ET)?_IFNAME|NCCL_IB_HCA|\w+_IB_GID_INDEX|NCCL_HOSTID|NVSHMEM_HCA_\w+|UCX_NET_DEVICES"
    ),
    "cores that a rank is bound to": r"OMP_PLACES|OMP_PROC_BIND|KMP_AFFINITY|GOMP_CPU_AFFINITY",
    "what a node writes to its log: one may be looked at alone": (
        r"(NCCL|NVSHMEM|NVTE)_DEBUG(_\w+)?|UCX_LOG_\w+|TORCH_(CPP_)?LOGS?(_\w+)?"
    ),
    "where a node keeps files; the versions of what is in them are compared": (
        r"\w+_(HOME|PATH|ROOT|DIR|DIRECTORY|FILE)"
    ),
    "set by an image for itself": r"(NCCL|CUDA|CUDNN|PYTORCH)_VERSION|(PYTORCH|TORCH|TRITON)_BUILD_\w+",
}
"""Why -> variables that are not compared."""
_MAY_DIFFER = re.compile("|".join(f"(?:{names})" for names in MAY_DIFFER.values()))
NCCL_FILES = ("~/.nccl.conf", "/etc/nccl.conf")
"""Files with variables that NCCL reads as if they were set, where they are not; the first one may be named by
NCCL_CONF_FILE. Source: NCCL's user guide, environment variables."""


def variable_facts(
    environment: Mapping[str, str] = os.environ,
    own: Iterable[str] = (),
    secrets: Iterable[str] = (),
    nccl_files: Iterable[str] = NCCL_FILES,
) -> dict[str, str]:
    """The variables of this process that are compared; a secret by its digest.

    Args:
        environment: all variables.
        own: names that are compared in any case: those of the cluster's file.
        secrets: names whose value is not told.
        nccl_files: files of NCCL's settings.
    """
    hidden, always = set(secrets), {*own, *secrets}
    known = {**nccl_settings(environment, nccl_files), **environment}
    names = [name for name in known if name in always or is_compared(name)]
    return {name: shown(name, known[name], hidden) for name in sorted(names)}


def is_compared(name: str) -> bool:
    """Whether a variable has to be the same on all ranks."""
    return bool(COMPARED.fullmatch(name)) and not _MAY_DIFFER.fullmatch(name)


def shown(name: str, value: str, hidden: Iterable[str] = ()) -> str:
    """A value as it is told; of a secret only so much that two of them differ."""
    if name in hidden or is_secret(name) or PASSWORD_IN_URL.search(value):
        # 32 bits tell values apart, and fit too many of them to find the secret by trying.
        return f"(secret, not shown; digest {hashlib.sha256(f'{name}={value}'.encode()).hexdigest()[:8]})"
    return value if value.isprintable() and value else repr(value)


def nccl_settings(environment: Mapping[str, str], files: Iterable[str]) -> dict[str, str]:
    """What NCCL's files set on this machine; the first one that has a variable decides."""
    user, *others = files
    found: dict[str, str] = {}
    for path in (environment.get("NCCL_CONF_FILE") or user, *others):
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8", errors="replace")
        except (OSError, RuntimeError):
            continue
        for line in text.splitlines():
            name, equals, value = line.partition("=")
            if equals and not name.lstrip().startswith("#"):
                found.setdefault(name.strip(), value.strip())
    return found
