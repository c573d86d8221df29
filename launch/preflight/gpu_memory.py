"""GPU memory: errors that ECC corrected, what is left to repair it with, and what is already in use."""

from collections.abc import Sequence

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.gpu_state import GpuState

CORRECTED, WEAR, IN_USE, RECOVERY = MEMORY_CHECKS = (
    "GPU corrected errors",
    "GPU spare memory",
    "GPU memory in use",
    "GPU recovery",
)
WARN_PER_DAY = 100
FAIL_PER_DAY = 1_000
"""Corrected errors in a day from which a GPU warns and fails. A sound one has none for weeks; each costs
bandwidth, and many precede one that is not correctable. Our choice."""
GROWTH = 10
"""Corrected errors within the minutes of the measurements from which a GPU fails. Our choice."""
WARN_MIB, FAIL_MIB = 1024, 8192
"""Memory in use before the job from which a GPU warns and fails. The driver counts its own separately; a
persistence daemon and MPS take up to a few hundred MiB. Our choice."""
DAY_S = 86_400.0


def judge_memory(
    gpus: Sequence[GpuState], after: Sequence[GpuState] | None, up_s: float | None
) -> list[Finding]:
    """Check memory of a node's GPUs.

    Args:
        gpus: read at rest.
        after: read after the measurements; None if there were none.
        up_s: time since the node was started; the driver counts since then or later. None if unknown.
    """
    return [_judge_corrected(gpus, after, up_s), _judge_wear(gpus), _judge_use(gpus), _judge_recovery(gpus)]


def _judge_corrected(
    gpus: Sequence[GpuState], after: Sequence[GpuState] | None, up_s: float | None
) -> Finding:
    check = CORRECTED
    counts = {number: gpu.corrected_errors for number, gpu in enumerate(gpus)}
    silent = [number for number, count in counts.items() if count is None]
    if silent or not counts:
        return skipped(check, f"GPUs {silent} do not report them")
    # 1. Do they grow now?
    grown = {
        number: (later.corrected_errors or 0) - (counts[number] or 0)
        for number, later in enumerate(after or ())
        if number in counts
    }
    if found := [
        f"GPU {number}: +{count:,} while measuring" for number, count in grown.items() if count >= GROWTH
    ]:
        rule = f"fewer than {GROWTH} within minutes: such memory will fail"
        return failed(check, "; ".join(found), rule, "drain the node, run dcgmi diag -r 3, replace the GPU")
    # 2. How many in a day? Less than a day counts as one: errors of the start say little about a rate.
    days = max(1.0, (up_s or DAY_S) / DAY_S)
    rates = {number: (count or 0) / days for number, count in counts.items()}
    often = {number: rate for number, rate in rates.items() if rate >= WARN_PER_DAY}
    since = f"in {days:.0f} days" if up_s is not None else "since the driver was loaded"
    if often:
        found_text = "; ".join(f"GPU {number}: {counts[number]:,} {since}" for number in often)
        worst = max(often.values())
        rule = f"fewer than {WARN_PER_DAY} in a day, and {FAIL_PER_DAY:,} fail"
        remedy = (
            "reset the GPU, which remaps bad rows (nvidia-smi --gpu-reset); if they come back, replace it"
        )
        return (failed if worst >= FAIL_PER_DAY else warned)(check, found_text, rule, remedy)
    return passed(check, f"{sum(count or 0 for count in counts.values())} {since}")


def _judge_wear(gpus: Sequence[GpuState]) -> Finding:
    check = WEAR
    # A bank without spare rows is sound until its next error; the maker looks at remappings that failed.
    worn = [number for number, gpu in enumerate(gpus) if gpu.is_worn]
    if worn:
        found = f"GPUs {worn} have more errors than the maker accepts, or cannot be repaired"
        return failed(check, found, "broken memory must be repairable", "replace the GPUs")
    pending = [number for number, gpu in enumerate(gpus) if gpu.repair_pending]
    if pending:
        found = f"GPUs {pending} wait for a repair"
        remedy = "reset the GPUs (nvidia-smi --gpu-reset) or reboot the node"
        return failed(check, found, "repairs take effect at a reset", remedy)
    scarce = [
        number for number, gpu in enumerate(gpus) if gpu.banks_with_few_spares or gpu.banks_without_spares
    ]
    if scarce:
        remedy = "have the GPUs replaced at the next maintenance"
        return warned(
            check, f"GPUs {scarce} have banks with few or no spare rows", "most should be left", remedy
        )
    silent = [
        number for number, gpu in enumerate(gpus) if gpu.banks_without_spares is None and gpu.is_worn is None
    ]
    if silent or not gpus:
        return skipped(check, f"GPUs {silent} do not report it")
    return passed(check, f"enough on all {len(gpus)} GPUs")


def _judge_use(gpus: Sequence[GpuState]) -> Finding:
    check = IN_USE
    used = {number: gpu.memory_used_mib for number, gpu in enumerate(gpus)}
    if not used or None in used.values():
        return skipped(check, "nvidia-smi does not report it for all GPUs")
    most = max(size or 0 for size in used.values())
    if most >= WARN_MIB:
        found = "; ".join(
            f"GPU {number}: {size:,} MiB" for number, size in used.items() if (size or 0) >= WARN_MIB
        )
        rule = f"less than {WARN_MIB:,} MiB before the job; the plan counts on all of it"
        remedy = "end what uses it (nvidia-smi --query-compute-apps=pid,name,used_memory --format=csv)"
        return (failed if most >= FAIL_MIB else warned)(check, found, rule, remedy)
    return passed(check, f"at most {most:,} MiB")


def _judge_recovery(gpus: Sequence[GpuState]) -> Finding:
    check = RECOVERY
    wanted = {number: gpu.recovery for number, gpu in enumerate(gpus) if gpu.recovery not in (None, "None")}
    if wanted:
        found = "; ".join(f"GPU {number}: {action}" for number, action in wanted.items())
        rule = "the driver must not want a GPU to be reset, drained or its node rebooted"
        return failed(
            check, found, rule, "do as it says (nvidia-smi --gpu-reset, or a reboot); drain the node"
        )
    if not gpus or any(gpu.recovery is None for gpu in gpus):
        return skipped(check, "the driver does not report it for all GPUs")
    return passed(check, "nothing to do")
