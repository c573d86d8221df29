"""The GPU driver: one version on a node, new enough for torch's CUDA, which NCCL is built for, too."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped
from launch.preflight.gpu_state import read_cuda_version
from launch.preflight.system import Build, Missing, System, try_to_read

DRIVER, DRIVER_FOR_CUDA, NCCL_FOR_CUDA = DRIVER_CHECKS = ("GPU driver", "driver for CUDA", "NCCL for CUDA")
LEAST_DRIVER = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}
"""Major version of CUDA -> least driver of minor version compatibility. Source: CUDA compatibility guide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Driver:
    """Versions; None for what the node does not show."""

    module: str | None
    """Of the kernel module."""
    cuda: str | None
    """Highest CUDA version of the driver library that programs load. A package for forward compatibility
    (cuda-compat) raises it above the kernel module's."""
    build: Build


def read_driver(system: System) -> Driver:
    """Read the versions."""
    module = re.search(
        r"^NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s",
        system.read("proc/driver/nvidia/version") or "",
        re.MULTILINE,
    )
    cuda = try_to_read(lambda: read_cuda_version(system))
    return Driver(
        module=module[1] if module else None,
        cuda=None if isinstance(cuda, Missing) else cuda,
        build=system.build(),
    )


def judge_driver(driver: Driver, of_gpus: Sequence[str]) -> list[Finding]:
    """Check the versions; `of_gpus` are the drivers that nvidia-smi reports for each GPU."""
    return [_judge_alike(driver, of_gpus), _judge_cuda(driver, of_gpus), _judge_nccl(driver.build)]


def _judge_alike(driver: Driver, of_gpus: Sequence[str]) -> Finding:
    versions = sorted({*of_gpus, *([driver.module] if driver.module else [])})
    if len(versions) > 1:
        module = f", kernel module {driver.module}" if driver.module else ""
        found = f"GPUs have {', '.join(sorted(set(of_gpus)))}{module}"
        rule = "library and kernel module must be of one version"
        return failed(
            DRIVER, found, rule, "reboot the node after an update of the driver, or install the driver again"
        )
    if not of_gpus:
        return skipped(DRIVER, "nvidia-smi does not report it")
    shown = "" if driver.module else "; the kernel module is not shown"
    return passed(DRIVER, f"{versions[0]}{shown}")


def _judge_cuda(driver: Driver, of_gpus: Sequence[str]) -> Finding:
    check, built = DRIVER_FOR_CUDA, driver.build.cuda
    remedy = (
        "update the driver, or use an image whose torch is built for its CUDA version, or with cuda-compat"
    )
    if built is None:
        rule = "cluster.device is cuda"
        return failed(check, "torch is built for CPUs only", rule, "install torch from the index for CUDA")
    major = int(built.partition(".")[0])
    least = LEAST_DRIVER.get(major)
    oldest = min(of_gpus, key=_parts, default=None)
    # 1. What the library says counts: it may be that of a package for forward compatibility.
    if driver.cuda is not None:
        found = f"torch is built for CUDA {built}, the driver has {driver.cuda}"
        if int(driver.cuda.partition(".")[0]) < major:
            rule = "the driver's major version must not be lower"
            return failed(check, found, f"{rule}: at least driver {least}" if least else rule, remedy)
        return passed(check, found)
    # 2. Otherwise the driver's own version.
    if oldest is None or least is None:
        return skipped(check, f"nothing says whether the driver supports CUDA {built}")
    found = f"torch is built for CUDA {built}, the driver is {oldest}"
    if _parts(oldest) < _parts(least):
        return failed(check, found, f"CUDA {major} needs driver {least}", remedy)
    return passed(check, found)


def _judge_nccl(build: Build) -> Finding:
    check = NCCL_FOR_CUDA
    if build.cuda is None or not build.nccl:
        return skipped(
            check, "torch is built for CPUs only" if build.cuda is None else "NCCL is no package of its own"
        )
    major = build.cuda.partition(".")[0]
    found = ", ".join(f"{name} {version}" for name, version in build.nccl.items())
    others = [name for name in build.nccl if not name.endswith(f"cu{major}")]
    if others:
        rule = f"torch is built for CUDA {build.cuda}"
        return failed(
            check, found, rule, f"pip uninstall {' '.join(others)}; pip install nvidia-nccl-cu{major}"
        )
    return passed(check, found)


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
