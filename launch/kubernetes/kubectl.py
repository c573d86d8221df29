"""kubectl: creates a run's objects, all or none."""

import json
import subprocess
from collections.abc import Sequence
from typing import Any

import yaml

from k25_train.errors import K25Error
from launch.kubernetes.pod_spec import Spec

ANSWER_S = 120.0
"""Longest time that an answer may take."""


class KubectlError(K25Error):
    """kubectl is missing, cannot reach the cluster, or the cluster refuses."""


def dump(documents: Sequence[Spec]) -> str:
    """The objects as YAML, one document each."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def create(config_map: Spec, job_set: Spec) -> None:
    """Create a JobSet and the ConfigMap that its pods wait for, which goes when the JobSet does.

    The JobSet comes first: if there is one of this name, nothing has been changed.

    Raises:
        KubectlError: with what kubectl says; nothing is left behind.
    """
    made = json.loads(_ask(["create", "--filename=-", "--output=json"], dump([job_set])))
    owner = {
        "apiVersion": job_set["apiVersion"],
        "kind": job_set["kind"],
        "name": made["metadata"]["name"],
        "uid": made["metadata"]["uid"],
    }
    owned = config_map | {"metadata": config_map["metadata"] | {"ownerReferences": [owner]}}
    try:
        _ask(["create", "--filename=-"], dump([owned]))
    except KubectlError:
        _ask(["delete", "--filename=-", "--ignore-not-found"], dump([job_set]))
        raise


def _ask(arguments: Sequence[str], text: str) -> str:
    """What kubectl prints, given a text."""
    command = ["kubectl", *arguments]
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, encoding="utf-8", timeout=ANSWER_S, check=False
        )
    except FileNotFoundError as error:
        raise KubectlError(
            "kubectl is not installed here: install it, or print the manifest with --dry-run and create it "
            "where kubectl is"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise KubectlError(
            f"`{shown}` did not answer within {ANSWER_S:g} s: see `kubectl cluster-info`"
        ) from error
    if done.returncode:
        raise KubectlError(f"`{shown}`: {done.stderr.strip()}")
    return done.stdout


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)
