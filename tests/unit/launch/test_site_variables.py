"""Variables of a site: added, overriding, secret, and refused where they contradict the cluster's file."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose, load, to_yaml
from k25_train.config.site import SiteVariable, is_secret, literal_secrets
from k25_train.errors import ConfigError
from launch.fabric import environment
from launch.feasibility import check_private_files
from launch.sbatch import render
from launch.torchrun import find_place, start_command, variables_of
from launch.variables import secrets_of

ROCE = compose(["experiment=k25_pretrain_4k"])
REASON = "this site needs it for a test"


def with_cluster(**changes: object) -> list[tuple[str, str, str]]:
    """Variables of the report's job on a cluster with these sections; texts are values with a reason."""
    sections = {
        key: {name: SiteVariable(value=value, reason=REASON) for name, value in given.items()}
        if key != "secrets"
        else given
        for key, given in changes.items()
    }
    cluster = dataclasses.replace(ROCE.cluster, **sections)
    return [tuple(one) for one in environment(dataclasses.replace(ROCE, cluster=cluster))]


def test_what_is_added_comes_last_with_its_reason() -> None:
    plain = with_cluster()
    assert with_cluster(environment={"NCCL_ALGO": "Ring"}) == [*plain, ("NCCL_ALGO", "Ring", REASON)]
    # What would follow anyway is no contradiction, and is set once.
    assert with_cluster(environment={"NCCL_IB_TC": "106"}) == plain


def test_what_overrides_takes_the_place() -> None:
    plain, found = with_cluster(), with_cluster(overrides={"NCCL_IB_TC": "96"})
    at = [name for name, _, _ in plain].index("NCCL_IB_TC")
    assert found == [*plain[:at], ("NCCL_IB_TC", "96", REASON), *plain[at + 1 :]]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("NCCL_IB_TC", "0", "contradicts 106, which follows from the rest"),
        ("NCCL_SOCKET_IFNAME", "eth0", "contradicts =bond0"),
        ("OMP_NUM_THREADS", "8", "contradicts 1"),
        ("NCCL_IB_DISABLE", "1", "would make cluster.fabric.hcas void"),
        ("NCCL_NET", "Socket", "would make cluster.fabric.hcas void"),
        ("NCCL_IB_GID_INDEX", "3", "would make cluster.fabric.gid_index void"),
        ("NCCL_SOCKET_FAMILY", "AF_INET6", "would make cluster.fabric.address_family void"),
        ("NCCL_MAX_CTAS", "16", "would set one limit for all communicators"),
        ("NCCL_MIN_P2P_NCHANNELS", "32", "would set one limit for all communicators"),
        ("K25_NUMA_BINDING", "off", "contradicts gpu"),
    ],
)
def test_a_contradiction_is_refused_unless_it_says_so(name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_cluster(environment={name: value})
    assert str(caught.value).startswith(f"cluster.environment.{name}={value}: ")
    assert words in str(caught.value) and "cluster.overrides" in str(caught.value)
    assert (name, value, REASON) in with_cluster(overrides={name: value})


def test_harmless_values_and_clusters_without_a_fabric_contradict_nothing() -> None:
    assert with_cluster(environment={"NCCL_IB_DISABLE": "0", "NCCL_NET": "IB"})[-2:] == [
        ("NCCL_IB_DISABLE", "0", REASON), ("NCCL_NET", "IB", REASON)
    ]  # fmt: skip
    config = compose(["experiment=smoke"])
    own = {"NCCL_IB_DISABLE": SiteVariable(value="1", reason=REASON)}
    cluster = dataclasses.replace(config.cluster, environment=own)
    assert environment(dataclasses.replace(config, cluster=cluster))[-1].value == "1"


OF_A_SITE = {
    "NCCL_TOPO_FILE": "/opt/site/topo.xml",
    "NCCL_NVLS_ENABLE": "0",
    "NCCL_IB_QPS_PER_CONNECTION": "4",
    "NCCL_NET_PLUGIN": "/opt/site/libnccl-net.so",
}
"""What a RoCE site is likely to need on its first day."""


def test_variables_of_nccl_reach_ranks_in_every_way_and_those_of_the_shell_in_none() -> None:
    own = {name: SiteVariable(value=value, reason=REASON) for name, value in OF_A_SITE.items()}
    config = dataclasses.replace(ROCE, cluster=dataclasses.replace(ROCE.cluster, environment=own))
    shell = {"NCCL_TOPO_FILE": "/of/a/shell", "NCCL_P2P_DISABLE": "1", "PATH": os.environ["PATH"]}
    # 1. Under SLURM: the script up to where it starts something.
    script = render(config, Path("/runs/x"), Path("/code"), "/env/bin/python")
    head = script[: script.index("\ncd ")] + "\nexec env"
    done = subprocess.run(["bash", "-c", head], env=shell, capture_output=True, text=True, check=True)
    by_slurm = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    # 2. By hand, and 3. in a pod.
    by_hand = variables_of(config, shell)
    in_a_pod = {variable.name: variable.value for variable in environment(config)}
    for found in (by_slurm, by_hand, in_a_pod):
        assert {name: found.get(name) for name in OF_A_SITE} == OF_A_SITE
        assert "NCCL_P2P_DISABLE" not in found


def test_there_must_be_something_to_override() -> None:
    with pytest.raises(
        ConfigError, match=r"^cluster\.overrides\.NCCL_ALGO=Ring: nothing else .*environment$"
    ):
        with_cluster(overrides={"NCCL_ALGO": "Ring"})
    with pytest.raises(ConfigError, match=r"^cluster\.secrets\.NCCL_DEBUG: follows from the rest"):
        with_cluster(secrets={"NCCL_DEBUG": "/x"})


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "wandb_api_key", "PASSWORD", "AWS_SECRET_ACCESS_KEY", "DB_PASS"]
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret(name) and literal_secrets(f"export {name}=abc") == [name]
    for fine in (f"{name}=$(cat /f)", f'export {name}="$(< ~/f)"', f"{name}=$OTHER", f"unset {name}"):
        assert not literal_secrets(fine), fine


@pytest.mark.parametrize(
    "name",
    ["TOKENIZERS_PARALLELISM", "KEYBOARD", "NCCL_ALGO", "HF_TOKEN_PATH", "BYPASS", "GIT_CREDENTIALS_FILE"],
)
def test_names_that_only_resemble_them(name: str) -> None:
    assert not is_secret(name)


SECRET = "hunter2 $(touch x) 'q' \"d\" \\ #"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that only its owner can read."""
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    return path


def with_secret(path: Path) -> list[str]:
    return ["experiment=smoke", "cluster=local_slurm", f"cluster.secrets={{MY_TOKEN: '{path}'}}"]


def test_a_secret_reaches_the_ranks_and_no_file(secret: Path, tmp_path: Path) -> None:
    config = compose(with_secret(secret))
    script = render(config, Path("/runs/x"), tmp_path, sys.executable)
    assert "hunter2" not in script + to_yaml(config) + str(config) and str(secret) in script
    body = script.partition("\ncd ")[0] + '\nprintf "%s" "$MY_TOKEN"; env | grep -c "^MY_TOKEN=" >&2\n'
    done = subprocess.run(["bash", "-c", body], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == SECRET and done.stderr == "1\n" and not (tmp_path / "x").exists()
    # By hand they are the same.
    assert secrets_of(config.cluster) == {"MY_TOKEN": SECRET}
    command = start_command(
        config, find_place(config, 0, "127.0.0.1"), "k25_train.train", with_secret(secret)
    )
    assert variables_of(config, {})["MY_TOKEN"] == SECRET and "hunter2" not in " ".join(command)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml").config.cluster.secrets == {"MY_TOKEN": str(secret)}


def test_a_script_whose_secret_is_gone_ends_and_says_which(secret: Path, tmp_path: Path) -> None:
    script = render(compose(with_secret(secret)), Path("/runs/x"), tmp_path, sys.executable)
    secret.unlink()
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode and str(secret) in done.stderr


def test_private_files_are_checked_before_a_job_costs_anything(secret: Path) -> None:
    config = compose(with_secret(secret))
    check_private_files(config)
    secret.chmod(0o640)
    with pytest.raises(ConfigError, match=r"^cluster\.secrets\.MY_TOKEN=.*\(mode 640\): chmod 600 "):
        check_private_files(config)
    secret.chmod(0o600)
    secret.write_text("")
    with pytest.raises(ConfigError, match="is empty"):
        check_private_files(config)
    secret.unlink()
    with pytest.raises(ConfigError, match="is not a file that you can read"):
        check_private_files(config)
    with pytest.raises(
        ConfigError, match=r"cluster\.secrets\.MY_TOKEN=.*cannot be read \(FileNotFoundError\)"
    ):
        secrets_of(config.cluster)


def test_the_credentials_of_registries_are_private_too(tmp_path: Path) -> None:
    file = tmp_path / ".credentials"
    file.write_text("machine r login u password p\n")
    image = ["cluster.slurm.container_image=/x.sqsh", f"cluster.slurm.container_credentials={file}"]
    config = compose(["experiment=smoke", "cluster=local_slurm", *image])
    assert environment(config)[-1][:2] == ("ENROOT_CONFIG_PATH", str(tmp_path))
    file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"^cluster\.slurm\.container_credentials=.*chmod 600"):
        check_private_files(config)


def test_a_cluster_says_all_of_it(tmp_path: Path) -> None:
    """The dry run, as a user calls it: neither torch nor a value of a secret."""
    code = "import sys; sys.modules['torch'] = None; from launch.slurm import main; main()"
    overrides = ["experiment=k25_pretrain_4k", "cluster=site_pyxis", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-c", code, *overrides], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for words in (
        "NCCL_NVLS_ENABLE=0", "K25_METRICS_TOKEN=(secret)", "options of srun    --mpi=none",
        "each node runs this first, in the container\n  ulimit -n 65536\n", "'--container-image=docker://registry.example.org:5000#k25/train:1.0'",
    ):  # fmt: skip
        assert words in done.stdout, words
