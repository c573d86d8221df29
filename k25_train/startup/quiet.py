"""Silences notices of libraries that a user of this project can do nothing about.

Each is known and harmless here; everything else still shows.
"""

import logging
import os
import warnings

_KNOWN_WARNINGS = (
    # torch renamed collectives that megatron-core 0.19 calls by their old names.
    ("`torch.distributed.*` is deprecated", FutureWarning),
    # megatron-core looks at .grad of parameter shards, which are views.
    ("The .grad attribute of a Tensor that is not a leaf", UserWarning),
    # megatron-core 0.19 falls back to torch's norms and optimizers where Apex is absent, as intended here.
    (".*[Aa]pex.*", UserWarning),
    (".*Transformer Engine.*", UserWarning),
    # Features of megatron-core that its imports touch and nothing here uses.
    ("full scope is deprecated", UserWarning),
    ("MimoModelConfig is experimental", UserWarning),
    # The default group is bound to its GPU only while it starts (parallel/topology.py); the device is right.
    (r"barrier\(\): using the device under current context", UserWarning),
    # A single process reads a checkpoint that several wrote.
    ("torch.distributed is disabled, unavailable or uninitialized", UserWarning),
    ("The argument order of load has been changed", UserWarning),
)


_KNOWN_NOTICES = {
    # Advice to move to a model class that does not take our modules.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # The layout of gradient buffers is computed where it is needed, as intended here.
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
}


class _Without(logging.Filter):
    """Drops records that contain a text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


def quiet_libraries() -> None:
    """Install the filters; call before torch and megatron-core are first used."""
    for pattern, category in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=pattern, category=category)
    for logger, text in _KNOWN_NOTICES.items():
        logging.getLogger(logger).addFilter(_Without(text))
    # torch's extension builder reports a missing CUDA runtime as soon as it is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
