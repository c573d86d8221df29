"""What errors in the kernel log say about the node."""

import re
from collections.abc import Sequence

from launch.preflight.findings import Finding, Verdict, failed, passed, skipped, warned
from launch.preflight.kernel_log import (
    FATAL,
    HARDWARE,
    HARDWARE_TEXTS,
    LOG_CHECKS,
    SXID,
    XID,
    Event,
    KernelLog,
)
from launch.preflight.system import Missing
from launch.preflight.xids import (
    ALWAYS_FATAL,
    HARMLESS_SXIDS,
    NVLINK5,
    PROGRAMS,
    REBOOT,
    RECOVERY_ACTION,
    RESET,
    WARNED,
    meaning_of,
)

RECENT_S = 3 * 86_400.0
"""Age up to which an error fails. After it, the GPU has worked through other jobs, or waits to be noticed:
it warns. Our choice."""


def judge_kernel_log(log: KernelLog | Missing, *, has_gpus: bool) -> list[Finding]:
    """A finding for each kind of error; without GPUs those of XID and SXid are skipped."""
    if isinstance(log, Missing):
        return [skipped(check, log.reason) for check in LOG_CHECKS]
    found = []
    for check in LOG_CHECKS:
        if check != HARDWARE and not has_gpus:
            found.append(skipped(check, "the cluster computes on CPUs"))
            continue
        found.append(_judge(check, [event for event in log.events if event.check == check], log))
    return found


def verdict_of(event: Event) -> Verdict:
    """What an error says about the node now."""
    worst = _verdict_when_new(event)
    is_old = event.is_before_reload or (event.age_s is not None and event.age_s > RECENT_S)
    return Verdict.warned if worst is Verdict.failed and is_old else worst


def _verdict_when_new(event: Event) -> Verdict:
    if event.check == HARDWARE:
        kind, _, _, least = HARDWARE_TEXTS[event.code]
        if event.count < least:
            return Verdict.passed
        return Verdict.failed if kind == FATAL else Verdict.warned
    if event.check == SXID:
        if event.code in ALWAYS_FATAL or event.text.startswith("Fatal"):
            return Verdict.failed
        return Verdict.passed if event.code in HARMLESS_SXIDS else Verdict.warned
    if event.code == RECOVERY_ACTION:
        return Verdict.passed if event.needs_nothing else Verdict.failed
    if event.code in NVLINK5:
        return Verdict.warned if re.search(r"non-?fatal", event.text, re.IGNORECASE) else Verdict.failed
    if event.code in RESET or event.code in REBOOT:
        return Verdict.failed
    return Verdict.passed if event.code in PROGRAMS else Verdict.warned


def _judge(check: str, events: Sequence[Event], log: KernelLog) -> Finding:
    by_verdict: dict[Verdict, list[Event]] = {}
    for event in events:
        by_verdict.setdefault(verdict_of(event), []).append(event)
    since = (
        "since the start"
        if log.covered_s is None
        else f"in the last {log.covered_s / 3600:.1f} h that are kept"
    )
    worst = max(by_verdict, default=Verdict.passed)
    if worst is Verdict.passed:
        own = sorted({str(event.code) for event in events}) if check != HARDWARE else []
        mild = f"none of the node; {', '.join(own)} of programs" if own else "none"
        return passed(check, f"{mild} {since}")
    told = by_verdict[worst]
    found = "; ".join(_describe(event) for event in told[:4]) + (
        f" and {len(told) - 4} more" if len(told) > 4 else ""
    )
    if worst is Verdict.failed:
        rule = f"none within {RECENT_S / 86_400:g} days since the driver was loaded"
        return failed(check, found, rule, _remedy(check, told))
    rule = "none; older than that, or before the driver was loaded again, they only warn"
    if check == XID and any(_verdict_when_new(event) is not Verdict.failed for event in told):
        rule = "none; the driver dealt with these, but more may follow"
    if check != XID:
        rule = "none; these have not stopped the node, but more may follow"
    return warned(check, found, rule, _remedy(check, told))


def _remedy(check: str, events: Sequence[Event]) -> str:
    if check == HARDWARE:
        return "see dmesg and the BMC's log; drain the node and have the part replaced"
    if check == SXID:
        return (
            "restart nvidia-fabricmanager and reset all GPUs, or reboot the node; if it comes back, replace"
        )
    if any(event.code in REBOOT for event in events):
        return "drain and reboot the node, run dcgmi diag -r 3; if it comes back, replace the GPU"
    if all(event.code in WARNED or event.code not in RESET for event in events):
        return "watch the GPU; reset it (nvidia-smi --gpu-reset), run dcgmi diag -r 3 when the node is free"
    return "reset the GPU (nvidia-smi --gpu-reset) and reload the driver, or reboot; run dcgmi diag -r 3"


def _describe(event: Event) -> str:
    times = f"{event.count} times, last " if event.count > 1 else ""
    when = "at an unknown time" if event.age_s is None else f"{times}{event.age_s / 3600:.1f} h ago"
    if event.check == HARDWARE:
        return f"{HARDWARE_TEXTS[event.code][1]} {when}: {event.text}"
    meaning = meaning_of(event.code) if event.check == XID else ""
    words = f" ({meaning})" if meaning else ""
    return f"{event.check} {event.code}{words} on {event.place} {when}: {event.text}"
