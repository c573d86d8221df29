"""Each fault of what connects GPUs, NVLink and PCIe, and of their clocks is named by one check."""

import pytest

from k25_train.config.schema import Config
from launch.preflight.nvlink import read_link_errors
from launch.preflight.system import AbsentError, BrokenError
from tests.helpers.node_faults import (
    BAD,
    PASSED,
    SKIPPED,
    SO_SO,
    Change,
    Fault,
    assert_named,
    both,
    found_by,
    gpu,
    in_gpu,
    in_log,
    says,
    write,
)
from tests.helpers.recorded_node import RecordedNode, change_output, nvlink_report

Q, LINKS, ERRORS = "nvidia-smi -q", "nvidia-smi nvlink --status", "nvidia-smi nvlink --errorcounters"
DEVICE = "sys/bus/pci/devices/0000:1a:00.0"
SWITCH_PORT = "0000:52:02.0"


def aer(kind: str, name: str, count: int) -> Change:
    return write(f"{DEVICE}/aer_dev_{kind}", f"Undefined 0\nTOTAL_ERR_{name} {count}\n")


FAULTS = [
    # NVLink.
    Fault(
        "links down", both(*(in_gpu(LINKS, 3, "26.562 GB/s", "<inactive>") for _ in range(2))),
        "NVLink links", BAD, ("GPU 3: 6 of 8 links up", "Xid 74"),
    ),
    Fault(
        "slow NVLink", in_gpu(LINKS, 3, "26.562 GB/s", "13.281 GB/s"), "NVLink links", BAD,
        ("GPU 3 link 0: 13.281 of 26.562",),
    ),
    Fault(
        "no link is up", says(LINKS, nvlink_report("<inactive>", 8)), "NVLink links", BAD,
        ("no link is up",),
    ),
    Fault(
        "no links shown",
        says(LINKS, "NVML: Unable to retrieve Nvlink information as all links are inActive\n"),
        "NVLink links", SKIPPED, ("0 of 8 GPUs",),
    ),
    Fault(
        "link broke down", in_gpu(ERRORS, 2, "Recovery Errors: 0", "Recovery Errors: 1"), "NVLink errors",
        SO_SO, ("GPU 2 link 0 Recovery Errors 1",),
    ),
    Fault(
        "many CRC errors", in_gpu(ERRORS, 2, "CRC Errors: 0", "CRC Errors: 65535"), "NVLink errors", SO_SO,
        ("CRC Errors 65,535",),
    ),
    Fault(
        "few errors now", lambda _: None, "NVLink errors", SO_SO, ("GPU 5 link 0 Replay Errors +3",),
        meanwhile=in_gpu(ERRORS, 5, "Replay Errors: 0", "Replay Errors: 3"),
    ),
    Fault(
        "many errors now", lambda _: None, "NVLink errors", BAD, ("GPU 5 link 0 Replay Errors +300",),
        meanwhile=in_gpu(ERRORS, 5, "Replay Errors: 0", "Replay Errors: 300"),
    ),
    Fault(
        "link breaks down now", lambda _: None, "NVLink errors", BAD, ("GPU 5 link 0 Recovery Errors +1",),
        meanwhile=in_gpu(ERRORS, 5, "Recovery Errors: 0", "Recovery Errors: 1"),
    ),
    Fault(
        "no error counters", says(ERRORS, BrokenError("nvidia-smi nvlink -e: status 3: not supported")),
        "NVLink errors", SKIPPED, ("not supported",),
    ),
    Fault(
        "fabric manager off", in_log(0, "State", "Not Started"), "NVLink fabric", BAD,
        ("GPU 0: Not Started", "nvidia-fabricmanager"),
    ),
    Fault("fabric hangs", in_log(0, "State", "In Progress"), "NVLink fabric", BAD, ("In Progress",)),
    Fault(
        "fabric refuses", in_log(4, "Status", "Insufficient Resources"), "NVLink fabric", BAD,
        ("GPU 4: Completed, Insufficient",),
    ),
    Fault(
        "fabric degraded", in_log(4, "Bandwidth", "Degraded"), "NVLink fabric", BAD,
        ("GPU 4: Bandwidth: Degraded",),
    ),
    Fault(
        "matrix of fewer",
        change_output("nvidia-smi topo", "\nGPU7\t", "\nGPU?\t"),
        "NVLink", SKIPPED, ("shows 7 of 8 GPUs",),
    ),
    # PCIe.
    Fault(
        "one generation lower", gpu(3, pcie__link__gen__current="4"), "GPU PCIe link", BAD,
        ("GPU 3: generation 4 of 5",),
    ),
    Fault(
        "clock locked", gpu(3, clocks__current__sm="600"), "GPU clocks", SO_SO,
        ("GPU 3: 600 of 1980 MHz",),
    ),
    Fault(
        "ACS on",
        change_output("lspci", "ACSCtl:\tSrcValid-", "ACSCtl:\tSrcValid+"),
        "PCIe ACS", SO_SO, ("on for 0000:10:01.0", "and 20 more", "ECAP_ACS"),
    ),
    Fault(
        "ACS for root only",
        says("lspci", f"{SWITCH_PORT} PCI bridge: Broadcom\n\tCapabilities: <access denied>\n"),
        "PCIe ACS", SKIPPED, ("root only",),
    ),
    Fault(
        "no lspci", says("lspci", AbsentError("lspci is not installed")), "PCIe ACS", SKIPPED,
        ("lspci is not installed",),
    ),
    Fault(
        "IOMMU translates", write(f"{DEVICE}/iommu_group/type", "DMA-FQ\n"), "IOMMU", SO_SO,
        ("DMA-FQ for 1 GPUs (iommu=pt)",),
    ),
    Fault("PCIe error once", aer("fatal", "FATAL", 1), "PCIe errors", SO_SO, ("0000:1a:00.0 fatal 1",)),
    Fault(
        "PCIe error now", lambda _: None, "PCIe errors", BAD, ("nonfatal +2",),
        meanwhile=aer("nonfatal", "NONFATAL", 2),
    ),
    Fault(
        "PCIe repeats", lambda _: None, "PCIe errors", SO_SO, ("correctable +500",),
        meanwhile=aer("correctable", "COR", 500),
    ),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named(fault: Fault, recorded: RecordedNode, config: Config) -> None:
    assert_named(fault, recorded, config)


def test_links_and_clocks_at_rest_are_not_judged(recorded: RecordedNode, config: Config) -> None:
    """Power saving lowers them. With one rank, other GPUs than the first are idle."""
    for number in range(1, 8):
        idle = {"utilization__gpu": "0", "pcie__link__gen__current": "1", "clocks__current__sm": "345"}
        gpu(number, **idle)(recorded)
    for check in ("GPU PCIe link", "GPU clocks"):
        own = found_by(check, recorded, config)
        assert own.verdict is PASSED
        assert own.found.endswith("; GPUs [1, 2, 3, 4, 5, 6, 7] were at rest: not checked")
    gpu(0, utilization__gpu="0")(recorded)
    assert found_by("GPU PCIe link", recorded, config).verdict is SKIPPED


def test_a_driver_that_knows_the_reasons_for_reduced_clocks_by_their_old_name(
    recorded: RecordedNode, config: Config
) -> None:
    for one in recorded.gpus:
        one["clocks_throttle_reasons.active"] = one.pop("clocks_event_reasons.active")
    answer = recorded.system.run

    def run(words: list[str]) -> str:
        if "clocks_event_reasons.active" in " ".join(words):
            raise BrokenError(
                f'{" ".join(words)}: Field "clocks_event_reasons.active" is not a valid field to query.'
            )
        return answer(words)

    recorded.answer = run  # type: ignore[assignment]
    assert found_by("GPU throttling", recorded, config).verdict is PASSED


@pytest.mark.parametrize("old", ["State                             : Completed", "Fabric\n"])
def test_gpus_in_no_fabric(recorded: RecordedNode, config: Config, old: str) -> None:
    """PCIe cards say so, or their driver does not print the section."""
    text = str(recorded.outputs[Q])
    recorded.outputs[Q] = text.replace(old, old.replace("Completed", "N/A").replace("Fabric", "Other"))
    assert found_by("NVLink fabric", recorded, config).verdict is SKIPPED


def test_a_virtual_machine_has_acs_and_iommu_of_its_host(recorded: RecordedNode, config: Config) -> None:
    write("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu vme hypervisor lahf_lm\n")(recorded)
    assert {found_by(check, recorded, config).verdict for check in ("PCIe ACS", "IOMMU")} == {SKIPPED}


def test_code_words_by_corrected_symbols_are_no_errors(recorded: RecordedNode) -> None:
    """Newer GPUs count those without any, too, under the name of errors."""
    says(ERRORS, nvlink_report(("Link recovery failed events: 0", "FEC Errors - 0: 4711"), 8))(recorded)
    assert set(read_link_errors(recorded.system)["GPU 0 link 0"]) == {"Link recovery failed events"}
