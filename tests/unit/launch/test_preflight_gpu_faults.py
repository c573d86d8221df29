"""Each fault of a GPU, its memory, settings or driver is named by one check."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from k25_train.compose.resolve import compose
from k25_train.config.cluster import GpuConfig
from k25_train.config.schema import Config
from launch.preflight.gpu_product import judge_product
from launch.preflight.gpu_state import read_states
from launch.preflight.gpus import read_gpus
from launch.preflight.system import BrokenError
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
from tests.helpers.recorded_node import NVRM, RecordedNode, examine

Q = "nvidia-smi -q"
POWER, ACTION = "Current Power Limit", "GPU Recovery Action"
NO_CLOCK = "Graphics                          : Requested functionality has been deprecated"
REPAIR = (
    "        Channel Repair Pending            : No\n",
    "        TPC Repair Pending                : No\n",
)


def build(**changes: object) -> Change:
    return lambda node: setattr(node, "packages", replace(node.packages, **changes))  # type: ignore[arg-type]


def of_all(change: Callable[[int], Change]) -> Change:
    return both(*(change(number) for number in range(8)))


SECOND_SOCKET = "sys/bus/pci/devices/0000:1e:00.0/numa_node"
FAULTS = [
    # CPUs near them.
    Fault(
        "a job on one socket", write("proc/self/status", "Cpus_allowed_list:\t0-47\n"),
        "CPUs near GPUs", SO_SO, ("4 of 8 GPUs", "no CPU of NUMA node 1", "48-95"),
    ),
    Fault(
        "a node that the firmware does not tell", write(SECOND_SOCKET, "-1\n"), "CPUs near GPUs", SO_SO,
        ("1 of 8 GPUs", "GPU 6", "does not say"),
    ),
    # Product, memory, power, settings.
    Fault(
        "H20s", of_all(lambda i: gpu(i, name="NVIDIA H20")), "GPU product", BAD,
        ("NVIDIA H20", "cluster.gpu.model is H800"),
    ),
    Fault(
        "small memory", gpu(2, memory__total="40960"), "GPU memory size", BAD,
        ("GPU 2: 42.9 GB", "rates.memory_gb is 84.9"),
    ),
    Fault(
        "large memory", of_all(lambda i: gpu(i, memory__total="143771")), "GPU memory size", SO_SO,
        ("150.8 GB each",),
    ),
    Fault(
        "power cap", in_log(5, POWER, "500.00 W"), "GPU power cap", SO_SO,
        ("GPU 5: 500 of 700 W", "cluster.gpu.power_limit_w"),
    ),
    Fault("no power cap", in_log(5, POWER, "N/A"), "GPU power cap", SKIPPED, ("does not report",)),
    Fault(
        "persistence off", in_log(0, "Persistence Mode", "Disabled"), "GPU settings", SO_SO,
        ("GPUs [0]", "nvidia-persistenced"),
    ),
    Fault(
        "prohibited", in_log(7, "Compute Mode", "Prohibited"), "GPU settings", BAD,
        ("GPUs [7] is Prohibited",),
    ),
    Fault(
        "application clocks",
        both(
            in_gpu(Q, 1, NO_CLOCK, "Graphics : 1200 MHz"),
            in_gpu(Q, 1, NO_CLOCK, "Graphics : 1980 MHz"),
        ),
        "GPU settings", SO_SO, ("GPU 1: 1200 of 1980 MHz", "--reset-applications-clocks"),
    ),
    Fault(
        "slow slot", in_gpu(Q, 3, "Max                       : 5", "Max : 4"), "GPU slot", SO_SO,
        ("GPU 3: generation 4, the GPU has 5",),
    ),
    # Memory.
    Fault(
        "100,000 corrected errors", in_log(4, "DRAM Correctable", "100000"), "GPU corrected errors", BAD,
        ("GPU 4: 100,000 in 30 days", "1,000 fail"),
    ),
    Fault(
        "corrected errors", in_log(4, "SRAM Correctable", "5000"), "GPU corrected errors", SO_SO,
        ("GPU 4: 5,000 in 30 days",),
    ),
    Fault(
        "corrected errors now", lambda _: None, "GPU corrected errors", BAD,
        ("GPU 6: +12 while measuring",), meanwhile=in_log(6, "DRAM Correctable", "12"),
    ),
    Fault(
        "no ECC counters", both(in_log(4, "DRAM Correctable", "N/A"), in_log(4, "SRAM Correctable", "N/A")),
        "GPU corrected errors", SKIPPED, ("GPUs [4]",),
    ),
    Fault(
        "SRAM worn", in_log(1, "SRAM Threshold Exceeded", "Yes"), "GPU spare memory", BAD,
        ("GPUs [1]", "replace"),
    ),
    Fault(
        "no spare rows", in_gpu(Q, 1, "None                          : 0 bank(s)", "None : 1 bank(s)"),
        "GPU spare memory", SO_SO, ("GPUs [1] have banks with few or no", "replace"),
    ),
    Fault(
        "few spare rows", in_log(1, "Low", "2 bank(s)"), "GPU spare memory", SO_SO,
        ("GPUs [1] have banks with few",),
    ),
    Fault(
        "repair waits", in_log(1, "Channel Repair Pending", "Yes"), "GPU spare memory", BAD,
        ("GPUs [1] wait", "--gpu-reset"),
    ),
    Fault(
        "remap not reported", gpu(1, remapped_rows__pending="[N/A]"), "GPU memory errors", SKIPPED,
        ("GPUs [1] do not report remapped",),
    ),
    Fault(
        "leftover process", in_log(2, "Used", "61234 MiB"), "GPU memory in use", BAD,
        ("GPU 2: 61,234 MiB", "compute-apps"),
    ),
    Fault("small leftover", in_log(2, "Used", "2048 MiB"), "GPU memory in use", SO_SO, ("2,048 MiB",)),
    Fault("reset wanted", in_log(6, ACTION, "Reset"), "GPU recovery", BAD, ("GPU 6: Reset",)),
    Fault(
        "drain wanted", in_log(6, "GPU Recovery Action", "Drain and Reset"), "GPU recovery", BAD,
        ("GPU 6: Drain and Reset",),
    ),
    Fault(
        "MIG not reported", gpu(2, mig__mode__current="[N/A]"), "GPU modes", SKIPPED,
        ("GPUs [2] do not report MIG",),
    ),
    # Driver.
    Fault(
        "two drivers", gpu(3, driver_version="570.124.06"), "GPU driver", BAD,
        ("570.124.06, 580.95.05", "one version"),
    ),
    Fault(
        "module of another version",
        write("proc/driver/nvidia/version", NVRM.replace("580.95.05", "580.65.06")),
        "GPU driver", BAD, ("kernel module 580.65.06", "reboot"),
    ),
    Fault(
        "old driver", says(Q, "CUDA Version : 12.8\n"), "driver for CUDA", BAD,
        ("CUDA 13.0, the driver has 12.8", "driver 580.65.06"),
    ),
    Fault("torch for CPUs", build(cuda=None), "driver for CUDA", BAD, ("torch is built for CPUs only",)),
    Fault(
        "two NCCLs", build(nccl={"nvidia-nccl-cu12": "2.27.3", "nvidia-nccl-cu13": "2.29.7"}),
        "NCCL for CUDA", BAD, ("pip uninstall nvidia-nccl-cu12",),
    ),
    Fault("NCCL inside torch", build(nccl={}), "NCCL for CUDA", SKIPPED, ("no package of its own",)),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_named(fault: Fault, recorded: RecordedNode, config: Config) -> None:
    assert_named(fault, recorded, config)


def test_the_log_of_an_older_driver(recorded: RecordedNode) -> None:
    """Driver 525: another name of the power section, reset status instead of the action, no fabric health."""
    text = str(recorded.outputs[Q])
    for old, new in (
        ("    GPU Power Readings\n", "    Power Readings\n"),
        ("Current Power Limit ", "Power Limit "),
        ("    GPU Recovery Action                   : None\n", ""),
        (
            "Reset Required                    : Requested functionality has been deprecated",
            "Reset Required : No",
        ),
        (
            f"{REPAIR[0]}{REPAIR[1]}",
            "",
        ),
    ):
        assert old in text
        text = text.replace(old, new)
    recorded.outputs[Q] = text
    first, *_ = read_states(recorded.system)
    assert (first.power_limit_w, first.recovery, first.repair_pending) == (700.0, "None", None)
    recorded.outputs[Q] = text.replace("Reset Required : No", "Reset Required : Yes")
    assert read_states(recorded.system)[0].recovery == "Reset"


def test_forward_compatibility_and_a_driver_that_nvidia_smi_does_not_tell(
    recorded: RecordedNode, config: Config
) -> None:
    """The CUDA version of the library that is loaded counts; without it the driver's own."""
    for one in recorded.gpus:
        one["driver_version"] = "570.124.06"
    write("proc/driver/nvidia/version", "")(recorded)
    assert found_by("driver for CUDA", recorded, config).verdict is PASSED
    recorded.outputs[Q] = str(recorded.outputs[Q]).replace(": 13.0", ": Not Found")
    own = found_by("driver for CUDA", recorded, config)
    assert own.verdict is BAD and "CUDA 13 needs driver 580.65.06" in own.rule


def test_gpus_that_the_cluster_file_does_not_name_are_not_compared(recorded: RecordedNode) -> None:
    config = compose(["experiment=k25_pretrain_4k", "cluster.gpu=null"])
    own = found_by("GPU product", recorded, config)
    assert own.verdict is SKIPPED and "cluster.gpu is null" in own.found
    # The power cap is compared with the GPU's default.
    in_log(5, POWER, "500.00 W")(recorded)
    assert "the GPU's default" in found_by("GPU power cap", recorded, config).rule


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("H100", "NVIDIA H100 80GB HBM3"), ("H200", "NVIDIA H200"), ("A100", "NVIDIA A100-SXM4-80GB"),
        ("H20", "NVIDIA H20-3e"), ("H100 NVL", "NVIDIA H100 NVL"), ("A800 SXM4", "NVIDIA A800-SXM4-80GB"),
    ],
)  # fmt: skip
def test_products_as_their_drivers_name_them(recorded: RecordedNode, model: str, name: str) -> None:
    cluster = compose(["experiment=k25_pretrain_4k"]).cluster
    assert cluster.gpu is not None
    cluster = replace(cluster, gpu=replace(cluster.gpu, model=model))
    recorded.gpus = [gpu | {"name": name} for gpu in recorded.gpus]
    assert judge_product(read_gpus(recorded.system), cluster)[0].verdict is PASSED
    other = replace(cluster, gpu=GpuConfig(model="H800", power_limit_w=None))
    assert judge_product(read_gpus(recorded.system), other)[0].verdict is BAD


def test_no_word_of_a_gpu_that_is_not_there(recorded: RecordedNode, config: Config) -> None:
    """A node whose driver lost all GPUs: their number fails, and nothing passes that was not read."""
    recorded.gpus = []
    says(Q, BrokenError("nvidia-smi -q: status 6: No devices were found"))(recorded)
    says("nvidia-smi nvlink --status", "")(recorded)
    says("nvidia-smi nvlink --errorcounters", "")(recorded)
    says("nvidia-smi topo", BrokenError("nvidia-smi topo -m: status 6: No devices were found"))(recorded)
    found = {one.check: one.verdict for one in examine(recorded, config)}
    of_gpus = {check: verdict for check, verdict in found.items() if "GPU " in check or "NVLink" in check}
    assert of_gpus.pop("GPU count") is BAD
    assert [check for check, verdict in of_gpus.items() if verdict is not SKIPPED] == []
