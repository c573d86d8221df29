"""In what agents and tests run, and what one sandbox may take. Values are our choice."""

from dataclasses import dataclass
from enum import Enum

from parallel.config import Problem, not_positive


class SandboxKind(Enum):
    """What isolates code that nobody trusts."""

    bubblewrap = "bubblewrap"
    """Namespaces of this machine, limits by cgroups and rlimits."""
    container = "container"
    """podman or docker, whichever the machine has."""
    kubernetes = "kubernetes"
    """Pods of a cluster, by kubectl."""
    apptainer = "apptainer"
    """Apptainer, as SLURM clusters have it."""


@dataclass(slots=True, kw_only=True)
class SandboxConfig:
    """In what agents and tests run, and what one sandbox may take."""

    kind: SandboxKind
    """What isolates."""
    image: str | None
    """Image of containers, pods and Apptainer; null with bubblewrap, which shows this machine's system."""
    cpus: float
    """Processors."""
    memory_bytes: int
    """Memory of all processes, files in memory included."""
    disk_bytes: int
    """Files in /work."""
    processes: int
    """Processes and threads at once."""
    output_bytes: int
    """What one command may print; the rest is cut off."""
    ttl_s: float
    """Seconds that a sandbox may live, whoever forgets it."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        names = ("cpus", "memory_bytes", "disk_bytes", "processes", "output_bytes", "ttl_s")
        found = not_positive(self, names)
        needs_image = self.kind is not SandboxKind.bubblewrap
        if needs_image and not (self.image or "").strip():
            rule = f"must name the image that environment.sandbox.kind={self.kind.value} starts"
            found.append(Problem("image", self.image, rule, "e.g. docker.io/library/python:3.12-slim"))
        if not needs_image and self.image is not None:
            rule = "must be null with environment.sandbox.kind=bubblewrap, which has no images"
            found.append(Problem("image", self.image, rule, "use null, or kind=container"))
        return found
