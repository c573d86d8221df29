"""What ranks state of themselves: all that decides what they do, nothing that nodes have of their own."""

from dataclasses import replace
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from k25_train.joining import facts
from k25_train.joining.facts import MAY_DIFFER, code_facts, configuration_facts, facts_at_start, package_facts
from k25_train.joining.variables import variable_facts

SMOKE = ["experiment=smoke"]


@pytest.mark.parametrize(
    "override",
    ["optim.lr=1e-3", "train.seed=7", "train.steps=150", "checkpoint.keep=9", "run.dir=/other",
     "data.shuffle=false", "cluster.network_gb_per_s=9", "parallelism.ep=1", "train.stall_timeout_s=999"],
)  # fmt: skip
def test_a_setting_that_differs_is_a_fact_that_differs(override: str) -> None:
    before, after = configuration_facts(compose(SMOKE)), configuration_facts(compose([*SMOKE, override]))
    assert override.partition("=")[0] in {key for key in before if before[key] != after[key]}


def test_where_a_node_keeps_files_may_differ() -> None:
    before = configuration_facts(compose(SMOKE))
    assert configuration_facts(compose([*SMOKE, "data.dir=/scratch/set"])) == before
    secrets = replace(compose(SMOKE).cluster, secrets={"WANDB_API_KEY": "/home/a/key"})
    assert configuration_facts(replace(compose(SMOKE), cluster=secrets)) == before


def test_a_relative_run_folder_is_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose([*SMOKE, "run.dir=here"])
    monkeypatch.chdir(tmp_path)
    assert configuration_facts(config)["run.dir"] == str(tmp_path / "here")


def test_what_may_differ_exists() -> None:
    config = compose(["experiment=k25_pretrain_4k"])
    keys = configuration_facts(config)
    assert not any(f"{key}.".startswith(tuple(f"{other}." for other in MAY_DIFFER)) for key in keys)
    for key in MAY_DIFFER:
        section, *rest = key.split(".")
        value = getattr(config, section)
        for name in rest:
            assert hasattr(value, name), key
            value = getattr(value, name)


def test_all_code_is_compared_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code_facts.cache_clear()
    own = code_facts()
    assert {"k25_train/train.py", "parallel/topology.py", "launch/templates/submit.sbatch"} <= own.keys()
    assert not [name for name in own if "__pycache__" in name or name.endswith(".md")]
    (tmp_path / "a.py").write_text("1")
    (tmp_path / ".a.py.swp").touch()
    # Other ranks import, and Python writes to a temporary name first.
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "a.cpython-312.pyc.139872").touch()
    monkeypatch.setattr(facts, "package_folder", lambda _name: tmp_path)
    code_facts.cache_clear()
    before = dict(code_facts())
    (tmp_path / "a.py").write_text("2")
    code_facts.cache_clear()
    assert before.keys() == code_facts().keys() == {f"{name}/a.py" for name in facts.OWN_PACKAGES}
    assert before != code_facts()
    code_facts.cache_clear()


def test_packages_that_compute_and_communicate() -> None:
    own = package_facts()
    assert own["torch"][0].isdigit() and own["numpy"][0].isdigit() and own["Python"][0] == "3"
    assert "transformer-engine" in own


@pytest.mark.parametrize(
    "name",
    ["NCCL_IB_DISABLE", "NCCL_ALGO", "NCCL_P2P_DISABLE", "GLOO_DEVICE_TRANSPORT", "TORCH_DISTRIBUTED_DEBUG",
     "TORCH_NCCL_ASYNC_ERROR_HANDLING", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS",
     "CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "NVTE_FUSED_ATTN",
     "NVSHMEM_IB_ENABLE_IBGDA", "UCX_TLS", "TRITON_INTERPRET", "NCCL_NET_PLUGIN"],
)  # fmt: skip
def test_variables_that_decide_something(name: str) -> None:
    assert variable_facts({name: "1"}, nccl_files=["/none"]) == {name: "1"}


@pytest.mark.parametrize(
    "name",
    ["CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "NCCL_IB_HCA",
     "NCCL_IB_GID_INDEX", "NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_TOPO_FILE", "TORCH_CPP_LOG_LEVEL",
     "TORCH_HOME", "TRITON_CACHE_DIR", "CUDA_HOME", "OMP_PLACES", "NCCL_VERSION", "TORCHELASTIC_RUN_ID",
     "RANK", "LOCAL_RANK", "SLURMD_NODENAME", "HOSTNAME", "HOME", "PWD"],
)  # fmt: skip
def test_variables_that_a_node_has_of_its_own(name: str) -> None:
    assert variable_facts({name: "1"}, nccl_files=["/none"]) == {}


def test_variables_of_the_cluster_file_are_compared_in_any_case() -> None:
    environment = {"SITE_MODE": "fast", "NCCL_SOCKET_IFNAME": "eth0"}
    own = variable_facts(environment, own=["SITE_MODE", "NCCL_SOCKET_IFNAME"], nccl_files=["/none"])
    assert own == {"NCCL_SOCKET_IFNAME": "eth0", "SITE_MODE": "fast"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("WANDB", "hunter2"), ("TORCH_API_KEY", "hunter2"), ("UCX_PROXY", "http://me:hunter2@host/")],
)
def test_no_secret_is_told(name: str, value: str) -> None:
    first, second = (
        variable_facts({name: text}, secrets=["WANDB"], nccl_files=["/none"])[name]
        for text in (value, value + "3")
    )
    assert first != second and "hunter2" not in first and first.startswith("(secret, not shown; digest ")


def test_what_the_files_of_nccl_set_counts(tmp_path: Path) -> None:
    (tmp_path / "user").write_text("# NCCL_ALGO=Ring\nNCCL_PROTO=LL\n")
    (tmp_path / "site").write_text("NCCL_PROTO = Simple\nNCCL_IB_DISABLE=1\nNCCL_IB_HCA=mlx5_0\nnoise\n")
    files = [str(tmp_path / "user"), str(tmp_path / "site")]
    assert variable_facts({}, nccl_files=files) == {"NCCL_IB_DISABLE": "1", "NCCL_PROTO": "LL"}
    assert variable_facts({"NCCL_IB_DISABLE": "0"}, nccl_files=files)["NCCL_IB_DISABLE"] == "0"
    named = {"NCCL_CONF_FILE": str(tmp_path / "none")}
    assert variable_facts(named, nccl_files=files)["NCCL_PROTO"] == "Simple"


def test_every_kind_is_stated() -> None:
    assert set(facts_at_start(compose(SMOKE))) == {kind.name for kind in facts.AT_START}
