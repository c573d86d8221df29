"""What utilisation (MFU) is a share of."""

from k25_train.config.cluster import Device
from k25_train.config.schema import Config


def peak_of(config: Config) -> float | None:
    """Operations a second that all devices of a run do at most, in bfloat16, as `cluster.rates` has it; None
    where they are CPUs."""
    if config.cluster.device is Device.cpu:
        return None
    return 1e12 * config.cluster.rates.bf16_tflops * config.world_size
