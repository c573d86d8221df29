"""The manifest of a run on Kubernetes: valid, the golden one, and with every key of the cluster's file."""

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from k25_train.compose.resolve import compose, load
from k25_train.config.kubernetes import KubernetesConfig
from k25_train.errors import ConfigError
from launch.kubernetes.kubectl import KubectlError, create, dump
from launch.kubernetes.manifest import check_paths, name_of
from launch.kubernetes.outcomes import IMPOSSIBLE, STOPPED, UNFIT
from tests.helpers.kubernetes_objects import (
    SITE,
    Spec,
    container_of,
    fake_kubectl,
    job_of,
    leaves,
    pod_of,
    rendered,
    validate,
)
from tests.helpers.project_sources import REPO

GOLDEN = REPO / "tests/golden/kubernetes/site_kubernetes.yaml"
K8S = "cluster.kubernetes"
EVERY_KEY = [
    f"{K8S}.exclude=[n7,n8]",
    f"{K8S}.host_network=false",
    f"{K8S}.networks='roce/rail0,roce/rail1'",
    f"{K8S}.priority_class=high",
    f"{K8S}.run_as=1000",
    f"{K8S}.secret=tokens",
    f"{K8S}.service_account=trainer",
    f"{K8S}.time_limit_min=1440",
    f"{K8S}.tolerations.maintenance={{value: soon, effect: null}}",
    "cluster.secrets.HF_TOKEN=/home/u/.secrets/hf",
    "cluster.environment.NCCL_IB_SL={value: 3, reason: 'the service level of training'}",
]


def test_the_example_site_has_its_golden_manifest(tmp_path: Path) -> None:
    fresh = tmp_path / "manifest.yaml"
    config_map, job_set = rendered()
    # Another key of any section changes the configuration, whose golden files are elsewhere.
    text = dump([job_set]).replace(config_map["metadata"]["name"], "k25-pretrain-4k-DIGEST")
    fresh.write_text(text)
    assert fresh.read_text() == GOLDEN.read_text(), f"if the change is meant: cp {fresh} {GOLDEN}"


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        EVERY_KEY,
        [f"{K8S}.queue=null", f"{K8S}.topology=null", f"{K8S}.resources={{}}", "cluster.fabric=null"],
    ],
)
def test_what_is_rendered_is_valid(overrides: list[str]) -> None:
    config_map, job_set = rendered(*overrides)
    validate(config_map, job_set)
    assert list(yaml.safe_load_all(dump([config_map, job_set]))) == [config_map, job_set]


def plant_in_job_set(config_map: Spec, job_set: Spec) -> None:
    job_set["spec"]["failurePolicy"]["maxRestart"] = 1


def plant_in_job(config_map: Spec, job_set: Spec) -> None:
    job_of(job_set)["backoffLimit"] = "0"


def plant_in_pod(config_map: Spec, job_set: Spec) -> None:
    pod_of(job_set)["hostNetworks"] = True


def plant_in_container(config_map: Spec, job_set: Spec) -> None:
    container_of(job_set)["env"].append({"name": "OMP_NUM_THREADS", "value": 1})


def plant_in_config_map(config_map: Spec, job_set: Spec) -> None:
    config_map["data"]["config.yaml"] = {"train": 1}


@pytest.mark.parametrize(
    "plant", [plant_in_job_set, plant_in_job, plant_in_pod, plant_in_container, plant_in_config_map]
)
def test_the_schemas_see_a_fault(plant: Callable[[Spec, Spec], None]) -> None:
    config_map, job_set = rendered()
    plant(config_map, job_set)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(config_map, job_set)


EXPECTED: dict[str, tuple[str, object]] = {
    "namespace": (r"metadata\.namespace", "training"),
    "image": (r".*containers\.0\.image", "registry.example.org/team/k25-train:0.1.0"),
    "pull_secret": (r".*imagePullSecrets\.0\.name", "registry"),
    "service_account": (r".*serviceAccountName", "trainer"),
    "queue": (r"metadata\.labels\.kueue\.x-k8s\.io/queue-name", "k25"),
    "topology": (r".*annotations\.kueue\.x-k8s\.io/podset-required-topology", "example.org/rail-group"),
    "priority_class": (r".*priorityClassName", "high"),
    "runtime_class": (r".*runtimeClassName", "nvidia"),
    "node_selector": (r".*nodeSelector\.nvidia\.com/gpu\.product", "NVIDIA-H800"),
    "exclude": (r".*matchExpressions\.0\.values\.1", "n8"),
    "tolerations": (r".*tolerations\.1\.value", "soon"),
    "gpu_resource": (r".*limits\.nvidia\.com/gpu", "8"),
    "resources": (r".*limits\.rdma/roce", "1"),
    "shm_gib": (r".*volumes\.1\.emptyDir\.sizeLimit", "256Gi"),
    "networks": (r".*annotations\.k8s\.v1\.cni\.cncf\.io/networks", "roce/rail0,roce/rail1"),
    "volumes": (r".*volumes\.3\.persistentVolumeClaim\.claimName", "k25-runs"),
    "run_as": (r".*securityContext\.runAsUser", 1000),
    "secret": (r".*env\.\d+\.valueFrom\.secretKeyRef\.name", "tokens"),
    "port": (r".*ports\.0\.containerPort", 29500),
    "grace_s": (r".*terminationGracePeriodSeconds", 900),
    "max_restarts": (r".*failurePolicy\.maxRestarts", 10),
    "time_limit_min": (r".*activeDeadlineSeconds", 86400),
}
"""Key -> where in the JobSet it leads to what."""
READ_BY_THE_POD = {"preflight"}


@pytest.mark.parametrize("key", EXPECTED)
def test_a_key_is_in_the_manifest(key: str) -> None:
    path, value = EXPECTED[key]
    found = dict(leaves(rendered(*EVERY_KEY)[1]))
    assert [each for name, each in found.items() if re.fullmatch(rf"\.{path}", name)] == [value]


def test_every_key_is_tried() -> None:
    keys = {field.name for field in fields(KubernetesConfig)}
    assert keys == set(EXPECTED) | READ_BY_THE_POD | {"host_network"}
    assert pod_of(rendered()[1])["hostNetwork"] is True
    assert "hostNetwork" not in pod_of(rendered(*EVERY_KEY)[1])


def test_the_pods_configuration_is_the_one_that_was_given(tmp_path: Path) -> None:
    config_map, job_set = rendered(*EVERY_KEY)
    path = tmp_path / "config.yaml"
    path.write_text(config_map["data"]["config.yaml"])
    assert load(path).config == compose([*SITE, *EVERY_KEY])
    names = [volume["configMap"]["name"] for volume in pod_of(job_set)["volumes"] if "configMap" in volume]
    assert names == [config_map["metadata"]["name"]]
    assert rendered("optim.lr=0.001")[0]["metadata"]["name"] != rendered()[0]["metadata"]["name"]


def test_each_way_to_end_has_its_rule() -> None:
    """The first rule of the JobSet whose reason and message are those of the failed job."""
    _, job_set = rendered()
    codes = job_of(job_set)["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert set(codes) == {IMPOSSIBLE, UNFIT, STOPPED} and 0 not in codes and 1 not in codes
    rule = "matching FailJob rule at index 0"
    pod = "Container ranks for pod training/x-node-0-4-abcde"
    by_code = {code: f"{pod} failed with exit code {code} {rule}" for code in codes}
    evicted = "Pod training/x-node-0-2 has condition DisruptionTarget matching FailJob rule at index 1"

    def action(message: str) -> str:
        for rule in job_set["spec"]["failurePolicy"]["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
        return ""

    assert action(by_code[STOPPED]) == action(evicted) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action(by_code[IMPOSSIBLE]) == action(by_code[UNFIT]) == "FailJobSet"


def test_a_secret_is_looked_up_by_kubernetes(tmp_path: Path) -> None:
    secret = tmp_path / "hf"
    secret.write_text("hf_VALUE")
    secret.chmod(0o600)
    objects = rendered(f"{K8S}.secret=tokens", f"cluster.secrets.HF_TOKEN={secret}")
    assert "hf_VALUE" not in dump(objects)
    with pytest.raises(
        ConfigError, match=r"cluster\.kubernetes\.secret: must name the Secret whose keys are HF_TOKEN"
    ):
        rendered(f"cluster.secrets.HF_TOKEN={secret}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run.dir=runs/x"], r"run\.dir=runs/x: must be an absolute path on a volume"),
        (["run.dir=/datasets/x"], r"run\.dir=/datasets/x: must be .* that pods may write"),
        (["run.dir=/runsx/y"], r"run\.dir=/runsx/y: must be"),
        (
            [f"{K8S}.volumes.inner={{claim: i, mount: /runs/in, read_only: true}}", "run.dir=/runs/in/x"],
            "must be",
        ),
        (
            ["data.dir=/elsewhere/set"],
            r"data\.sources\.text\.path=/elsewhere/set: is on none of the pods' volumes \(/runs, /datasets\)",
        ),
        (["data.tokenizer=/elsewhere/t"], r"data\.tokenizer=/elsewhere/t: is on none"),
        (["run.dir=/runs/" + "a" * 50], r"run\.dir: 'k25-a+' is too long, .* at most 47 letters"),
    ],
)
def test_what_pods_could_not_use_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rendered(*overrides)


def test_paths_of_the_image_and_urls_are_the_pods_matter() -> None:
    for path in ("datasets/smoke", "s3://bucket/set", "/datasets/smoke"):
        check_paths(compose([*SITE, f"data.dir={path}"]))


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("image", "docker://k25", "without a scheme"),
        ("image", "registry.example.org/Team/k25", "without a scheme"),
        ("image", "k25@sha256:12", "without a scheme"),
        ("namespace", "Training", "must be the name of a Kubernetes object"),
        ("pull_secret", "a b", "must be the name of a Kubernetes object"),
        ("queue", "null", "is Kueue's, but cluster.kubernetes.queue is null"),
        ("topology", "a/b/c", "must be the key of a label"),
        ("node_selector", "{gpu: 'H 800'}", "must be the value of a label"),
        ("tolerations", "{'a b': {value: null, effect: null}}", "must be the key of a label, taint"),
        ("tolerations.x", "{value: null, effect: Never}", "must be one of NoSchedule"),
        ("resources", "{rdma/roce: one}", "must be an amount"),
        ("exclude", "['n[1-3]']", "must be the name of a Kubernetes object"),
        ("networks", "rail0", "with host_network it has the node's"),
        ("volumes.x", "{claim: X, mount: /x, read_only: true}", "must be the name of a Kubernetes object"),
        ("volumes.x", "{claim: x, mount: x, read_only: true}", "must be the absolute path"),
        ("volumes.x", "{claim: x, mount: /, read_only: true}", "must be the absolute path"),
        ("volumes.x", "{claim: x, mount: /dev/shm, read_only: true}", "is mounted by the manifest itself"),
        ("volumes.x", "{claim: x, mount: /runs, read_only: true}", "is where another volume is mounted, too"),
        ("volumes.X_", "{claim: x, mount: /x, read_only: true}", "must consist of lower-case letters"),
        ("shm_gib", "0", "must be positive"),
        ("grace_s", "-1", "must be positive"),
        ("time_limit_min", "0", "must be positive"),
        ("max_restarts", "-1", "must not be negative"),
        ("run_as", "-1", "must not be negative"),
        ("port", "65535", "1024 to 65534"),
    ],
)
def test_a_value_of_another_form_is_refused(key: str, value: str, rule: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([*SITE, f"{K8S}.{key}={value}"])
    assert rule in str(caught.value) and K8S in str(caught.value)
    assert str(caught.value).startswith("1 problem")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("/runs/k25_pretrain_4k", "k25-pretrain-4k"),
        ("/runs/2026 Übung", "k25-2026-bung"),
        ("/runs/A.b", "k25-a-b"),
    ],
)
def test_a_run_folder_gives_the_name(folder: str, name: str) -> None:
    config = compose([*SITE, f"run.dir='{folder}'"])
    assert name_of(config, None) == name


@pytest.mark.parametrize("name", ["", "1st", "-x", "x-", "Upper", "a_b", "a" * 64])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        name_of(compose(SITE), name)


def test_the_longest_name_leaves_room_for_its_pods() -> None:
    config = compose(SITE)
    longest = "a" * 47
    assert len(f"{name_of(config, longest)}-node-0-31-abcde") == 63
    with pytest.raises(ConfigError, match="at most 47 letters"):
        name_of(config, longest + "a")


KUBECTL = """
echo "$*" >> calls; cat > "object$(wc -l < calls)"
case "$*" in
  *--output=json) [ -e taken ] && { echo 'AlreadyExists' >&2; exit 1; }
     echo '{"metadata": {"name": "k25-pretrain-4k", "uid": "u-1"}}';;
  create*) [ ! -e no_maps ] || { echo 'forbidden: configmaps' >&2; exit 1; };;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which kubectl notes what it is asked."""
    monkeypatch.setenv("PATH", fake_kubectl(tmp_path, KUBECTL)["PATH"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def asked(folder: Path) -> list[tuple[str, Any]]:
    """What was asked of kubectl, with the objects."""
    calls = (folder / "calls").read_text().splitlines()
    return [(call, yaml.safe_load((folder / f"object{n}").read_text())) for n, call in enumerate(calls, 1)]


def test_the_configuration_belongs_to_the_job_set(cluster: Path) -> None:
    config_map, job_set = rendered()
    create(config_map, job_set)
    (first, made), (second, mapped) = asked(cluster)
    assert (first, second) == ("create --filename=- --output=json", "create --filename=-")
    assert made == job_set
    owner = mapped["metadata"].pop("ownerReferences")
    assert mapped == config_map
    assert owner == [
        {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "name": "k25-pretrain-4k", "uid": "u-1"}
    ]


def test_a_run_of_this_name_is_left_alone(cluster: Path) -> None:
    (cluster / "taken").touch()
    with pytest.raises(KubectlError, match="AlreadyExists"):
        create(*rendered())
    assert len(asked(cluster)) == 1


def test_a_job_set_without_its_configuration_does_not_stay(cluster: Path) -> None:
    (cluster / "no_maps").touch()
    with pytest.raises(KubectlError, match="forbidden: configmaps"):
        create(*rendered())
    *_, (last, deleted) = asked(cluster)
    assert last == "delete --filename=- --ignore-not-found" and deleted["kind"] == "JobSet"


def test_without_kubectl_there_is_still_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KubectlError, match=r"kubectl is not installed here: .*--dry-run"):
        create(*rendered())
