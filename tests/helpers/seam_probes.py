"""Small calls into torch.cuda and megatron-core whose outcome differs with and without the seam's patches.

`python -m tests.helpers.seam_probes` runs them in a fresh process without a GPU, patch by patch, and
prints the outcomes as JSON: what stock torch and stock megatron-core do, and what they do with each patch.
"""

import importlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from parallel.megatron.patches import cuda_shim, upstream_fixes


def outcome(probe: Callable[..., Any], *arguments: Any) -> Any:
    """What the probe returns, or the name and the text of what it raises."""
    try:
        return probe(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# torch.cuda ------------------------------------------------------------------------------------------------


def stream_and_event() -> str:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    stream.record_event().synchronize()
    event = torch.cuda.Event()
    event.record(stream)
    event.wait(torch.cuda.current_stream())
    stream.wait_event(event)
    return "ordered"


def event_alone() -> str:
    event = torch.cuda.Event()
    event.record()
    return "recorded"


def manual_seed() -> str:
    torch.cuda.manual_seed(5)
    first = torch.rand(3)
    torch.cuda.manual_seed(5)
    return "repeats" if torch.equal(first, torch.rand(3)) else "does nothing"


def rng_state() -> str:
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    return "repeats" if torch.equal(first, torch.rand(3)) else "does nothing"


def factory_inside_backward() -> str:
    class MakesTensorInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad + torch.ones(1, device="cuda")

    x = torch.zeros(1, requires_grad=True)
    MakesTensorInBackward.apply(x).sum().backward()
    assert x.grad is not None
    return f"gradient {x.grad.item():g}"


CUDA_CALLS: dict[str, tuple[Callable[[], Any], Any]] = {
    "torch.cuda.current_device": (lambda: str(torch.cuda.current_device()), "cpu"),
    "torch.cuda.current_stream": (lambda: type(torch.cuda.current_stream()).__name__, "CpuStream"),
    "torch.cuda.Stream": (stream_and_event, "ordered"),
    "torch.cuda.Event": (event_alone, "recorded"),
    "torch.cuda.synchronize": (lambda: torch.cuda.synchronize(), None),
    "torch.cuda.manual_seed": (manual_seed, "repeats"),
    "torch.cuda.get_rng_state": (rng_state, "repeats"),
    "torch.empty": (lambda: str(torch.empty(2, device="cuda").device), "cpu"),
    "torch.empty_like": (lambda: str(torch.empty_like(torch.zeros(2), device="cuda:1").device), "cpu"),
    "torch.ones": (lambda: torch.ones(2, device=torch.device("cuda")).tolist(), [1.0, 1.0]),
    "torch.tensor": (lambda: torch.tensor([1.5], dtype=torch.float, device="cuda").tolist(), [1.5]),
    "torch.zeros": (lambda: torch.zeros([], dtype=torch.int, device="cuda").item(), 0),
    "torch.zeros in backward": (factory_inside_backward, "gradient 2"),
    "Tensor.cuda": (lambda: torch.ones(2).cuda().tolist(), [1.0, 1.0]),
    "Tensor.record_stream": (lambda: torch.ones(2).record_stream(torch.cuda.current_stream()), None),
}
"""Name -> (a call that asks for CUDA, what it gives once torch.cuda is answered with the CPU)."""


def devices_under_meta() -> dict[str, str]:
    """Where each wrapped factory puts its tensor inside `with torch.device("meta")`."""
    arguments: dict[str, Any] = {"empty_like": torch.zeros(2), "tensor": [1.0]}
    with torch.device("meta"):
        return {
            name: str(getattr(torch, name)(arguments.get(name, 2)).device) for name in cuda_shim.FACTORIES
        }


def import_dynamo() -> str:
    """Build the table of torch's functions that torch._dynamo refuses if one is listed under two names."""
    from torch._dynamo import trace_rules

    trace_rules.get_torch_obj_rule_map.cache_clear()
    trace_rules.get_torch_obj_rule_map()
    return "imported"


# megatron-core ---------------------------------------------------------------------------------------------


def fused_function() -> str:
    """Whether megatron-core's decorator of fused functions compiles."""
    from megatron.core import jit

    fused = importlib.reload(jit).jit_fuser(lambda x: x + 1)
    return "compiled" if hasattr(fused, "_torchdynamo_orig_callable") else "as written"


def split_sizes() -> str:
    """What the token dispatcher passes to an all-to-all as the sizes of its parts."""
    from megatron.core.transformer.moe import token_dispatcher

    return type(token_dispatcher.maybe_move_tensor_to_cpu(torch.tensor([2, 1]), as_numpy=True)).__name__


def recompute() -> str:
    """The gradient of a recomputed dropout against that of the same dropout kept."""
    from megatron.core.tensor_parallel import random

    def gradient(run: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = torch.ones(64, requires_grad=True)
        torch.manual_seed(3)
        y = run(x).sum()
        torch.manual_seed(4)
        y.backward()
        assert x.grad is not None
        return x.grad

    def drop(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(x * 2, 0.5)

    recomputed = gradient(lambda x: random.checkpoint(drop, False, x))
    return "equal" if torch.equal(recomputed, gradient(drop)) else "different"


def build_optimizer() -> str:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.transformer_config import TransformerConfig

    from parallel.megatron.replicas import replicate

    config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
    model = MegatronModule(config)
    model.register_parameter("weight", torch.nn.Parameter(torch.ones(4, 4)))
    adam = OptimizerConfig(optimizer="adam", lr=0.1, use_distributed_optimizer=True)
    get_megatron_optimizer(adam, replicate([model], config, topology()), use_gloo_process_groups=False)
    return "built"


def clip_gradient() -> float:
    from megatron.core.optimizer import optimizer

    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    optimizer.clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    return round(parameter.grad.norm().item(), 4)


def topology() -> Any:
    """The groups of a process that is alone."""
    import torch.distributed as dist

    from parallel.topology import build_topology, start_process_group, stop_process_group
    from tests.helpers.parallel_sizes import even_layout, parallel_sizes

    if dist.is_initialized():
        stop_process_group()
    start_process_group(torch.device("cpu"), 30.0, dist.HashStore())
    return build_topology(parallel_sizes(), even_layout(1), torch.device("cpu"))


FIXES: dict[str, Callable[[], Any]] = {
    "switch_off_compilation": fused_function,
    "return_split_sizes_as_numpy": split_sizes,
    "copy_rng_state_from_cpu": recompute,
    "accept_cpu_parameters_in_optimizers": build_optimizer,
}
"""Function of `upstream_fixes` -> what it repairs, in the order of showing."""


def run_probe(name: str) -> Any:
    """Outcome of what a fix repairs, in the present state of this process."""
    return outcome(FIXES[name])


def main() -> None:
    """Print the outcomes as one JSON object."""
    found: dict[str, Any] = {"stock torch": {name: outcome(call) for name, (call, _) in CUDA_CALLS.items()}}
    found["stock meta"] = devices_under_meta()
    # The line above made torch look its functions up; install() has to cope without that.
    _device_constructors.cache_clear()
    cuda_shim.install()
    found["answered"] = {name: outcome(call) for name, (call, _) in CUDA_CALLS.items()}
    found["meta"] = devices_under_meta()
    found["dynamo"] = outcome(import_dynamo)
    found["stock clip"] = outcome(clip_gradient)
    found["stock"], found["fixed"] = {}, {}
    for name in FIXES:
        found["stock"][name] = run_probe(name)
        getattr(upstream_fixes, name)()
        found["fixed"][name] = run_probe(name)
    found["fixed clip"] = outcome(clip_gradient)
    # Last, for they leave this process unusable.
    _device_constructors.cache_clear()
    found["meta without care"] = devices_under_meta()
    torch.cuda.set_device = torch.cuda.synchronize
    found["dynamo without care"] = outcome(import_dynamo)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
