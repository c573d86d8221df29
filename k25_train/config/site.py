"""Environment variables that a site wants its ranks to have, and secrets, which are kept in files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from k25_train.config.forms import NOT_SHOWN, PASSWORD_IN_URL, PRIVATE_FILE, VARIABLE
from parallel.config import Problem

RESERVED = re.compile(
    r"(?:LOCAL_|GROUP_|ROLE_)?(?:RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(?:ADDR|PORT)|TORCHELASTIC_\w+"
    r"|(?:SLURM|SLURMD|SBATCH|SRUN|SINFO|SQUEUE)_\w+"
    r"|PATH|HOME|PWD|UID|EUID|PPID|IFS|ENV|BASH_\w+|SHELLOPTS|BASHOPTS"
)
"""Names that torchrun, SLURM or the shell give their values to."""
SECRET = re.compile(
    r"(?:\w*_)?(?:TOKEN|PASS(?:WORD|WD|PHRASE)?|SECRET|CREDENTIALS?|(?:API_?|ACCESS_|PRIVATE_|SECRET_)KEY)",
    re.IGNORECASE,
)
"""Names of variables whose value nobody else may read."""
ASSIGNED = re.compile(r"\b(\w+)=(?![\"']?\$[({]?[A-Za-z_</]|[\"']?(?:\s|$))")
"""An assignment of a literal, in a line of shell."""
SECRET_REMEDY = "put it into a file that only you can read, and name that in cluster.secrets"
MIN_REASON = 10
"""Fewest characters of a reason."""


@dataclass(slots=True, kw_only=True)
class SiteVariable:
    """An environment variable of every rank."""

    value: str
    """Its value, passed on as it is: nothing in it is expanded."""
    reason: str
    """Why this site needs it, in one line."""


def is_secret(name: str) -> bool:
    """Whether a variable of this name usually holds a secret."""
    return bool(SECRET.fullmatch(name))


def variable_problems(key: str, variables: Mapping[str, SiteVariable]) -> list[Problem]:
    """Broken rules of `cluster.environment` or `cluster.overrides`, which `key` names."""
    found = name_problems(key, variables)
    for name, variable in variables.items():
        path, value = f"{key}.{name}", variable.value
        if is_secret(name) or PASSWORD_IN_URL.search(value):
            rule = "must not hold a secret: config.yaml and the batch script show it"
            found.append(Problem(f"{path}.value", NOT_SHOWN, rule, SECRET_REMEDY))
        elif "$" in value:
            remedy = f"`export {name}=…` in cluster.slurm.setup is read by a shell"
            found.append(Problem(f"{path}.value", value, "must not contain $: nothing expands it", remedy))
        elif not value.isprintable():
            rule = "must be one line of printable text"
            found.append(Problem(f"{path}.value", repr(value), rule, "leave out line breaks and the like"))
        if len(variable.reason.strip()) < MIN_REASON or not variable.reason.isprintable():
            rule = f"must say in one line of {MIN_REASON} characters or more why the site needs the variable"
            remedy = "say what happens without it; it is shown in the dry run and in the script"
            found.append(Problem(f"{path}.reason", repr(variable.reason), rule, remedy))
    return found


def secret_problems(key: str, secrets: Mapping[str, str]) -> list[Problem]:
    """Broken rules of `cluster.secrets`: variable -> file; no value is shown, as it may be the secret."""
    rule = "must be the absolute path of a file, or one that starts with ~/, without quotes or spaces"
    return name_problems(key, secrets) + [
        Problem(f"{key}.{name}", NOT_SHOWN, rule, "write the secret into a file, and its path here")
        for name, path in secrets.items()
        if not PRIVATE_FILE.fullmatch(path)
    ]


def name_problems(key: str, names: Mapping[str, object]) -> list[Problem]:
    """Problems of variables' names: not names, or names that others give a value to."""
    found = VARIABLE.misfits((f"{key}.{name}", name) for name in names)
    for name in names:
        if RESERVED.fullmatch(name):
            rule = "is set by the launcher, SLURM or the shell"
            remedy = "leave it out; what should be added to PATH belongs into cluster.slurm.setup"
            found.append(Problem(f"{key}.{name}", None, rule, remedy))
    return found


def literal_secrets(line: str) -> list[str]:
    """Names of the variables to which a line of shell assigns a literal that looks like a secret."""
    names = [name for name in ASSIGNED.findall(line) if is_secret(name)]
    return names or (["a URL"] if PASSWORD_IN_URL.search(line) else [])
