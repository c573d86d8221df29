"""The pod of one node: plain values in Kubernetes' own terms. What they mean is in `config/kubernetes.py`."""

from collections.abc import Sequence
from typing import Any

from k25_train.config.cluster import ClusterConfig, Device
from k25_train.config.kubernetes import KubernetesConfig
from launch.variables import NODE_NAME, Variable

Spec = dict[str, Any]
CONTAINER = "ranks"
CONFIG_FOLDER, CONFIG_FILE = "/etc/k25-train", "config.yaml"
FIRST_NODE = "K25_FIRST_NODE"
"""Variable of a pod: where the first one is found."""
NETWORKS_ANNOTATION = "k8s.v1.cni.cncf.io/networks"
TOPOLOGY_ANNOTATION = "kueue.x-k8s.io/podset-required-topology"


def pod_annotations(kubernetes: KubernetesConfig) -> dict[str, str]:
    """Annotations that other controllers read."""
    pairs = {NETWORKS_ANNOTATION: kubernetes.networks, TOPOLOGY_ANNOTATION: kubernetes.topology}
    return {name: value for name, value in pairs.items() if value is not None}


def pod_spec(
    cluster: ClusterConfig,
    kubernetes: KubernetesConfig,
    variables: Sequence[Variable],
    *,
    first: str,
    config: str,
) -> Spec:
    """The pod.

    Args:
        cluster: the cluster.
        kubernetes: its section `kubernetes`.
        variables: environment variables of the ranks.
        first: host name of the first pod.
        config: name of the ConfigMap with the configuration.
    """
    return {
        # The JobSet starts all pods again or none.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": kubernetes.grace_s,
        # Pods ask nothing of Kubernetes, and variables about other services are no concern of theirs.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        **_identity(kubernetes),
        **_placement(kubernetes),
        "containers": [_container(cluster, kubernetes, variables, first)],
        "volumes": _volumes(kubernetes, config),
    }


def _identity(kubernetes: KubernetesConfig) -> Spec:
    """Who the pod is, on which network."""
    security: Spec = {"seccompProfile": {"type": "RuntimeDefault"}}
    if kubernetes.run_as is not None:
        security |= {"runAsUser": kubernetes.run_as, "runAsNonRoot": kubernetes.run_as != 0}
    spec: Spec = {"securityContext": security}
    if kubernetes.host_network:
        # Names of pods resolve on the node's network, too.
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if kubernetes.service_account is not None:
        spec["serviceAccountName"] = kubernetes.service_account
    if kubernetes.pull_secret is not None:
        spec["imagePullSecrets"] = [{"name": kubernetes.pull_secret}]
    return spec


def _placement(kubernetes: KubernetesConfig) -> Spec:
    """On which nodes the pod may be."""
    spec: Spec = {}
    if kubernetes.priority_class is not None:
        spec["priorityClassName"] = kubernetes.priority_class
    if kubernetes.runtime_class is not None:
        spec["runtimeClassName"] = kubernetes.runtime_class
    if kubernetes.node_selector:
        spec["nodeSelector"] = dict(kubernetes.node_selector)
    if kubernetes.tolerations:
        spec["tolerations"] = [
            {
                "key": key,
                "operator": "Exists" if each.value is None else "Equal",
                **({} if each.value is None else {"value": each.value}),
                **({} if each.effect is None else {"effect": each.effect.value}),
            }
            for key, each in kubernetes.tolerations.items()
        ]
    if kubernetes.exclude:
        others = {"key": "kubernetes.io/hostname", "operator": "NotIn", "values": list(kubernetes.exclude)}
        terms = [{"matchExpressions": [others]}]
        spec["affinity"] = {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        }
    return spec


def _container(
    cluster: ClusterConfig, kubernetes: KubernetesConfig, variables: Sequence[Variable], first: str
) -> Spec:
    resources = dict(kubernetes.resources)
    if cluster.device is Device.cuda:
        resources = {kubernetes.gpu_resource: str(cluster.gpus_per_node), **resources}
    capabilities: Spec = {"drop": ["ALL"]}
    if cluster.fabric is not None:
        # Registers memory with the cards. Kubernetes gives it to root alone: for other users the container
        # runtime's limit of locked memory has to be raised.
        capabilities["add"] = ["IPC_LOCK"]
    return {
        "name": CONTAINER,
        "image": kubernetes.image,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-m", "launch.kubernetes.pod", f"{CONFIG_FOLDER}/{CONFIG_FILE}"],
        "env": _environment(cluster, kubernetes, variables, first),
        "ports": [
            {"name": "preflight", "containerPort": kubernetes.port},
            {"name": "training", "containerPort": kubernetes.port + 1},
        ],
        # Equal to the requests, since nothing else is requested.
        "resources": {"limits": resources},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": capabilities,
        },
        "volumeMounts": _mounts(kubernetes),
        # `kubectl describe pod` then ends with what the ranks said last.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }


def _environment(
    cluster: ClusterConfig, kubernetes: KubernetesConfig, variables: Sequence[Variable], first: str
) -> list[Spec]:
    """Variables; values of secrets are looked up by Kubernetes when the pod starts."""
    found: list[Spec] = [
        # The root file system is read-only.
        {"name": "HOME", "value": "/tmp"},
        {"name": FIRST_NODE, "value": first},
        {"name": NODE_NAME, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
    ]
    found += [{"name": variable.name, "value": variable.value} for variable in variables]
    found += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": kubernetes.secret, "key": name}}}
        for name in cluster.secrets
    ]
    return found


def _volumes(kubernetes: KubernetesConfig, config: str) -> list[Spec]:
    own: list[Spec] = [
        {"name": "k25-config", "configMap": {"name": config}},
        {"name": "k25-shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{kubernetes.shm_gib}Gi"}},
        {"name": "k25-tmp", "emptyDir": {}},
    ]
    claimed = [
        {
            "name": name,
            "persistentVolumeClaim": {"claimName": volume.claim, "readOnly": volume.read_only},
        }
        for name, volume in kubernetes.volumes.items()
    ]
    return own + claimed


def _mounts(kubernetes: KubernetesConfig) -> list[Spec]:
    own: list[Spec] = [
        {"name": "k25-config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "k25-shm", "mountPath": "/dev/shm"},
        {"name": "k25-tmp", "mountPath": "/tmp"},
    ]
    claimed = [
        {"name": name, "mountPath": volume.mount, "readOnly": volume.read_only}
        for name, volume in kubernetes.volumes.items()
    ]
    return own + claimed
