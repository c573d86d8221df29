"""Objects of Kubernetes as tests look at them: valid, by path, and with a kubectl that is a script."""

import copy
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from k25_train.compose.resolve import compose
from launch.fabric import environment
from launch.kubernetes.manifest import check_paths, manifest, name_of
from tests.helpers.project_sources import REPO

JOBSET_SCHEMA = REPO / "tests/golden/kubernetes/jobset.yaml"
OLDEST, NEWEST = "1.31", kubernetes_validate.latest_version()
"""Versions of Kubernetes; a job's failure policy is stable since the first."""
SITE = [
    "experiment=k25_pretrain_4k",
    "data=smoke",
    "cluster=site_kubernetes",
    "run.dir=/runs/k25_pretrain_4k",
]

Spec = dict[str, Any]


def rendered(*overrides: str) -> tuple[Spec, Spec]:
    """ConfigMap and JobSet of the example site with these overrides."""
    return copy.deepcopy(_rendered(overrides))


@lru_cache
def _rendered(overrides: Sequence[str]) -> tuple[Spec, Spec]:
    config = compose([*SITE, *overrides])
    check_paths(config)
    config_map, job_set = manifest(config, environment(config), name_of(config, None))
    return config_map, job_set


def validate(config_map: Mapping[str, Any], job_set: Mapping[str, Any]) -> None:
    """Raise an error of `jsonschema` or `kubernetes_validate` where a schema is broken."""
    jsonschema.validate(job_set, yaml.safe_load(JOBSET_SCHEMA.read_text(encoding="utf-8")))
    for replicated in job_set["spec"]["replicatedJobs"]:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": replicated["name"]},
            "spec": replicated["template"]["spec"],
        }
        for version in (OLDEST, NEWEST):
            kubernetes_validate.validate(job, version, strict=True)
    for version in (OLDEST, NEWEST):
        kubernetes_validate.validate(dict(config_map), version, strict=True)


def job_of(job_set: Spec) -> Spec:
    """The spec of the JobSet's job."""
    return job_set["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(job_set: Spec) -> Spec:
    """The spec of the JobSet's pods."""
    return job_of(job_set)["template"]["spec"]


def container_of(job_set: Spec) -> Spec:
    """The only container of the JobSet's pods."""
    (container,) = pod_of(job_set)["containers"]
    return container


def leaves(values: Any, path: str = "") -> Iterator[tuple[str, object]]:
    """Dotted path and value of everything in nested values."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(values, Sequence) and not isinstance(values, str):
        for at, value in enumerate(values):
            yield from leaves(value, f"{path}.{at}")
    else:
        yield path, values


def fake_kubectl(folder: Path, script: str) -> dict[str, str]:
    """Variables of a shell in which kubectl is this script."""
    path = folder / "kubectl"
    path.write_text(f"#!/bin/bash\n{script}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
