"""The objects that a run on Kubernetes consists of: a JobSet, and a ConfigMap with its configuration."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from k25_train.compose.resolve import to_yaml
from k25_train.config.basics import is_url
from k25_train.config.kubernetes import LABEL, KubernetesConfig
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from launch.kubernetes.outcomes import NAMED, STOPPED
from launch.kubernetes.pod_spec import CONFIG_FILE, CONTAINER, Spec, pod_annotations, pod_spec
from launch.variables import Variable

JOB = "node"
"""Name of the JobSet's only job; its pods are NAME-node-0-INDEX."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
INSTANCE_LABEL = "app.kubernetes.io/instance"
SUFFIX_LETTERS = 6
"""Letters that Kubernetes appends to the name of a pod: a hyphen and five at random."""
MAX_NAME_LETTERS = 63
"""Longest name of a pod, which is a host name."""


def section(config: Config) -> KubernetesConfig:
    """The cluster's section. Raises `ConfigError` if it has none."""
    if config.cluster.kubernetes is None:
        raise ConfigError(
            f"cluster={config.cluster.name}: its kubernetes is null, so there is nothing to submit to: "
            "choose another cluster (cluster=site_kubernetes is an example), or use python -m launch.slurm"
        )
    return config.cluster.kubernetes


def name_of(config: Config, given: str | None) -> str:
    """Name of the JobSet: `given`, or that of the run folder in the letters that Kubernetes allows.

    Raises `ConfigError` if it is not a name, or so long that its pods could have none.
    """
    folder = re.sub(r"[^a-z0-9]+", "-", PurePosixPath(config.run.dir).name.lower()).strip("-")
    own = folder if folder.startswith("k25") else f"k25-{folder}"
    name, key = (own, "run.dir") if given is None else (given, "--name")
    last_pod = f"{name}-{JOB}-0-{config.cluster.nodes - 1}"
    if not LABEL.pattern.fullmatch(name) or not name[0].isalpha():
        rule = "must consist of lower-case letters, digits and -, and begin with a letter"
        raise ConfigError(f"{key}: {name!r} {rule}: give another (--name)")
    if len(last_pod) + SUFFIX_LETTERS > MAX_NAME_LETTERS:
        allowed = len(name) - (len(last_pod) + SUFFIX_LETTERS - MAX_NAME_LETTERS)
        raise ConfigError(
            f"{key}: {name!r} is too long, as pods get longer names: give one of at most {allowed} letters "
            "(--name)"
        )
    return name


def check_paths(config: Config) -> None:
    """Raise `ConfigError` for a path that pods would not find, or could not write."""
    kubernetes = section(config)
    volumes = {PurePosixPath(volume.mount): volume for volume in kubernetes.volumes.values()}
    mounts = ", ".join(map(str, volumes)) or "none"

    def volume_of(path: str) -> list[bool]:
        """Whether the innermost volume that has the path is read-only; empty if none has it."""
        inside = [mount for mount in volumes if PurePosixPath(path).is_relative_to(mount)]
        return [volumes[max(inside, key=lambda mount: len(mount.parts))].read_only] if inside else []

    if volume_of(config.run.dir) != [False]:
        raise ConfigError(
            f"run.dir={config.run.dir}: must be an absolute path on a volume that pods may write (volumes: "
            f"{mounts}): set run.dir, or add the volume to cluster.kubernetes.volumes"
        )
    saved = config.checkpoint.dir
    if saved is not None and not is_url(saved) and volume_of(saved) != [False]:
        raise ConfigError(
            f"checkpoint.dir={saved}: must be an absolute path on a volume that pods may write (volumes: "
            f"{mounts}), or a URL: set it, or add the volume to cluster.kubernetes.volumes"
        )
    for key, path in config.data.paths().items():
        # A relative path is in the image.
        if path.startswith("/") and not is_url(path) and not volume_of(path):
            raise ConfigError(
                f"{key}={path}: is on none of the pods' volumes ({mounts}): add one to "
                "cluster.kubernetes.volumes, or use a URL"
            )
    if config.cluster.secrets and kubernetes.secret is None:
        names = ", ".join(config.cluster.secrets)
        raise ConfigError(
            f"cluster.kubernetes.secret: must name the Secret whose keys are {names}: `kubectl create secret "
            "generic NAME --from-file=VARIABLE=FILE …`"
        )


def manifest(config: Config, variables: Sequence[Variable], name: str) -> list[Spec]:
    """The ConfigMap and the JobSet.

    Args:
        config: a configuration that `check_paths` accepts.
        variables: environment variables of the ranks.
        name: name of the JobSet, as from `name_of`.
    """
    kubernetes, text = section(config), to_yaml(config)
    # By its contents: that of an earlier run of this name cannot be taken for it.
    config_name = f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    labels = {"app.kubernetes.io/name": "k25-train", INSTANCE_LABEL: name}
    common: Spec = {} if kubernetes.namespace is None else {"namespace": kubernetes.namespace}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": config_name, **common, "labels": labels},
        "immutable": True,
        "data": {CONFIG_FILE: text},
    }
    queue = {} if kubernetes.queue is None else {QUEUE_LABEL: kubernetes.queue}
    # The JobSet is also the name of the service that knows its pods.
    pod = pod_spec(
        config.cluster, kubernetes, variables, first=f"{name}-{JOB}-0-0.{name}", config=config_name
    )
    job_set = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, **common, "labels": labels | queue},
        "spec": {
            "failurePolicy": _failure_policy(kubernetes),
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [
                {
                    "name": JOB,
                    "replicas": 1,
                    "template": {"spec": _job(config.cluster.nodes, kubernetes, labels, pod)},
                }
            ],
        },
    }
    return [config_map, job_set]


def _job(num_nodes: int, kubernetes: KubernetesConfig, labels: dict[str, str], pod: Spec) -> Spec:
    """One pod for each node, with an index; whatever ends one ends all."""
    metadata: Spec = {"labels": labels}
    annotations = pod_annotations(kubernetes)
    if annotations:
        metadata["annotations"] = annotations
    limit = kubernetes.time_limit_min
    return {
        "completionMode": "Indexed",
        "completions": num_nodes,
        "parallelism": num_nodes,
        # The JobSet counts restarts.
        "backoffLimit": 0,
        **({} if limit is None else {"activeDeadlineSeconds": 60 * limit}),
        # Named reasons for the JobSet's policy; other failures exceed the backoff limit.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": list(NAMED)},
                },
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"metadata": metadata, "spec": pod},
    }


def _failure_policy(kubernetes: KubernetesConfig) -> Spec:
    """What follows from a failed job. Its message is that of the rule above that applied."""
    named = ["PodFailurePolicy"]
    return {
        "maxRestarts": kubernetes.max_restarts,
        # All pods have ended before new ones start: two of them could write into one run folder.
        "restartStrategy": "BlockingRecreate",
        "rules": [
            {
                "name": "stopped",
                "action": "RestartJobSetAndIgnoreMaxRestarts",
                "onJobFailureReasons": named,
                "onJobFailureMessagePatterns": [
                    rf"exit code {STOPPED}\b",
                    "has condition DisruptionTarget",
                ],
            },
            {"name": "impossible", "action": "FailJobSet", "onJobFailureReasons": named},
        ],
    }
