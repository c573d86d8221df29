"""Bytes that a layer saves of a token from forward to backward, under our policies and by megatron-core.

    python -m tests.bench.activation_bytes

First Kimi K2.5's layers with CUDA's kernels: everything kept, each saving of `activation=k2` by itself, and
all of them; for comparison, megatron-core's selective recomputation (`recompute_modules` layernorm,
mla_up_proj and moe_act) and full recomputation. These are the plan's figures, which
tests/unit/plan/test_activations.py holds against autograd. moe_act needs Transformer Engine, and so a GPU:
selective recomputation is our list without what these modules make again, and without the copies of
attention's output and of the shared expert's SiLU, which Transformer Engine's kernels do not make.

Then the shrunk model in float32 on the CPU, where hooks count what is left: kept, `activation=k2` with
nothing offloaded, and megatron-core's full recomputation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.table import Table

from k25_train.compose.resolve import compose
from k25_train.plan.memory.activations import WaitingBytes, pack
from k25_train.plan.memory.kernels import configured_kernels
from k25_train.plan.memory.saved_tensor import SavedTensor
from k25_train.plan.memory.saved_tensors import SavedTensors
from k25_train.plan.pass_sizes import balanced_sizes
from parallel.activations.policy import Policy
from tests.helpers.ranks import RankContext, run_ranks

SEQUENCE = 4096
MADE_AGAIN = {
    "norms made again": "norm.output mla.up_input",
    "SwiGLU made again": "moe.down_input shared_expert.down_input dense.down_input",
    "MLA up-projections made again": "mla.up_proj",
    "joined attention output made again": "attention.joined",
}
IN_FP8 = {
    "inputs of MoE up-projections in FP8": "moe.up_input",
    "inputs of SwiGLU in FP8": "moe.swiglu_input shared_expert.swiglu_input dense.swiglu_input",
}
SELECTIVE = "norm.output mla.up_proj moe.down_input"
"""What megatron-core's selective recomputation makes again, by our names."""


def with_policy(policies: Mapping[str, Policy], policy: Policy, names: str) -> dict[str, Policy]:
    """The policies, but for these names."""
    return {**policies, **dict.fromkeys(names.split(), policy)}


def plans() -> dict[str, dict[str, Policy]]:
    """What is compared, by policies."""
    keep, k2 = (
        compose(["experiment=smoke", f"activation={choice}"]).activation.policies()
        for choice in ("keep", "k2")
    )
    found = {"keep": keep}
    found |= {title: with_policy(keep, Policy.recompute, names) for title, names in MADE_AGAIN.items()}
    found |= {title: with_policy(keep, Policy.fp8, names) for title, names in IN_FP8.items()}
    rest = " ".join(name for name, policy in k2.items() if policy is Policy.offload)
    found["all else offloaded"] = with_policy(keep, Policy.offload, rest)
    found["k2"] = k2
    found["k2, MoE up-projections' inputs offloaded"] = k2 | {"moe.up_input": Policy.fp8_offload}
    return found


def layers(policies: Mapping[str, Policy]) -> dict[str, list[SavedTensor]]:
    """What a dense and a MoE layer of the real model save."""
    config = compose(["experiment=k25_pretrain_4k", f"train.seq_len={SEQUENCE}"])
    kernels = configured_kernels(config)
    lists = SavedTensors(config.model, config.train.dtype, kernels, policies, balanced_sizes(config))
    return {"dense": lists.layer(is_moe=False), "MoE": lists.layer(is_moe=True)}


def waiting(policies: Mapping[str, Policy], tensors: Iterable[SavedTensor]) -> WaitingBytes:
    return WaitingBytes.of(pack(each, policies[each.name], offloads=True) for each in tensors)


def by_megatron(keep: Mapping[str, Policy]) -> dict[str, dict[str, int]]:
    """Bytes of a layer under megatron-core's own recomputation."""
    policies = with_policy(keep, Policy.recompute, SELECTIVE)
    selective = {}
    for kind, tensors in layers(policies).items():
        twice = [each for each in tensors if each.name in ("attention.joined", "shared_expert.down_input")]
        copies = {each.name: each.memory_bytes for each in twice}
        selective[kind] = waiting(policies, tensors).device - sum(copies.values())
    one_input = {kind: tensors[0].num_bytes for kind, tensors in layers(keep).items()}
    return {"megatron-core, selective": selective, "megatron-core, full": one_input}


def real_model(console: Console) -> None:
    """The table of the real model's layers."""
    table = Table(title=f"Bytes a token, Kimi K2.5, one document of {SEQUENCE:,} tokens, even routing")
    table.add_column("saving", no_wrap=True)
    for kind in ("dense", "MoE"):
        for name in ("device", "host", "device to keep"):
            table.add_column(f"{kind}\n{name}", justify="right")
    choices = plans()
    kept = {kind: waiting(choices["keep"], each).device for kind, each in layers(choices["keep"]).items()}
    for title, policies in choices.items():
        cells = []
        for kind, tensors in layers(policies).items():
            held = waiting(policies, tensors)
            cells += [f"{held.device / SEQUENCE:,.0f}", f"{held.host / SEQUENCE:,.0f}"]
            cells.append(f"{held.device / kept[kind]:.3f}")
        table.add_row(title, *cells)
    table.add_section()
    for title, num_bytes in by_megatron(choices["keep"]).items():
        cells = []
        for kind, number in num_bytes.items():
            cells += [f"{number / SEQUENCE:,.0f}", "0", f"{number / kept[kind]:.3f}"]
        table.add_row(title, *cells)
    console.print(table)


def bytes_that_autograd_saves(chunk: Any, inputs: Mapping[str, Any], weights: frozenset[int]) -> int:
    """What torch keeps of a forward pass for its backward pass, each storage once, weights left out."""
    import torch

    from parallel.activations.storage import storage_id

    saved: dict[int, int] = {}

    def note(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        saved[storage_id(tensor)] = storage.nbytes()
        held.append(storage)
        return tensor

    # Storages are held until the end, so that no address is used twice.
    held: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = chunk(**inputs)
    losses.sum().backward()
    return sum(num_bytes for key, num_bytes in saved.items() if key not in weights)


def measured(context: RankContext) -> dict[str, tuple[int, int]]:
    """What -> bytes that the shrunk model's pass leaves, by the plan and by hooks."""
    from k25_train.model.backbone import build_language_model
    from k25_train.model.megatron_config import backbone_config
    from k25_train.model.multimodal import MultimodalModel
    from k25_train.model.weights import initialize
    from parallel.activations.saving_pass import SavingPass
    from parallel.activations.storage import weights_of
    from parallel.pipeline.schedule import PassKey
    from tests.helpers.hf_reference import tiny_model_config
    from tests.helpers.model_chunks import SERIAL, WHOLE_MODEL, start, train_config
    from tests.helpers.tiny_model import documents, random_tokens

    model, train = tiny_model_config(), train_config()
    topology = start(context, SERIAL, model.num_layers)
    choices = {name: compose(["experiment=smoke", f"activation={name}"]) for name in ("keep", "k2")}
    policies = {name: config.activation.policies() for name, config in choices.items()}
    sizes = replace(
        balanced_sizes(choices["keep"]), documents=(64,), num_sequences=1, expert_rows=64 * 3, local_experts=8
    )

    def count(policies: Mapping[str, Policy] | None, **changes: Any) -> int:
        backbone = backbone_config(model, train, SERIAL, topology.layout)
        for name, value in changes.items():
            setattr(backbone, name, value)
        language_model = build_language_model(
            model, backbone, topology.groups, range(model.num_layers),
            pre_process=True, post_process=True, vp_stage=None,
        )  # fmt: skip
        whole, tokens = MultimodalModel(backbone, language_model), random_tokens(64)
        initialize(whole, WHOLE_MODEL, seed=5, std=0.1)
        weights = weights_of([whole])
        inputs = {"tokens": tokens, "documents": documents((64,)), "labels": tokens.roll(-1)}
        if policies is not None:
            held: list[int] = []
            saving = SavingPass(
                policies, PassKey(0, 0), weights, None, lambda each: held.append(each.device_bytes)
            )
            with saving.active():
                whole(**inputs)
            return sum(held)

        return bytes_that_autograd_saves(whole, inputs, weights)

    def plan(name: str) -> int:
        config = choices[name]
        kernels = configured_kernels(config)
        lists = SavedTensors(model, train.dtype, kernels, policies[name], sizes)
        tensors = [*lists.first_chunk(), *lists.every_chunk(range(model.num_layers)), *lists.last_chunk()]
        for layer in range(model.num_layers):
            tensors += lists.layer(is_moe=model.is_moe(layer))
        stored = (pack(each, policies[name][each.name], offloads=False) for each in tensors)
        return WaitingBytes.of(stored).device

    lists = SavedTensors(model, train.dtype, configured_kernels(choices["keep"]), policies["keep"], sizes)
    ends = [*lists.first_chunk(), *lists.last_chunk()]
    inputs = model.num_layers * 64 * model.hidden_size * 4
    full = inputs + sum(each.memory_bytes for each in ends)
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {
        "keep": (plan("keep"), count(None)),
        "k2, nothing offloaded": (plan("k2"), count(policies["k2"])),
        "megatron-core, full": (full, count(None, **recompute)),
    }


def shrunk_model(console: Console) -> None:
    """The table of what was measured."""
    table = Table(title="Bytes that the shrunk model's pass of 64 tokens leaves, float32, CPU")
    for name in ("saving", "plan", "hooks", "to keep"):
        table.add_column(name, justify="left" if name == "saving" else "right", no_wrap=True)
    found = run_ranks(measured, 1)[0]
    for title, (plan, hooks) in found.items():
        table.add_row(title, f"{plan:,}", f"{hooks:,}", f"{hooks / found['keep'][1]:.3f}")
    console.print(table)


def main() -> None:
    """Print both tables."""
    console = Console(width=110)
    real_model(console)
    shrunk_model(console)


if __name__ == "__main__":
    main()
