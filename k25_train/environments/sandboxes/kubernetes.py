"""Pods of the cluster and the namespace that `kubectl` is set up for.

The cluster ends a pod at its time to live (`activeDeadlineSeconds`), whoever forgets it. It has no token of
the cluster, no privileges and, unless it is granted one, no network: a policy of the namespace says so, which
takes a network plug-in that enforces policies. How many processes it may have is up to the node
(`podPidsLimit` of its kubelet).
"""

import json
import shutil
from collections.abc import Sequence
from typing import Any

from k25_train.environments.sandboxes.base import WORK, SandboxError, SandboxLimits, SandboxSpec
from k25_train.environments.sandboxes.remote import PREFIX, places
from k25_train.environments.sandboxes.tools import call, checked
from k25_train.errors import MachineError

_READY_S = 600
"""Seconds until a pod has to run: nodes pull images, and may have to be added first."""
_CALL_S = 60.0
_APP = "k25-sandbox"
_POLICY: dict[str, Any] = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "k25-sandbox-no-network"},
    "spec": {
        "podSelector": {"matchLabels": {"app": _APP, "network": "none"}},
        "policyTypes": ["Ingress", "Egress"],
    },
}


class Pods:
    """A `Driver`."""

    def __init__(self, image: str) -> None:
        """`image` of pods that name no other."""
        self._image = image
        self._has_policy = False

    async def create(self, name: str, spec: SandboxSpec, limits: SandboxLimits) -> None:
        """Create and start what has the name. Raises SandboxError."""
        if spec.folders:
            raise SandboxError(
                f"sandbox {spec.name} is to see folders of this host, {sorted(spec.folders)}, which pods "
                "cannot. Put them into the image, or pass them as files."
            )
        if not self._has_policy:
            await checked(
                ["kubectl", "apply", "-f", "-"], timeout_s=_CALL_S, stdin=json.dumps(_POLICY).encode()
            )
            self._has_policy = True
        manifest = json.dumps(pod(name, spec, self._image, limits)).encode()
        await checked(["kubectl", "create", "-f", "-"], timeout_s=_CALL_S, stdin=manifest)
        command = ["kubectl", "wait", "--for=condition=Ready", f"pod/{name}", f"--timeout={_READY_S}s"]
        await checked(command, timeout_s=_READY_S + _CALL_S)

    def inside(self, name: str, command: Sequence[str]) -> list[str]:
        """What runs a command within, with its streams and its status."""
        return ["kubectl", "exec", "--stdin", name, "--", *command]

    async def remove(self, name: str) -> None:
        """Remove it with all that is in it; nothing where it is gone. Raises SandboxError."""
        options = ["--ignore-not-found", "--grace-period=0", "--force", "--wait=false"]
        await checked(["kubectl", "delete", "pod", name, *options], timeout_s=_CALL_S)

    async def names(self) -> list[str]:
        """All that begin with `PREFIX`, of every owner, running or not. Raises SandboxError."""
        command = ["kubectl", "get", "pods", "--selector", f"app={_APP}", "--output", "name"]
        lines = (await checked(command, timeout_s=_CALL_S)).decode().split()
        names = [line.removeprefix("pod/") for line in lines]
        return [name for name in names if name.startswith(PREFIX)]

    async def is_alive(self, name: str) -> bool:
        """Whether it runs. Raises SandboxError where this cannot be said."""
        command = ["kubectl", "get", "pod", name, "--output", "jsonpath={.status.phase}"]
        try:
            done = await call(command, timeout_s=_CALL_S)
        except TimeoutError as error:
            raise SandboxError(f"kubectl get did not end in {_CALL_S:g} s") from error
        if done.status and b"NotFound" not in done.stderr:
            raise SandboxError(f"kubectl get: {done.stderr.decode(errors='replace').strip()[-400:]}")
        return done.stdout.strip() == b"Running"


def pod(name: str, spec: SandboxSpec, image: str, limits: SandboxLimits) -> dict[str, Any]:
    """The manifest of a pod. `image` is for those that name none."""
    amounts = {
        "cpu": f"{limits.cpus:g}",
        "memory": str(limits.memory_bytes),
        "ephemeral-storage": str(limits.disk_bytes),
    }
    volumes = {f"v{number}": place for number, place in enumerate(places(spec))}
    network = "granted" if spec.network else "none"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": _APP, "network": network}},
        "spec": {
            "activeDeadlineSeconds": int(limits.ttl_s) + 1,
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": 0,
            "hostname": "sandbox",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65534,
                "runAsGroup": 65534,
                "fsGroup": 65534,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [
                {
                    "name": "sandbox",
                    "image": spec.image or image,
                    "command": ["sleep", str(int(limits.ttl_s) + 1)],
                    "workingDir": WORK,
                    "env": [{"name": "HOME", "value": WORK}],
                    "resources": {"limits": amounts, "requests": amounts},
                    "securityContext": {
                        "allowPrivilegeEscalation": False,
                        "readOnlyRootFilesystem": True,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": key, "mountPath": path} for key, path in volumes.items()],
                }
            ],
            "volumes": [
                {"name": key, "emptyDir": {"medium": "Memory", "sizeLimit": str(limits.disk_bytes)}}
                for key in volumes
            ],
        },
    }


def open_pods(image: str) -> Pods:
    """The driver. Raises MachineError without kubectl."""
    if not shutil.which("kubectl"):
        raise MachineError(
            "environment.sandbox.kind=kubernetes needs kubectl, set up for a cluster and a namespace, and "
            "this machine has none. Install it, or use kind=bubblewrap."
        )
    return Pods(image)
