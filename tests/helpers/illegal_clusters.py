"""Ways to break one rule of a cluster's file: of what SLURM is asked for, of the network, of variables."""

from collections.abc import Callable, Sequence
from typing import Any

from tests.helpers.legal_config import Broken, Legal, Values

SLURM: Values = {
    "partition": None, "account": None, "qos": None, "reservation": None, "nice": None, "comment": None,
    "gres": None, "exclusive": True, "mem": 0, "cpus_per_task": None, "constraint": None, "exclude": None,
    "switches": None, "switches_wait_min": None, "sbatch": [], "time_limit_min": 60, "stop_before_end_s": 120,
    "spare_nodes": 0, "min_nodes": None, "restart_wait_s": 5, "preflight": False, "rendezvous_port": 29500,
    "setup": [], "python": None, "mpi": None, "container_image": None, "container_mounts": [],
    "container_setup": [], "container_credentials": None,
}  # fmt: skip
FABRIC: Values = {
    "interface": "bond0", "nccl_interfaces": None, "address_family": "ipv4", "hcas": ["mlx5_0"],
    "gid_index": 3, "traffic_class": 106, "ack_timeout": 22, "retries": 7, "mtu_bytes": None,
}  # fmt: skip


def of_cluster(section: str, key: str, wrong: Sequence[Any], rule: str) -> Callable[[Legal], Broken]:
    """A wrong value in a section that the shrunk model's cluster does without."""
    legal_section = {"slurm": SLURM, "fabric": FABRIC}[section]

    def broken(legal: Legal) -> Broken:
        return (
            {f"cluster.{section}": legal_section | {key.removesuffix(".0"): legal.pick(wrong)}},
            f"cluster.{section}.{key}",
            rule,
        )

    return broken


def long_before_the_end(legal: Legal) -> Broken:
    """Of a job that is longer still."""
    section = SLURM | {"time_limit_min": 2880, "stop_before_end_s": legal.pick([65536, 90000])}
    return {"cluster.slurm": section}, "cluster.slurm.stop_before_end_s", "must be at most 65535"


def text(key: str, wrong: Sequence[str], rule: str, **more: Any) -> Callable[[Legal], Broken]:
    """A wrong text of a cluster with SLURM, in quotes; `more` are other keys of its section."""

    def broken(legal: Legal) -> Broken:
        section = {name: given for name, given in (SLURM | more).items() if name != key.partition(".")[0]}
        wrong_text = legal.pick(wrong).replace("\\", "\\\\").replace('"', '\\"')
        value = f'["{wrong_text}"]' if key.endswith(".0") else f'"{wrong_text}"'
        changes = {"cluster.slurm": section, f"cluster.slurm.{key.removesuffix('.0')}": value}
        return changes, f"cluster.slurm.{key}", rule

    return broken


def gpus_of_another_number(legal: Legal) -> Broken:
    gpus = legal["cluster.gpus_per_node"] + 1
    changes = {
        "cluster.device": "cuda", "cluster.rates.memory_gb": 80, "cluster.slurm": SLURM,
    }  # fmt: skip
    listed = [f"gpu:h800:{gpus}", f"nvme:1,gpu:{gpus}", f"gpu:a:1,gpu:{gpus}"]
    changes["cluster.slurm.gres"] = f"'{legal.pick(listed)}'"
    return changes, "cluster.slurm.gres", "must have as many GPUs as cluster.gpus_per_node"


def of_gpu(key: str, wrong: Sequence[Any], rule: str, device: str = "cuda") -> Callable[[Legal], Broken]:
    """A wrong value of what the site's GPUs are."""

    def broken(legal: Legal) -> Broken:
        section = {"model": "H800", "power_limit_w": 700} | ({key: legal.pick(wrong)} if key else {})
        changes = {
            "cluster.device": device, "cluster.rates.memory_gb": 80 if device == "cuda" else None,
            "cluster.gpu": section,
        }  # fmt: skip
        return changes, f"cluster.gpu.{key}" if key else "cluster.gpu", rule

    return broken


def variable(
    key: str, name: str, wrong: Sequence[Any], broken_key: str, rule: str
) -> Callable[[Legal], Broken]:
    """A wrong entry of the cluster's environment variables or secrets."""

    def broken(legal: Legal) -> Broken:
        return {f"cluster.{key}": {name: legal.pick(wrong)}}, f"cluster.{key}.{broken_key}", rule

    return broken


def named_twice(legal: Legal) -> Broken:
    changes = {"cluster.environment": {"X_DIR": entry("/x")}, "cluster.secrets": {"X_DIR": "/home/u/x"}}
    return changes, "cluster.environment.X_DIR", "is in cluster.secrets, too"


def entry(value: str, reason: str = "because the site needs it") -> Values:
    return {"value": f'"{value}"', "reason": f'"{reason}"'}


def variables_that_are_none(legal: Legal) -> Broken:
    changes = {"cluster.environment": legal.pick([3, "x"])}
    return changes, "cluster.environment", "is a mapping of names to sections"


CLUSTER_BREAKS: dict[str, Callable[[Legal], Broken]] = {
    "partition": of_cluster("slurm", "partition", ["a b", "$x", "a#b", ""], "must consist of letters"),
    "time limit": of_cluster("slurm", "time_limit_min", [0, -5], "must be positive"),
    "spare nodes": of_cluster("slurm", "spare_nodes", [-1], "must not be negative"),
    "stop before end": of_cluster("slurm", "stop_before_end_s", [3600, 9999], "must be shorter than the job"),
    "stop too long before": long_before_the_end,
    "port": of_cluster("slurm", "rendezvous_port", [80, 65500], "must leave 100 ports"),
    **{
        f"form of {key}": text(key, wrong, rule)
        for key, wrong, rule in (
            ("gres", ["gpu:h800:8:2", "gpu 8", "8", "gpu:8;x"], "must list NAME:COUNT or NAME:TYPE:COUNT"),
            ("mem", ["lots", "1.5T", "-1", "10GB"], "must be a number of MiB"),
            ("constraint", ["a b", "a;b", "$x", "a#b"], "must be names of node features"),
            ("exclude", ["n[1-", "n1 n2", "n[a-b]", "n1;x"], "must be a list of nodes as SLURM writes it"),
            ("comment", ["a#b", 'a"b', "$(x)", " a", ""], "must consist of letters, digits, spaces"),
            ("reservation", ["a b", "$x", ""], "must consist of letters"),
            ("mpi", ["a b", ""], "must consist of letters"),
            (
                "sbatch.0",
                ["-p x", "--mail-type FAIL", "--x=a b", "--x='y'", "mem=1", ""],
                "must be one option",
            ),
            ("sbatch.0", ["--x=$(y)", "--x=a;b", "--x=#", "--X=1"], "must be one option"),
            ("setup.0", ["", "  ", "a \\"], "must be one line of shell"),
            ("container_image", ["a b", "dockerd://x", "$x/y", "a#b#c"], "must consist of letters"),
        )
    },
    "options that keys decide": text(
        "sbatch.0",
        ["--time=5", "--tim=5", "--mem=0", "--exclusive", "--gres=x", "--nodes=3"],
        "must not say again",
    ),
    "options of the launcher": text(
        "sbatch.0", ["--array=1-3", "--no-requeue", "--arr=1", "--ntasks=8", "--wrap=x"], "must leave --"
    ),
    "an option twice": of_cluster(
        "slurm", "sbatch", [["'--begin=now'", "'--begin=noon'"]], "must be given once"
    ),
    "a secret in the setup": text(
        "setup.0", ["export HF_TOKEN=abc", "API_KEY=x curl y", "curl https://u:p@h"], "must not hold a secret"
    ),
    "a registry without #": text(
        "container_image",
        ["nvcr.io/nvidia/pytorch:25.01", "docker://r.org:5000/k/x", "localhost:5000/x"],
        "must have # after",
    ),
    "a password of a registry": text(
        "container_image", ["docker://u:secret@r.org#k/x", "u:secret@r.org#k"], "must not hold a password"
    ),
    "credentials": text(
        "container_credentials",
        ["creds", "/home/u/creds", ".credentials"],
        "must be the absolute path",
        container_image="/x.sqsh",
    ),
    "credentials without a container": text(
        "container_credentials", ["/u/.credentials"], "is for a container"
    ),
    "CPUs of a task": of_cluster("slurm", "cpus_per_task", [0, -3], "must be positive"),
    "switches": of_cluster("slurm", "switches", [0, -3], "must be positive"),
    "waiting for no switches": of_cluster("slurm", "switches_wait_min", [5], "says how long to wait"),
    "niceness": of_cluster("slurm", "nice", [2**31, -(2**31)], "must lie within -2147483645"),
    "GPUs of another number": gpus_of_another_number,
    "a variable's name": variable("environment", "A-B", [entry("x")], "A-B", "must be the name of an"),
    "a variable of others": variable(
        "overrides", "MASTER_ADDR", [entry("x")], "MASTER_ADDR", "is set by the"
    ),
    "a secret variable": variable(
        "environment", "MY_TOKEN", [entry("x")], "MY_TOKEN.value", "must not hold a"
    ),
    "a password in a URL": variable(
        "environment", "http_proxy", [entry("http://u:p@proxy")], "http_proxy.value", "must not hold a secret"
    ),
    "nothing is expanded": variable("environment", "X", [entry("$HOME/x")], "X.value", "must not contain $"),
    "a line break": variable(
        "environment", "X", [entry("a\x01b")], "X.value", "must be one line of printable"
    ),
    "a reason": variable(
        "environment", "X", [entry("1", ""), entry("1", "why not")], "X.reason", "must say in"
    ),
    "variables that are none": variables_that_are_none,
    "a secret itself": variable(
        "secrets", "X", ["hunter2", "./x"], "X", "must be the absolute path of a file"
    ),
    "a name in two places": named_twice,
    "interfaces": of_cluster(
        "fabric", "interface", ["'=bond0'", "'^lo'", "'a,,b'", "abcdefghijklmnop"], "must consist of letters"
    ),
    "interfaces of NCCL": of_cluster(
        "fabric", "nccl_interfaces", ["'=^lo'", "'a b'", "''"], "must be NCCL's"
    ),
    "an interface twice": of_cluster("fabric", "interface", ["'bond0,bond0'"], "must be named once"),
    "form of HCAs": of_cluster("fabric", "hcas.0", [["'mlx5_0:0'"]], "must consist of letters"),
    "an HCA twice": of_cluster("fabric", "hcas", [["mlx5_0", "'mlx5_0:1'"]], "must be named once"),
    "GPU model": of_gpu("model", ["'H800; x'", "' H800'", "''", "'H800  SXM'"], "must be words of a product"),
    "GPU power": of_gpu("power_limit_w", [0, -5], "must be positive"),
    "GPUs of CPUs": of_gpu("", [], "is for GPUs, but cluster.device is cpu", device="cpu"),
    "least nodes": of_cluster("slurm", "min_nodes", [0, 999], "must lie within 1 to cluster.nodes"),
    "HCAs": of_cluster("fabric", "hcas", [[]], "must name a device"),
    "GID": of_cluster("fabric", "gid_index", ["third", -1, 256], "must be a row of the GID table"),
    "traffic class": of_cluster("fabric", "traffic_class", [-1, 256], "must lie within 0 to 255"),
    "MTU": of_cluster("fabric", "mtu_bytes", [0, 1279, 65536], "must lie within 1280 to 65535"),
}
"""Name -> break."""
