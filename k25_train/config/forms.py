"""Forms of texts that other programs read: SLURM, NCCL, pyxis and the shell.

`#SBATCH` lines and options of srun have no quotes that every version of SLURM agrees on, so characters that
SLURM could misread are refused.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from parallel.config import Problem

NOT_SHOWN = "(not shown)"
"""Value that errors give for what could be a secret."""
_RESOURCE = r"[A-Za-z][\w-]*(?::[\w.-]+)?(?::\d+)?"
_HOSTS = r"(?:[\w.-]|\[\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*\])+"
SAFE_NAME = re.compile(r"[\w@+=:,./~-]+", re.ASCII)
"""Text that SLURM reads literally, in a `#SBATCH` line and in an option of srun."""
PASSWORD_IN_URL = re.compile(r"\w+://[^/@#\s:]+:[^/@#\s]+@")
"""A user with a password, as in `https://USER:PASSWORD@HOST`."""
PASSWORD_IN_IMAGE = re.compile(r"(?:docker://)?[^/@#\s:]+:(?!//)[^/@#\s]+@(?!sha256:)")
"""A user with a password at the start of an image's reference; `IMAGE:TAG@sha256:…` is none."""


class Form(NamedTuple):
    """What a text has to look like."""

    pattern: re.Pattern[str]
    """Matches the whole text."""
    rule: str
    remedy: str

    def misfits(self, values: Iterable[tuple[str, object]]) -> list[Problem]:
        """Problems of the named values that are texts of another form."""
        return [
            Problem(name, repr(value), self.rule, self.remedy)
            for name, value in values
            if isinstance(value, str) and not self.pattern.fullmatch(value)
        ]


NAME = Form(
    SAFE_NAME,
    "must consist of letters, digits and @+=:,./~-_ only: SLURM and NCCL know no quotes",
    "rename it, or link to it by another path",
)
MEMORY = Form(
    re.compile(r"\d+[KMGT]?"),
    "must be a number of MiB, or one with K, M, G or T; 0 is all of a node's memory",
    "e.g. 1900G, or null for the partition's default",
)
GRES = Form(
    re.compile(f"{_RESOURCE}(?:,{_RESOURCE})*", re.ASCII),
    "must list NAME:COUNT or NAME:TYPE:COUNT, separated by commas",
    "e.g. gpu:h800:8; `scontrol show node` has the names and types in its line Gres",
)
CONSTRAINT = Form(
    re.compile(r"[\w.+:@=,&|*()\[\]!-]+", re.ASCII),
    "must be names of node features, joined by & | * ( ) [ ] only",
    "e.g. h800&roce or [rack1|rack2]; `sinfo --format=%N,%f` lists the features",
)
HOST_LIST = Form(
    re.compile(f"{_HOSTS}(?:,{_HOSTS})*", re.ASCII),
    "must be a list of nodes as SLURM writes it",
    "e.g. n7 or n[1-3,7],m5",
)
COMMENT = Form(
    re.compile(r"[\w@+=:,./~-](?:[\w@+=:,./~ -]*[\w@+=:,./~-])?", re.ASCII),
    "must consist of letters, digits, spaces and @+=:,./~-_ only",
    "leave out quotes and other characters",
)
SBATCH_OPTION = Form(
    re.compile(r"--[a-z][a-z0-9-]*(=[\w@+=:,./~%\[\]()|&*!^-]+)?", re.ASCII),
    "must be one option in its long form, --NAME or --NAME=VALUE, without spaces or quotes",
    "e.g. --mail-type=FAIL; what a shell should run belongs into cluster.slurm.setup",
)
SETUP = Form(
    re.compile(r"[ \t]*[^\s\x00-\x1f\x7f][^\x00-\x08\x0a-\x1f\x7f]*(?<!\\)"),
    "must be one line of shell, complete in itself",
    "join short commands with &&, or put longer ones into a file and `source` it",
)
IMAGE = Form(
    re.compile(
        r"(?!(?:dockerd|podman)://)(?:docker://)?(?:[\w.$-]+@)?(?:[\w.-]+(?::\d+)?#)?[\w@+=:,./~-]+", re.ASCII
    ),
    "must consist of letters, digits and @+=:,./~-_ only, as a squashfs file or [docker://][USER@][REGISTRY#]"
    "IMAGE[:TAG]: pyxis reads no other form",
    "e.g. /images/k25.sqsh or docker://registry.example.org#team/k25:1.0",
)
INTERFACES = Form(
    re.compile(r"[\w.@-]{1,15}(,[\w.@-]{1,15})*", re.ASCII),
    "must consist of letters, digits and .@-_ only: the exact names of network interfaces, of at most 15 "
    "characters, separated by commas",
    "see `ip link`; NCCL's ^ and = and prefixes belong into cluster.fabric.nccl_interfaces",
)
NCCL_INTERFACES = Form(
    re.compile(r"\^?=?[\w.@-]{1,15}(,[\w.@-]{1,15})*", re.ASCII),
    "must be NCCL's notation: prefixes of names, =NAME,NAME for exact ones, ^ in front for all but these",
    "e.g. =ens1f0,ens1f1 or ^docker,lo",
)
HCA = Form(
    re.compile(r"[\w.-]+(:[1-9]\d?)?", re.ASCII),
    "must consist of letters, digits and .-_ only: the name of an RDMA device, or DEVICE:PORT",
    "e.g. mlx5_0 or mlx5_0:1; `ibv_devices` lists them",
)
PRODUCT = Form(
    re.compile(r"[\w.-]+( [\w.-]+)*", re.ASCII),
    "must be words of a product's name: letters, digits and .-_, separated by one space",
    "e.g. H800; `nvidia-smi --query-gpu=name --format=csv,noheader` prints the whole name",
)
VARIABLE = Form(
    re.compile(r"[A-Za-z_]\w*", re.ASCII),
    "must be the name of an environment variable: letters, digits and _",
    "correct the name",
)
PRIVATE_FILE = re.compile(r"(?:/|~/)[\w@+=:,./-]+", re.ASCII)
"""Path of a file that does not depend on the folder from which a job is submitted."""


def repeated(values: Sequence[str]) -> list[str]:
    """The values that are there more than once, each once."""
    return [value for at, value in enumerate(values) if values.index(value) == at and values.count(value) > 1]
