"""`launch.slurm` against SLURM's commands as scripts: what it writes, submits and refuses."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from k25_train.compose.resolve import compose, load
from k25_train.plan.memory.checkpoint import checkpoint_bytes
from k25_train.run_folder.lock import current
from launch import scheduler, slurm
from launch.feasibility import legal_nodes
from launch.history import Outcome
from launch.submission import Submission
from tests.helpers.project_sources import REPO

TOOLS = {
    "sinfo": "echo a_small a_small 1; echo main main* 2; echo other other 1",
    "squeue": 'echo "${FAKE_STATE:-}"',
    "sbatch": """
for argument in "$@"; do script=$argument; done
echo "$*" >> "$FAKE_LOG"
if [ -n "${FAKE_REFUSAL:-}" ]; then echo "sbatch: error: $FAKE_REFUSAL" >&2; exit 1; fi
case "$*" in --test-only*) echo "sbatch: Job 7 to start at noon" >&2;; *) echo 7;; esac""",
}


class Login:
    """A login node: its SLURM, a data folder, and what was submitted."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With all that a submission needs."""
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.run = folder / "run"
        (folder / "bin").mkdir()
        for name, script in TOOLS.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        (folder / "data").mkdir()
        (folder / "data/dataset.json").touch()
        monkeypatch.setenv("PATH", f"{folder}/bin:/usr/bin:/bin")
        monkeypatch.setenv("FAKE_LOG", str(folder / "sbatch.log"))

    def submit(self, *arguments: str) -> str:
        """What the command prints. Raises AssertionError if it fails."""
        status, printed = self.call(*arguments)
        assert status == 0, printed
        return printed

    def refusal(self, *arguments: str) -> str:
        """The error that it ends with, having submitted nothing."""
        status, printed = self.call(*arguments)
        assert status == 2, printed
        assert "Traceback" not in printed
        assert "submitted job" not in printed and not (self.run / "attempts").exists()
        return printed

    def call(self, *arguments: str) -> tuple[int, str]:
        """Exit status, and stdout with stderr."""
        defaults = ["experiment=smoke", "cluster=local_slurm", f"data.dir={self.folder}/data"]
        given = [f"run.dir={self.run}", *arguments]
        self.monkeypatch.setattr(sys, "argv", ["k25-submit", *defaults, *given])
        status = 0
        try:
            slurm.main()
        except SystemExit as end:
            status = int(end.code or 0)
        printed = self.capsys.readouterr()
        return status, printed.out + printed.err

    def sbatch_calls(self) -> list[str]:
        """The arguments of each call of sbatch."""
        log = self.folder / "sbatch.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Login:
    """A login node where everything is in order."""
    return Login(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--force"]], ids=str)
def test_first_weights_of_a_template_have_to_be_filled_in(login: Login, more: list[str]) -> None:
    parts = "checkpoint.init_parts={vision_tower: <import of SigLIP>}"
    told = login.refusal(parts, "checkpoint.init_fresh=['*']", *more)
    assert "checkpoint.init_parts.vision_tower=<import of SigLIP>" in told
    assert "has to be filled in" in told and "-> name a checkpoint or an import" in told


def test_what_a_submission_leaves(login: Login) -> None:
    printed = login.submit(
        "train.seed=7", "--max-restarts", "5", "cluster.slurm.min_nodes=1", "parallelism.ep=1"
    )

    test, call = login.sbatch_calls()
    token = Submission.read(login.run).token
    staged = login.run / f"submit.new.{token}/submit.sbatch"
    assert len(token) == 32 and (test, call) == (f"--test-only {staged}", f"--parsable {staged} {token}")
    assert "submitted job 7: to start at noon" in printed
    assert f"tail -F {login.run}/attempts/latest/rank_0.log" in printed
    config = load(login.run / "submit.yaml").config
    assert config.train.seed == 7
    facts = Submission.read(login.run)
    assert (facts.run, facts.num_steps, facts.max_restarts) == (str(login.run), config.train.steps, 5)
    assert facts.legal_nodes == [1, 2] and facts.python == sys.executable
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True, check=True)
    assert facts.code.startswith(head.stdout.strip())
    holder = current(login.run)
    assert holder is not None and (holder.job_id, holder.process) == (7, None)
    assert sorted(path.name for path in login.run.iterdir()) == [
        "lock.json", "submit.json", "submit.sbatch", "submit.yaml"
    ]  # fmt: skip


@pytest.mark.parametrize("preflight", [True, False])
def test_the_supervisor_gets_what_the_cluster_says(login: Login, preflight: bool) -> None:
    given = ["spare_nodes=1", "stop_before_end_s=200", "rendezvous_port=4000", "restart_wait_s=7"]
    given.append(f"preflight={str(preflight).lower()}")
    printed = login.submit(*(f"cluster.slurm.{one}" for one in given))
    facts = Submission.read(login.run)
    assert (facts.spare_nodes, facts.stop_within_s, facts.rendezvous_port) == (1, 160.0, 4000)
    assert (facts.restart_wait_s, facts.preflight) == (7.0, preflight)
    assert ("preflight.log" in printed) is preflight


def test_nodes_that_are_down_do_not_keep_a_job_from_the_queue(login: Login) -> None:
    """SLURM's forecast fails then, though it would queue the job."""
    words = "allocation failure: Requested node configuration is not available"
    tool = login.folder / "bin/sbatch"
    forecast = f'case "$*" in --test-only*) echo "{words}" >&2; exit 1;; esac'
    tool.write_text(f"#!/bin/sh\n{forecast}\n{TOOLS['sbatch']}\n")
    printed = login.submit()
    assert f"submitted job 7: SLURM cannot estimate the start ({words})" in printed


def test_a_slow_forecast_does_not_keep_a_job_from_the_queue(login: Login) -> None:
    login.monkeypatch.setattr(scheduler, "ANSWER_S", 0.5)
    tool = login.folder / "bin/sbatch"
    forecast = 'case "$*" in --test-only*) exec sleep 5;; esac'
    tool.write_text(f"#!/bin/sh\n{forecast}\n{TOOLS['sbatch']}\n")
    assert "submitted job 7: SLURM cannot estimate the start (" in login.submit()


def test_a_job_may_name_several_partitions(login: Login) -> None:
    """One that is too small is no obstacle, if another has the nodes."""
    assert "submitted job 7" in login.submit("cluster.slurm.partition='other,main'")
    assert "#SBATCH --partition=other,main" in (login.run / "submit.sbatch").read_text()


def test_a_cluster_without_a_default_partition_is_left_to_slurm(login: Login) -> None:
    (login.folder / "bin/sinfo").write_text("#!/bin/sh\necho small small 1\n")
    assert "submitted job 7" in login.submit()


def test_the_nodes_python_may_be_below_home(login: Login) -> None:
    login.monkeypatch.setenv("HOME", "/home/user")
    login.submit("cluster.slurm.python='~/venv/bin/python'")
    assert "exec /home/user/venv/bin/python -m" in (login.run / "submit.sbatch").read_text()


def test_a_dry_run_prints_all_and_leaves_nothing(login: Login) -> None:
    printed = login.submit("--dry-run", "experiment=k25_pretrain_4k", "cluster=h800_roce")
    assert "1026.9B parameters" in printed
    assert "32 nodes x 8 = 256 of cluster h800_roce (cuda)" in printed
    assert "NCCL_IB_TC=106" in printed and "the switches' lossless queue" in printed
    assert "exec " in printed.splitlines()[-1]
    assert not login.run.exists() and not login.sbatch_calls()


def test_a_dry_run_needs_no_slurm(login: Login) -> None:
    no_slurm(login)
    assert "#!/bin/bash" in login.submit("--dry-run")


def test_overrides_a_shell_would_evaluate_arrive_as_they_are(login: Login) -> None:
    marker = login.folder / "evaluated"
    data = login.folder / f'a b $(touch {marker.name}) `x` "q" & ; ü'
    shutil.copytree(login.folder / "data", data)
    quoted = str(data).replace('"', '\\"')
    login.submit(f'data.dir="{quoted}"')
    assert load(login.run / "submit.yaml").config.data.dir == str(data)
    assert "touch" not in (login.run / "submit.sbatch").read_text()
    assert not marker.exists()


def test_the_run_means_the_same_wherever_it_was_submitted(login: Login) -> None:
    """Nodes work in the folder of the code, users anywhere."""
    login.monkeypatch.chdir(login.folder)
    (login.folder / "k25.sqsh").touch()
    image = "cluster.slurm.container_image=./k25.sqsh"
    login.submit("run.dir=runs/x", "data.dir=data", "data.tokenizer=data/tokenizer.json", image)
    config = load(login.folder / "runs/x/submit.yaml").config
    assert config.run.dir == str(login.folder / "runs/x")
    assert config.data.dir == str(login.folder / "data")
    assert config.data.tokenizer == str(login.folder / "data/tokenizer.json")
    options = Submission.read(login.folder / "runs/x").container
    assert options[0] == f"--container-image={login.folder}/k25.sqsh"


def full_disk(login: Login) -> None:
    usage = shutil.disk_usage("/")._replace(free=1 << 20)
    login.monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)


def refusing_sbatch(login: Login) -> None:
    login.monkeypatch.setenv("FAKE_REFUSAL", "Invalid account or account/partition combination specified")


def other_partition(login: Login) -> None:
    login.monkeypatch.setenv("SBATCH_PARTITION", "other")


def no_slurm(login: Login) -> None:
    git = shutil.which("git")
    assert git is not None
    shutil.rmtree(login.folder / "bin")
    (login.folder / "bin").mkdir()
    (login.folder / "bin/git").symlink_to(git)
    login.monkeypatch.setenv("PATH", str(login.folder / "bin"))


def no_data(login: Login) -> None:
    (login.folder / "data/dataset.json").unlink()


def run_is_a_file(login: Login) -> None:
    login.run.touch()


def locked(login: Login) -> None:
    login.run.mkdir()
    (login.run / "lock.json").write_text('{"job_id": 5}')
    login.monkeypatch.setenv("FAKE_STATE", "PENDING")


def damaged_lock(login: Login) -> None:
    login.run.mkdir()
    (login.run / "lock.json").write_text("{")


def as_it_is(_login: Login) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "arguments", "expected"),
    [
        (as_it_is, "cluster.slurm.partition=mian", "SLURM has no such partition; use one of a_small, main"),
        (as_it_is, "cluster=local", "cluster=local: its slurm is null, so there is nothing to submit to"),
        (as_it_is, "cluster.nodes=3", "parallelism.pp=2\n      must divide"),
        (as_it_is, "cluster.slurm.container_image=/no.sqsh", "/no.sqsh: no such file"),
        (as_it_is, "--max-restarts=-1", "--max-restarts -1: must not be negative"),
        (as_it_is, "train.stpes=5", "did you mean steps?"),
        (full_disk, "", "GiB are free, not enough for one checkpoint of"),
        (as_it_is, "cluster.nodes=4 train.global_batch_size=16", "partition main has 2 nodes: use fewer"),
        (as_it_is, "cluster.slurm.partition=other", "=2: in total, SLURM's partition other has 1 nodes:"),
        (as_it_is, "cluster.slurm.partition='other,mian'", "partition=mian: SLURM has no such partition"),
        (damaged_lock, "", "lock.json: is damaged"),
        (refusing_sbatch, "", "Invalid account or account/partition combination specified"),
        (other_partition, "", "SBATCH_PARTITION: set in the environment, it would make sbatch ignore"),
        (no_slurm, "", "sinfo is not on PATH: submit from a node of the cluster"),
        (no_data, "", "dataset.json does not exist: name where the data are"),
        (as_it_is, f"run.dir=/tmp/{'x' * 256}", "File name too long [ENAMETOOLONG]"),
        (run_is_a_file, "", "is not a writable folder: choose another"),
        (locked, "", "belongs to job 5, which is PENDING: follow that job, end it with `scancel 5`"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_it_is_submitted(
    login: Login, prepare: Callable[[Login], None], arguments: str, expected: str
) -> None:
    prepare(login)
    # One rank more or less: nodes x 1 in the case of nodes that do not divide.
    given = ["cluster.gpus_per_node=1", *arguments.split()] if "nodes=3" in arguments else arguments.split()
    assert expected in login.refusal(*given)


def test_nodes_on_which_the_run_may_go_on() -> None:
    k25 = ["experiment=k25_pretrain_4k", "cluster.nodes=128"]
    assert legal_nodes(compose([*k25])) == [128]
    assert legal_nodes(compose([*k25, "cluster.slurm.min_nodes=1"])) == [32, 64, 128]
    for nodes in legal_nodes(compose([*k25, "cluster.slurm.min_nodes=1"])):
        compose([*k25, f"cluster.nodes={nodes}"])


GREEDY = ["experiment=k25_pretrain_4k", "cluster=h800_roce", "activation=keep", "optim.offload=none"]
"""Keeps all on the device, which has too little for it."""


def test_what_does_not_fit_is_refused_unless_forced(login: Login) -> None:
    refused = login.refusal(*GREEDY)
    assert "ConfigError: cluster.nodes=32: memory is too small" in refused
    assert "DOES NOT FIT: stage 1 has" in refused
    assert "-> change the configuration, or submit with --force if you know better" in refused
    assert not login.run.exists()
    forced = login.submit(*GREEDY, "--force", "--dry-run")
    assert "DOES NOT FIT: stage 1 has" in forced and "#SBATCH --nodes=32" in forced


def test_a_run_has_to_fit_on_the_fewest_nodes_it_may_go_on_with(login: Login) -> None:
    """Replicas share the optimizer's state: what fits on many of them does not on few."""
    k25 = ["experiment=k25_pretrain_4k", "cluster=h800_roce", "cluster.nodes=128", "optim.offload=none"]
    assert "FITS: " in login.submit(*k25, "--dry-run")
    refused = login.refusal(*k25, "cluster.slurm.min_nodes=32")
    assert "ConfigError: cluster.slurm.min_nodes=32: memory is too small" in refused


def test_a_checkpoint_takes_weights_masters_and_moments() -> None:
    config = compose(["experiment=k25_pretrain_4k"])
    assert checkpoint_bytes(config) / 1e12 == pytest.approx(1.0269 * 2 + 7659.6 * 2**30 / 1e12, rel=1e-3)


def test_outcomes_are_words_of_the_record() -> None:
    assert json.dumps(Outcome.node_lost) == '"node_lost"'
