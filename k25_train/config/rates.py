"""What plans assume of a device: arithmetic, memory, links. Facts of devices are in `conf/device/` only."""

from dataclasses import dataclass

from k25_train.config.basics import not_negative
from k25_train.config.forms import NAME
from parallel.config import Problem, not_positive

_EFFICIENCIES = (
    "gemm_efficiency",
    "fp8_efficiency",
    "attention_efficiency",
    "attention_backward_efficiency",
    "memory_efficiency",
)


@dataclass(slots=True, kw_only=True)
class CalibrationConfig:
    """The few constants that `k25-plan calibrate` fits to a run; neutral values change nothing."""

    kernels: float
    """Factor on the duration of every kernel: 1.0 is what data sheet and efficiencies say."""
    exchange: float
    """Factor on the duration of every message between ranks. 0 on CPUs that were not calibrated: processes of
    one machine send through memory that their arithmetic uses as well."""
    pass_ms: float
    """Milliseconds that each forward or backward pass of a chunk takes in addition, whatever its size."""
    step_ms: float
    """Milliseconds that each step takes in addition."""

    @property
    def is_neutral(self) -> bool:
        """Whether nothing was fitted: values are those of the device's file."""
        return self.exchange in (0, 1) and (self.kernels, self.pass_ms, self.step_ms) == (1, 0, 0)

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        return not_positive(self, ("kernels",)) + not_negative(self, ("exchange", "pass_ms", "step_ms"))


@dataclass(slots=True, kw_only=True)
class RatesConfig:
    """Rates of one device and its links. Where a rate is null, what it limits takes no time."""

    device: str
    """Product in tables and reports."""
    bf16_tflops: float
    """Dense bfloat16 products by the data sheet, in units of 1e12 operations a second."""
    fp8_tflops: float | None
    """The same of FP8; null where there is none. Training does not compute in it; plans of others do."""
    float32_tflops: float
    """The same of float32 without TF32."""
    num_sms: int
    """Streaming multiprocessors, over which the tiles of a product are spread; 1 counts no tiles."""
    memory_gb: float | None
    """Memory that torch finds, in units of 1e9 bytes; null where the device is the CPU. On an H100 of 80 GB
    that is 79.11 GiB, which is 84.9 (vllm issue 27508)."""
    memory_gb_per_s: float | None
    """Bytes that the device's memory reads and writes in a second, in units of 1e9, by the data sheet."""
    gemm_efficiency: float
    """Share of the data sheet's rate that a large product reaches."""
    fp8_efficiency: float
    """The same of products in FP8."""
    attention_efficiency: float
    """The same of attention's forward pass over long documents."""
    attention_backward_efficiency: float
    """The same of its backward pass, in which scores are computed again: a quarter or so more FLOPs."""
    attention_half_keys: float
    """Keys per query, on average, with which attention reaches half of these shares: tiles of short documents
    are less full."""
    memory_efficiency: float
    """Share of `memory_gb_per_s` that kernels reach which only move data."""
    nvlink_gb_per_s: float | None
    """Bytes that a rank sends to others of its NVLink domain in a second, in units of 1e9."""
    nvlink_ranks: int
    """Devices that NVLink connects: those of a node, or of a rack."""
    pcie_gb_per_s: float | None
    """Bytes that cross the device's PCIe link in a second and direction, in units of 1e9, network traffic and
    host copies together; null where these do not share a link."""
    launch_us: float
    """Microseconds in which the host launches a kernel."""
    gap_us: float
    """Microseconds that a device has nothing to do between two kernels of a stream."""
    calibration: CalibrationConfig
    """What a run of this device corrects."""

    def problems(self) -> list[Problem]:
        """Every rule of this section that is broken."""
        found = NAME.misfits([("device", self.device)])
        found += not_positive(self, ("bf16_tflops", "float32_tflops", "num_sms", "nvlink_ranks"))
        optional = ("memory_gb", "fp8_tflops", "memory_gb_per_s", "nvlink_gb_per_s", "pcie_gb_per_s")
        found += not_positive(self, [name for name in optional if getattr(self, name) is not None])
        found += not_negative(self, ("launch_us", "gap_us", "attention_half_keys"))
        for name in _EFFICIENCIES:
            if not 0 < getattr(self, name) <= 1:
                rule = "must be above 0, and 1 at most: a share of the data sheet's rate"
                found.append(Problem(name, getattr(self, name), rule, "e.g. 0.75"))
        return found + [problem.under("calibration") for problem in self.calibration.problems()]
