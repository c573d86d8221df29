"""What a site's nodes need before Python starts: the lines of `cluster.slurm.setup`, as shell."""

import re
import shlex
import subprocess
from collections.abc import Iterable, Sequence

from k25_train.errors import ConfigError
from launch.variables import unset_foreign

SOURCES = re.compile(r"(?:^|[;&|{(])\s*(?:source|\.)\s")
"""A command that reads another script."""


def check_setup(key: str, lines: Iterable[str]) -> None:
    """Raise `ConfigError` if one of these lines alone is not a command of bash; nothing is executed."""
    for i, line in enumerate(lines):
        done = subprocess.run(
            ["bash", "-n"],
            input=f"{line}\n",
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        # An unfinished `if` is an error, an unfinished quote or here-document may only be a warning.
        if done.returncode or done.stderr:
            said = " ".join(done.stderr.split())
            raise ConfigError(
                f"{key}.{i}={line!r}: must be a complete command of bash ({said}): correct it, join commands "
                "with &&, or put longer ones into a file and `source` it"
            )


def setup_lines(key: str, lines: Sequence[str]) -> list[str]:
    """Shell that runs these lines one after another, and ends with the text of the first that fails.

    Each is in braces of its own lines, so that a comment or `;` in it hides nothing, and in front of `||`,
    so that commands within a script that it sources may fail, as they do in many.
    """
    shell = []
    for i, line in enumerate(lines):
        told = shlex.quote(f"{key}.{i} failed: {line}")
        if SOURCES.search(line):
            # It is on the nodes, out of the reach of a check.
            shell.append("# shellcheck disable=SC1090,SC1091")
        shell += ["{", line, "}" + f' || {{ echo "$HOSTNAME:" {told} >&2; exit 1; }}']
    return shell


def batch_setup(lines: Sequence[str]) -> str:
    """The part of the batch script that prepares its own shell; empty without lines."""
    if not lines:
        return ""
    comment = "# What this site needs before Python starts; its scripts may read variables that are not set."
    return "\n".join(["", comment, "set +u", *setup_lines("cluster.slurm.setup", lines), "set -u", ""])


def node_start(key: str, lines: Sequence[str], exports: Sequence[str], checkout: str) -> list[str]:
    """The command that prepares a node and becomes the command that follows it; empty without lines.

    The variables of the cluster's file are set again, as a module may have changed them.
    """
    if not lines:
        return []
    shell = ["set -eo pipefail", *setup_lines(key, lines), unset_foreign(), *exports]
    shell += [f"cd {shlex.quote(checkout)}", 'exec "$@"']
    return ["bash", "-c", "\n".join(shell), "k25-setup"]
