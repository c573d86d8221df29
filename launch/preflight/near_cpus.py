"""CPUs and memory near each GPU that the job may use, by the plan with which ranks are bound to them."""

from collections.abc import Mapping, Sequence

from k25_train.startup import numa
from launch.preflight.findings import Finding, passed, skipped, warned
from launch.preflight.gpus import Gpu
from launch.preflight.system import AbsentError, System

NEAR_CPUS = "CPUs near GPUs"


def read_near_cpus(system: System, gpus: Sequence[Gpu]) -> Mapping[int, str]:
    """GPU -> what keeps its rank from running near it; empty if nothing does.

    To be called before this process is bound itself. Raises `AbsentError` if the kernel does not show which
    CPUs it may use.
    """
    status = system.read("proc/self/status") or ""
    lines = [line.split(":", 1)[1] for line in status.splitlines() if line.startswith("Cpus_allowed_list:")]
    if not lines:
        raise AbsentError("/proc/self/status shows no Cpus_allowed_list")
    # nvidia-smi writes the domain with eight digits and capitals, the kernel with four and small letters.
    addresses = [gpu.bus_id.lower()[-len("0000:00:00.0") :] for gpu in gpus]
    plans = [numa.plan(addresses, own, numa.cpus_in(lines[0]), system.root) for own in range(len(gpus))]
    return {gpu.index: plan.text if plan.is_flawed else "" for gpu, plan in zip(gpus, plans, strict=True)}


def judge_near_cpus(far: Mapping[int, str]) -> Finding:
    """Check that every rank can run on its GPU's NUMA node."""
    wrong = {gpu: text for gpu, text in far.items() if text}
    if wrong:
        gpu, text = next(iter(wrong.items()))
        found = f"{len(wrong)} of {len(far)} GPUs; GPU {gpu}: {text}"
        rule = "each rank should run on the NUMA node of its GPU, where its page-locked memory then lies"
        remedy = "ask for whole nodes, or for CPUs of all sockets (cluster.slurm.exclusive, cpus_per_task)"
        return warned(NEAR_CPUS, found, rule, remedy)
    if not far:
        return skipped(NEAR_CPUS, "no GPU")
    return passed(NEAR_CPUS, f"the job has some of each NUMA node's, for all {len(far)} GPUs")
