"""PCIe around GPUs: bridges that redirect traffic (ACS), the IOMMU, and errors that are counted (AER)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.findings import Finding, failed, passed, skipped, warned
from launch.preflight.system import BrokenError, Missing, System, try_to_read

ACS, IOMMU, AER = PCI_CHECKS = ("PCIe ACS", "IOMMU", "PCIe errors")
DEVICES = "sys/bus/pci/devices"
DEVICE = re.compile(r"^((?:[0-9a-f]{4,}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) (.*)$", re.MULTILINE)
ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
MANY_CORRECTED = 100
"""Corrected errors of a device while measuring from which it warns: each one is a packet sent again. Our
choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pci:
    """PCIe of a node."""

    is_virtual: bool
    """Whether the node is a virtual machine, whose host sets up ACS and IOMMU."""
    redirecting: tuple[str, ...] | Missing
    """Bridges above GPUs that send traffic between devices through the CPU."""
    iommu_types: Mapping[str, str]
    """Device -> `identity`, or `DMA` and the like where addresses are translated."""
    has_iommu: bool | None
    """Whether the kernel uses one; None if it does not show it."""
    options: tuple[str, ...]
    """Options of the kernel's command line about it."""
    errors: Mapping[str, Mapping[str, int]]
    """Device or bridge above it -> `correctable`, `nonfatal` or `fatal` -> errors since the start."""


def read_pci(system: System, bus_ids: Sequence[str]) -> Pci:
    """PCIe above the devices of `bus_ids`, in the notation of the kernel or of nvidia-smi."""
    devices = [kernel_address(bus_id) for bus_id in bus_ids]
    bridges = {device: upstream(system, device) for device in devices}
    all_above = sorted({bridge for above in bridges.values() for bridge in above})
    words = (system.read("proc/cmdline") or "").split()
    types = {device: system.read(f"{DEVICES}/{device}/iommu_group/type") for device in devices}
    return Pci(
        is_virtual=bool(
            re.search(r"^flags\s*:.*\bhypervisor\b", system.read("proc/cpuinfo") or "", re.MULTILINE)
        ),
        redirecting=try_to_read(lambda: _redirecting(system, all_above)),
        iommu_types={device: kind for device, kind in types.items() if kind is not None},
        has_iommu=bool(system.names("sys/class/iommu")) if system.names(DEVICES) else None,
        options=tuple(word for word in words if "iommu" in word),
        errors=read_pci_errors(system, [*devices, *all_above]),
    )


def read_pci_errors(system: System, addresses: Sequence[str]) -> dict[str, dict[str, int]]:
    """Device -> kind of error -> count; without devices of which the kernel counts none."""
    found: dict[str, dict[str, int]] = {}
    for address in addresses:
        for kind in ("correctable", "nonfatal", "fatal"):
            text = system.read(f"{DEVICES}/{address}/aer_dev_{kind}") or ""
            if total := re.search(r"^TOTAL_ERR_\w+ (\d+)$", text, re.MULTILINE):
                found.setdefault(address, {})[kind] = int(total[1])
    return found


def kernel_address(bus_id: str) -> str:
    """`0000:18:00.0` from nvidia-smi's `00000000:18:00.0`."""
    domain, _, rest = bus_id.lower().partition(":")
    return f"{domain[-4:]}:{rest}"


def upstream(system: System, address: str) -> list[str]:
    """Bridges above a device, from the CPU down; empty if the kernel does not show the device."""
    path = system.target(f"{DEVICES}/{address}") or ""
    return ADDRESS.findall(path)[:-1]


def judge_pci(pci: Pci, errors_after: Mapping[str, Mapping[str, int]] | None) -> list[Finding]:
    """Check what makes PCIe slow or unreliable; `errors_after` are counts after the measurements."""
    return [_judge_acs(pci), _judge_iommu(pci), _judge_errors(pci.errors, errors_after)]


def _redirecting(system: System, bridges: Sequence[str]) -> tuple[str, ...]:
    text = system.run(["lspci", "-D", "-vvv"])
    parts = DEVICE.split(text)
    blocks = dict(zip(parts[1::3], parts[3::3], strict=True))
    own = {address: block for address, block in blocks.items() if address in bridges}
    if not own:
        raise BrokenError("the kernel shows no bridge above a GPU")
    if not any("ACSCtl:" in block for block in own.values()):
        if any("access denied" in block for block in own.values()):
            raise BrokenError("lspci -vvv shows capabilities to root only")
        return ()
    controls = {
        address: re.findall(r"(\w+)\+", found[1])
        for address, block in own.items()
        if (found := re.search(r"ACSCtl:(.*)", block))
    }
    redirects = {"SrcValid", "ReqRedir", "CmpltRedir", "UpstreamFwd"}
    return tuple(address for address, flags in controls.items() if redirects.intersection(flags))


def _judge_acs(pci: Pci) -> Finding:
    check = ACS
    if pci.is_virtual:
        return skipped(check, "a virtual machine: its host sets it up")
    if isinstance(pci.redirecting, Missing):
        return skipped(check, pci.redirecting.reason)
    if pci.redirecting:
        more = f" and {len(pci.redirecting) - 4} more" if len(pci.redirecting) > 4 else ""
        found = f"on for {', '.join(pci.redirecting[:4])}{more}"
        rule = (
            "bridges above GPUs must not redirect: cards and GPUs would reach each other through the CPU only"
        )
        remedy = "disable ACS in the BIOS, or at start with setpci -s BRIDGE ECAP_ACS+0x6.w=0000"
        return warned(check, found, rule, remedy)
    return passed(check, "off on the bridges above the GPUs")


def _judge_iommu(pci: Pci) -> Finding:
    check = IOMMU
    if pci.is_virtual:
        return skipped(check, "a virtual machine: its host sets it up")
    if pci.has_iommu is None:
        return skipped(check, "the kernel shows no PCI devices")
    translated = {device: kind for device, kind in pci.iommu_types.items() if kind != "identity"}
    options = f" ({' '.join(pci.options)})" if pci.options else ""
    if translated:
        found = f"{', '.join(sorted(set(translated.values())))} for {len(translated)} GPUs{options}"
        rule = "addresses of GPUs must not be translated: it slows down or breaks RDMA to their memory"
        return warned(check, found, rule, "add iommu=pt to the kernel's command line and reboot")
    if pci.iommu_types:
        return passed(check, f"passes through for {len(pci.iommu_types)} GPUs{options}")
    if pci.has_iommu:
        return skipped(check, "the kernel does not show the group of any GPU")
    return passed(check, f"off{options}")


def _judge_errors(
    before: Mapping[str, Mapping[str, int]], after: Mapping[str, Mapping[str, int]] | None
) -> Finding:
    check = AER
    if not before:
        return skipped(check, "the kernel counts none for GPUs and the bridges above them")
    remedy = "reseat the GPU or its riser, update the BIOS; drain the node if it comes back"
    grown = {
        (device, kind): count - before[device][kind]
        for device, counts in (after or {}).items()
        for kind, count in counts.items()
        if count > before.get(device, {}).get(kind, count)
    }
    bad = [f"{device} {kind} +{count}" for (device, kind), count in grown.items() if kind != "correctable"]
    if bad:
        return failed(check, "; ".join(bad[:8]), "none may occur while measuring", remedy)
    many = [f"{device} {kind} +{count}" for (device, kind), count in grown.items() if count >= MANY_CORRECTED]
    if many:
        rule = f"fewer than {MANY_CORRECTED} corrected ones while measuring"
        return warned(check, "; ".join(many[:8]), rule, remedy)
    old = [
        f"{device} {kind} {count}"
        for device, counts in before.items()
        for kind, count in counts.items()
        if count and kind != "correctable"
    ]
    if old:
        return warned(check, "; ".join(old[:8]), "none since the node was started", remedy)
    corrected = sum(counts.get("correctable", 0) for counts in before.values())
    while_measuring = ", hardly any while measuring" if after is not None else "; nothing was measured"
    return passed(check, f"{corrected} corrected on {len(before)} devices{while_measuring}")
