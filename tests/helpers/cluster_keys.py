"""One setting for each key of a cluster's file that is off in most of them, and what it leads to."""

from pathlib import Path

import pytest

from k25_train.compose.resolve import compose
from launch import slurm, srun
from launch.feasibility import with_absolute_paths

RUN, CODE = Path("/runs/example"), Path("/code")
CPU = ["experiment=smoke", "cluster=local_slurm"]
ROCE = ["experiment=k25_pretrain_4k", "cluster=h800_roce"]
IMAGE = "cluster.slurm.container_image='docker://u@r.example.org:5000#k25/train:1.0'"

KEYS = {
    "address_family": [*ROCE, "cluster.fabric.address_family=ipv6"],
    "comment": [*CPU, "cluster.slurm.comment='stage 1, run a'"],
    "constraint": [*CPU, "cluster.slurm.constraint='h800&[row1|row2]'"],
    "container_credentials": [*CPU, IMAGE, "cluster.slurm.container_credentials=/home/u/enroot/.credentials"],
    "container_image": [*CPU, IMAGE],
    "container_setup": [*CPU, IMAGE, "cluster.slurm.container_setup=['ulimit -n 65536']"],
    "cpus_per_task": [*CPU, "cluster.slurm.cpus_per_task=32"],
    "environment": [
        *ROCE,
        "cluster.environment.NCCL_IB_QPS_PER_CONNECTION={value: 4, reason: 'leafs have four uplinks'}",
        "cluster.environment.no_proxy={value: '.example.org,10.0.0.0/8', reason: 'what is inside the site'}",
    ],
    "exclude": [*CPU, "cluster.slurm.exclude='n[1-3,7],m5'"],
    "exclusive": [*CPU, "cluster.slurm.exclusive=false"],
    "gres": [*ROCE, "cluster.slurm.gres='gpu:h800:8,nvme:1'"],
    "hcas": [*ROCE, "cluster.fabric.hcas=['mlx5_0:1','mlx5_0:2',mlx5_4]"],
    "interface": [*ROCE, "cluster.fabric.interface='ens1f0,ens1f1'"],
    "mem": [*CPU, "cluster.slurm.mem=1900G"],
    "mpi": [*CPU, "cluster.slurm.mpi=none"],
    "nccl_interfaces": [*ROCE, "cluster.fabric.nccl_interfaces='^docker,lo'"],
    "nice": [*CPU, "cluster.slurm.nice=100"],
    "overrides": [
        *ROCE,
        "cluster.overrides.NCCL_IB_TIMEOUT={value: 18, reason: 'this site has no links that flap'}",
        "cluster.overrides.NCCL_IB_GID_INDEX={value: 5, reason: 'rows of these cards were set by hand'}",
    ],
    "reservation": [*CPU, "cluster.slurm.reservation=k25"],
    "sbatch": [*CPU, "cluster.slurm.sbatch=['--mail-type=FAIL,REQUEUE','--mail-user=u@example.org']"],
    "secrets": [*CPU, IMAGE, "cluster.secrets.HF_TOKEN=/home/u/.secrets/hf"],
    "setup": [
        *CPU,
        "cluster.slurm.setup=['source /etc/profile.d/lmod.sh','module load python/3.12  # ours']",
    ],
    "switches": [*CPU, "cluster.slurm.switches=1", "cluster.slurm.switches_wait_min=720"],
}
"""Key -> overrides that set it."""


def submitted(key: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The batch script of a run with this key set, followed by the command lines of its steps."""
    monkeypatch.setattr(slurm, "CHECKOUT", CODE)
    # Figures of the plan are in no script or command line, and take most of the time.
    monkeypatch.setattr(slurm, "expected_step_s", lambda _: None)
    monkeypatch.setattr(slurm, "checkpoint_bytes", lambda _: 0)
    places = [f"run.dir={RUN}", "data.dir=/data/set", "cluster.slurm.python=/env/bin/python"]
    config = with_absolute_paths(compose([*KEYS[key], *places]))
    submission, script = slurm.prepare(config, 3)
    nodes, endpoint = ["n1", "n2"], ["10.0.0.1", "29500"]
    steps = {
        "rendezvous": srun.rendezvous(submission, "n1", "/env/bin/python"),
        "preflight": srun.preflight(submission, RUN / "attempts/1", nodes, endpoint),
        "training": srun.training(submission, 1, nodes, endpoint),
    }
    lines = [f"# {line}" for name, command in steps.items() for line in step_lines(name, command)]
    return "\n".join([script.rstrip("\n"), "", *lines]) + "\n"


def step_lines(name: str, command: list[str]) -> list[str]:
    """A step's words, one line for each, after those that every step has."""
    own = command[command.index("--export=ALL") + 1 :]
    return [f"srun of the {name}:", *(f"  {line}" for word in own for line in word.splitlines())]
