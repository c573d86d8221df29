"""The batch script: a golden file for each cluster, and values that a shell or SLURM would misread."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from k25_train.compose.resolve import CONF_DIR, compose, load, to_yaml
from k25_train.config.cluster import gpus_in
from k25_train.config.forms import GRES
from k25_train.config.sbatch_options import option_problems
from k25_train.errors import ConfigError
from launch.fabric import Variable, environment
from launch.sbatch import check_environment, container_options, export, render
from tests.helpers.project_sources import REPO
from tests.helpers.shellcheck import complaints

GOLDEN = REPO / "tests/golden/sbatch"
CLUSTERS = sorted(path.stem for path in (CONF_DIR / "cluster").glob("*.yaml"))
RUN, CODE, PYTHON = Path("/runs/example"), Path("/code"), "/env/bin/python"


def rendered(*overrides: str) -> str:
    """The script of a run with these overrides, of a made-up place."""
    config = compose(overrides)
    slurm = config.cluster.slurm
    return render(config, RUN, CODE, (slurm and slurm.python) or PYTHON)


def experiment_of(cluster: str) -> list[str]:
    """A legal experiment on a cluster."""
    if cluster == "h800_roce":
        return ["experiment=k25_pretrain_4k", "cluster.nodes=64", "cluster.slurm.min_nodes=32"]
    if cluster.startswith("site_"):
        return ["experiment=k25_pretrain_4k", f"cluster={cluster}"]
    of_size = {
        "local_2ranks": "smoke_lm",
        "local_gpu": "smoke_1gpu",
        "local_8gpu": "smoke_8gpu",
        "h100_2nodes": "moonlight_16b",
    }
    return [f"experiment={of_size.get(cluster, 'smoke')}", f"cluster={cluster}"]


def assert_sound(script: str, folder: Path) -> None:
    """The script is bash, and shellcheck finds nothing to say."""
    path = folder / "script.sbatch"
    path.write_text(script)
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert complaints([path]) == ""


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_every_cluster_renders_as_its_golden_file(cluster: str, tmp_path: Path) -> None:
    config = compose(experiment_of(cluster))
    golden = GOLDEN / f"{cluster}.sbatch"
    if config.cluster.slurm is None:
        assert not golden.exists(), f"cluster={cluster} has no SLURM"
        return
    script = rendered(*experiment_of(cluster))
    assert_sound(script, tmp_path)
    (tmp_path / golden.name).write_text(script)
    assert script == golden.read_text(), f"if the change is meant: cp {tmp_path / golden.name} {golden}"


def test_what_slurm_is_asked_for() -> None:
    lines = rendered(
        *experiment_of("h800_roce"), "cluster.slurm.partition=train", "cluster.slurm.account=k25",
        "cluster.slurm.qos=high", "cluster.slurm.spare_nodes=2", "cluster.slurm.time_limit_min=90",
        "cluster.slurm.stop_before_end_s=600",
    ).splitlines()  # fmt: skip
    expected = (
        "partition=train", "account=k25", "qos=high", "nodes=64-66", "time=90", "signal=B:USR1@600",
        "gpus-per-node=8", "exclusive", "requeue", "no-kill", "output=/runs/example/supervisor.log",
        "open-mode=append", "job-name=k25-example",
    )  # fmt: skip
    assert {f"#SBATCH --{option}" for option in expected} <= set(lines)


@pytest.mark.parametrize("account", ["2024_07", "1e3", "true", "007", "1:30"])
def test_an_account_is_the_text_that_was_typed(account: str) -> None:
    script = rendered("experiment=smoke", "cluster=local_slurm", f"cluster.slurm.account={account}")
    assert f"#SBATCH --account={account}\n" in script


def test_without_spares_the_number_of_nodes_is_fixed() -> None:
    """Even if the run may go on with fewer: SLURM would start it on those, although more are free soon."""
    assert "#SBATCH --nodes=64\n" in rendered(*experiment_of("h800_roce"))


HOSTILE = [
    "a b",
    "a'b",
    'a"b',
    "$(touch x)",
    "`touch x`",
    "a;b",
    "a#b",
    "a\nb",
    "a\\b",
    "a%jb",
    "ü",
    "*",
    "a&b",
]


@pytest.mark.parametrize("key", ["partition", "account", "qos", "python", "container_image"])
def test_what_slurm_would_misread_is_refused(key: str) -> None:
    slurm = compose(["experiment=smoke", "cluster=local_slurm"]).cluster.slurm
    assert slurm is not None and slurm.problems() == []
    # Images are not in the script, and `#` separates a registry from an image.
    for value in sorted({*HOSTILE} - ({"a#b"} if key == "container_image" else set())):
        (problem,) = replace(slurm, **{key: value}).problems()
        assert problem.key == key and problem.value == repr(value)
        assert problem.rule.startswith("must consist of letters, digits")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--time=5", "cluster.slurm.time_limit_min decides"),
        ("--tim=5", "cluster.slurm.time_limit_min decides"),
        ("--excl", "cluster.slurm.exclu"), ("--gres=gpu:1", "cluster.slurm.gres decides"),
        ("--array=1-3", "leave --array to the launcher"), ("--arr=1-3", "leave --array to the launcher"),
        ("--no-req", "leave --no-requeue to the launcher"), ("--export=NONE", "cluster.environment decides"),
    ],
)  # fmt: skip
def test_a_free_option_says_nothing_that_is_decided_not_even_in_short(option: str, words: str) -> None:
    (problem,) = option_problems(["--licenses=k25:1", "--time-min=60", option])
    assert problem.key == "sbatch.2" and words in problem.rule


@pytest.mark.parametrize(
    ("gres", "num_gpus"),
    [
        ("gpu:8", 8), ("gpu:h800:8", 8), ("gpu:2080ti:4,nvme:1", 4), ("gpu:3g.20gb:2", 2), ("gpu:3090:8", 8),
        ("gpu", 1), ("gpu:2080ti", 1), ("nvme:3", None), ("nvme:3,gpu:a:2,gpu:b:2", 4),
    ],
)  # fmt: skip
def test_types_of_gpus_may_begin_with_a_digit(gres: str, num_gpus: int | None) -> None:
    assert GRES.misfits([("gres", gres)]) == []
    assert gpus_in(gres) == num_gpus


@pytest.mark.parametrize("name", ["RESERVATION", "CONSTRAINT", "GRES", "REQ_SWITCH", "PARTITION"])
def test_a_variable_that_wins_over_the_script_is_refused(name: str) -> None:
    check_environment({"SBATCH_DEBUG": "1", "SBATCH_EXPORT": "NONE"})
    with pytest.raises(ConfigError, match=f"^SBATCH_{name}: set in the environment"):
        check_environment({f"SBATCH_{name}": "x"})


def test_so_is_a_run_folder() -> None:
    config = compose(["experiment=smoke", "cluster=local_slurm"])
    for value in HOSTILE:
        with pytest.raises(ConfigError, match=r"run\.dir=.*must consist of .*: rename it, or link to it"):
            render(config, Path("/runs") / value, CODE, PYTHON)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_characters="\0\r", codec="utf-8"), max_size=30))
@example('it\'s "$HOME" `id` $(id)\nand \\ more; #')
def test_a_variable_reaches_its_program_as_it_is(tmp_path: Path, value: str) -> None:
    """No cluster has such values; were one to come, the shell would still not evaluate it."""
    script = tmp_path / "script"
    script.write_text(f'{export(Variable("X", value, "why"))}\nprintf "%s" "$X"\n', encoding="utf-8")
    done = subprocess.run(["bash", str(script)], capture_output=True, check=True)
    assert done.stdout == value.encode()


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=20).filter(
        lambda text: text.strip() and not text.startswith("~")
    )
)
def test_values_of_the_configuration_survive_in_its_file(tmp_path: Path, value: str) -> None:
    """Overrides are never in the script but in submit.yaml, where quotes and newlines mean nothing."""
    config = compose(["experiment=smoke", "cluster=local_slurm"])
    before = render(config, RUN, CODE, PYTHON)
    config.data.dir = value
    (tmp_path / "submit.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "submit.yaml").config.data.dir == value
    assert render(config, RUN, CODE, PYTHON) == before


def test_settings_of_the_submitting_shell_do_not_reach_the_fabric(tmp_path: Path) -> None:
    script = rendered("experiment=k25_pretrain_4k").partition("\ncd ")[0] + "\nenv\n"
    (tmp_path / "script").write_text(script)
    env = {"PATH": os.environ["PATH"], "NCCL_IB_GID_INDEX": "3", "NCCL_IB_TC": "0", "NCCL_ALGO": "Ring"}
    done = subprocess.run(
        ["bash", str(tmp_path / "script")], env=env, capture_output=True, text=True, check=True
    )
    found = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    expected = {name: value for name, value, _ in environment(compose(["experiment=k25_pretrain_4k"]))}
    assert {name: value for name, value in found.items() if name.startswith("NCCL_")} == {
        name: value for name, value in expected.items() if name.startswith("NCCL_")
    }
    assert expected.items() <= found.items()


def test_a_container_gets_the_code_the_run_and_the_data() -> None:
    config = compose(
        [
            "experiment=smoke",
            "cluster=local_slurm",
            "data.dir=/data/set",
            "data.tokenizer=/data/kimi/tiktoken.model",
            "cluster.slurm.container_image=/images/k25.sqsh",
            "cluster.slurm.container_mounts=[/scratch:/scratch]",
        ]
    )
    options = container_options(config, RUN, CODE, environment(config))
    assert options == [
        "--container-image=/images/k25.sqsh",
        "--container-mounts=/code:/code,/runs/example:/runs/example,/data/set:/data/set,"
        "/data/kimi:/data/kimi,/scratch:/scratch",
        "--container-workdir=/code",
        "--container-env=OMP_NUM_THREADS,PYTHONUNBUFFERED",
    ]
    assert container_options(compose(["experiment=smoke"]), RUN, CODE, []) == []
    config.data.dir = "s3://bucket/set"
    assert "bucket" not in " ".join(container_options(config, RUN, CODE, environment(config)))
    with pytest.raises(ConfigError, match="/runs/a:b: is mounted into the container, where"):
        container_options(config, Path("/runs/a:b"), CODE, [])
