"""The machine under the GPUs: kernel log, settings, clock and names of a node, and the verdicts on them."""

from dataclasses import dataclass

from k25_train.config.cluster import Device
from k25_train.config.schema import Config
from launch.preflight.clock_source import ClockSource, judge_clock_source, read_clock_source
from launch.preflight.dispatcher import DISPATCHER, Shmem, judge_dispatcher, read_shmem
from launch.preflight.findings import Finding, skipped
from launch.preflight.kernel_log import KernelLog, read_kernel_log, read_uptime
from launch.preflight.kernel_verdicts import judge_kernel_log
from launch.preflight.names import Names, read_names
from launch.preflight.system import Build, Missing, System, try_to_read
from launch.preflight.tuning import Tuning, judge_tuning, read_tuning


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was read of a node apart from GPUs and cards."""

    up_s: float | None
    """Time since it was started."""
    log: KernelLog | Missing
    tuning: Tuning
    clock_source: ClockSource | Missing
    names: Names
    shmem: Shmem


def read_machine(system: System) -> Machine:
    """Read all of it."""
    return Machine(
        up_s=read_uptime(system),
        log=try_to_read(lambda: read_kernel_log(system)),
        tuning=read_tuning(system),
        clock_source=try_to_read(lambda: read_clock_source(system)),
        names=read_names(system),
        shmem=read_shmem(system),
    )


def judge_machine(machine: Machine, build: Build, config: Config) -> list[Finding]:
    """Every finding that needs no other node."""
    cluster = config.cluster
    has_gpus = cluster.device is Device.cuda
    findings = judge_kernel_log(machine.log, has_gpus=has_gpus)
    findings += judge_tuning(
        machine.tuning, world_size=config.world_size, ranks_per_node=cluster.gpus_per_node
    )
    findings.append(judge_clock_source(machine.clock_source))
    if has_gpus:
        return [*findings, judge_dispatcher(config, machine.shmem, build)]
    return [*findings, skipped(DISPATCHER, "the cluster computes on CPUs")]
