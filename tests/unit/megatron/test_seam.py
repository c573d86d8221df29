"""The seam to megatron-core: each patch cures what it says, and stock megatron-core still needs it.

When an upgrade repairs something upstream, the test that shows the fault fails, and the patch can go.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.megatron import platform
from parallel.megatron.patches import upstream_fixes
from parallel.megatron.patches.cuda_shim import FACTORIES, names_cuda
from parallel.topology import backend_of
from tests.helpers.project_sources import REPO
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, losses_of, overrides, start_run
from tests.helpers.seam_probes import CUDA_CALLS, FIXES, outcome, run_probe

CURED: dict[str, Any] = {
    "switch_off_compilation": "as written",
    "return_split_sizes_as_numpy": "ndarray",
    "copy_rng_state_from_cpu": "equal",
    "accept_cpu_parameters_in_optimizers": "built",
}
"""What a probe gives once its fix and those before it are in."""

FAULTS: dict[str, Any] = {
    "switch_off_compilation": "compiled",
    "return_split_sizes_as_numpy": "Tensor",
    "copy_rng_state_from_cpu": "RuntimeError",
    "accept_cpu_parameters_in_optimizers": "TypeError: Wrapped parameters must be",
}
"""What a probe gives before."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """Outcomes in a process that sees no GPU, patch by patch."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.helpers.seam_probes",
        ],
        cwd=REPO,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def all_probes(_context: RankContext) -> dict[str, Any]:
    """Every probe in a process that `use_platform` has prepared."""
    calls = {name: outcome(call) for name, (call, _) in CUDA_CALLS.items()}
    return calls | {name: run_probe(name) for name in FIXES}


@pytest.fixture(scope="module")
def installed() -> dict[str, Any]:
    return run_ranks(all_probes, 1)[0]


# The platform ----------------------------------------------------------------------------------------------


def test_another_version_of_megatron_core_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.20.0")
    with pytest.raises(platform.MegatronVersionError, match=r"megatron-core is 0\.20\.0, .*==0\.19\.2"):
        platform.use_platform("cpu")


def test_cuda_without_a_gpu_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch sees no CUDA device: use a cluster with device=cpu"):
        platform.use_platform("cuda")


def test_the_backend_follows_the_device() -> None:
    assert backend_of(torch.device("cuda", 3)) == "nccl"
    assert backend_of(torch.device("cpu")) == "gloo"
    assert backend_of(torch.device("meta")) == "fake"


def built_without_memory(_context: RankContext) -> dict[str, Any]:
    """The device that replaces CUDA: in a dry run, and on the CPU before and after."""
    found: dict[str, Any] = {}
    for device in ("cpu", "meta", "cpu"):
        platform.use_platform(device)
        answers = {torch.cuda.current_device().type, torch.zeros(2, device="cuda").device.type}
        found.setdefault(device, []).append(answers)
    with upstream_fixes.cpu_tensors_named_cuda():
        formats = [
            torch.empty(1, dtype=dtype, device="meta").type() for dtype in (torch.float, torch.bfloat16)
        ]
    return found | {"formats": formats}


def test_meta_tensors_stand_in_for_cuda_in_a_dry_run() -> None:
    found = run_ranks(built_without_memory, 1)[0]
    assert found["cpu"] == [{"cpu"}, {"cpu"}]
    assert found["meta"] == [{"meta"}]
    assert found["formats"] == ["torch.cuda.FloatTensor", "torch.cuda.BFloat16Tensor"]


# What torch.cuda answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", CUDA_CALLS)
def test_a_call_for_cuda_is_answered_with_the_cpu(
    found: dict[str, Any], installed: dict[str, Any], call: str
) -> None:
    _, expected = CUDA_CALLS[call]
    stock = found["stock torch"][call]
    assert "Error: " in str(stock) or stock == "does nothing", "torch answers by itself: the patch can go"
    assert found["answered"][call] == expected
    assert installed[call] == expected


@pytest.mark.parametrize(
    ("device", "is_cuda"),
    [
        ("cuda", True),
        ("cuda:1", True),
        (torch.device("cuda"), True),
        (torch.device("cuda", 1), True),
        ("cpu", False),
        ("meta", False),
        (torch.device("cpu"), False),
        (None, False),
        (0, False),
    ],
)
def test_devices_are_told_apart(device: Any, is_cuda: bool) -> None:
    assert names_cuda(device) is is_cuda


def test_the_meta_device_context_still_works(found: dict[str, Any]) -> None:
    assert found["meta"] == found["stock meta"]
    assert found["meta"]["zeros"] == "meta"
    assert set(found["meta without care"].values()) == {"cpu"}, "torch copes by itself: the patch can go"
    assert set(found["meta"]) == set(FACTORIES)


def test_dynamo_can_be_imported(found: dict[str, Any]) -> None:
    assert found["dynamo"] == "imported"
    assert found["dynamo without care"].startswith("AssertionError: Duplicate torch object")


def overlapped_node(_context: RankContext) -> tuple[list[float], list[float]]:
    """A node of megatron-core's overlapped schedule, on its own stream, with tensors recorded there."""
    from megatron.core.pipeline_parallel.utils import ScheduleNode

    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.empty_cache()
        node = ScheduleNode(lambda x: x * 2, torch.cuda.current_stream, torch.cuda.Event(), free_input=True)
        x = torch.tensor([2.0, 3.0], requires_grad=True)
        output = node.forward(x.clone()).tolist()
        return output, node.backward(torch.ones(2)).tolist()


def test_streams_and_events_carry_an_overlapped_schedule() -> None:
    assert run_ranks(overlapped_node, 1)[0] == ([4.0, 6.0], [2.0, 2.0])


# Faults of megatron-core -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fix", FIXES)
def test_stock_megatron_core_has_the_fault(found: dict[str, Any], fix: str) -> None:
    fault, expected = found["stock"][fix], FAULTS[fix]
    if isinstance(expected, str):
        assert fault.startswith(expected)
    else:
        assert fault == expected


@pytest.mark.parametrize("fix", FIXES)
def test_the_fix_cures_it(found: dict[str, Any], installed: dict[str, Any], fix: str) -> None:
    assert found["fixed"][fix] == CURED[fix]
    assert installed[fix] == CURED[fix]


def test_gradients_on_the_cpu_can_be_clipped(found: dict[str, Any]) -> None:
    assert found["stock clip"].startswith("AssertionError")
    assert found["fixed clip"] == 1.0


def test_every_fix_is_shown() -> None:
    module = vars(upstream_fixes)
    fixes = {
        name
        for name, value in module.items()
        if callable(value) and value.__module__ == upstream_fixes.__name__ and not name.startswith("_")
    }
    shown_below = {"do_without_triton"}
    assert fixes - {"install", "cpu_tensors_named_cuda"} == set(FIXES) | shown_below


class LoneGroup:
    """A group of one rank that gloo knows nothing of."""

    def size(self) -> int:
        return 1


def collectives_of_a_singleton_group(_context: RankContext) -> dict[str, Any]:
    from megatron.core.distributed import param_and_grad_buffer as buffers

    group, source = LoneGroup(), torch.arange(4.0)
    found = {}
    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        collective, output = getattr(buffers, name), torch.zeros(4)
        with buffers._coalescing_manager(group, async_ops=True) as handle:
            collective(output, source, group=group, async_op=True)
        handle.wait()
        stock = outcome(lambda: collective.__wrapped__(torch.zeros(4), source, group=group))  # noqa: B023
        found[name] = (output.tolist(), stock)
    return found


def test_a_group_of_one_copies_without_asking_gloo() -> None:
    for copied, stock in run_ranks(collectives_of_a_singleton_group, 1)[0].values():
        assert copied == [0.0, 1.0, 2.0, 3.0]
        assert "Error: " in str(stock)


DENSE_STAGE = [*layout(pp=2), "parallelism.layout='Et|ttttL'"]
"""The first of two stages holds the embedding and the dense layer, and no expert."""


def save_after_a_step(context: RankContext, arguments: list[str]) -> list[float]:
    """Later losses of a run that saves after its first step."""
    from k25_train.metrics.report import Report
    from k25_train.training.soundness import Verdict
    from k25_train.training.step import train_step
    from k25_train.training.trainer import Trainer

    run = start_run(context, arguments)
    keeper = Trainer(run, Report(run.config, is_main=run.is_main, device_name="CPU")).keeper
    with run.data:
        keeper.trained(train_step(run, 1).loader_state)
        keeper.save(1, Verdict())
        return [train_step(run, step).loss for step in (2, 3)]


def load_and_go_on(context: RankContext, arguments: list[str]) -> list[float]:
    from k25_train.metrics.report import Report
    from k25_train.training.step import train_step
    from k25_train.training.trainer import Trainer

    run = start_run(context, arguments)
    with run.data:
        Trainer(run, Report(run.config, is_main=run.is_main, device_name="CPU")).keeper.resume()
        return [train_step(run, step).loss for step in (2, 3)]


@pytest.mark.distributed
def test_a_stage_without_experts_is_saved_and_resumed(tmp_path: Path) -> None:
    from tests.helpers.tiny_shards import write_tiny_shard_set

    data = write_tiny_shard_set(tmp_path / "shards")
    arguments = overrides(data, tmp_path / "run", *DENSE_STAGE)
    losses, same = run_ranks(save_after_a_step, 2, arguments)
    assert losses == same
    assert run_ranks(load_and_go_on, 2, arguments) == [losses, losses]


# Two pipeline ranks with virtual stages --------------------------------------------------------------------


def gradient_norm_of_stock_communication(context: RankContext, arguments: list[str]) -> float:
    """One step with the settings of point-to-point communication that megatron-core has by default."""
    from k25_train.training.step import train_step

    run = start_run(context, arguments)
    config = run.chunks[0].config
    config.overlap_p2p_comm, config.batch_p2p_comm = False, True
    with run.data:
        return train_step(run, 1).grad_norm


@pytest.mark.distributed
def test_stock_communication_swaps_messages_of_two_ranks_and_ours_does_not(tmp_path: Path) -> None:
    from tests.helpers.tiny_shards import write_tiny_shard_set

    data = write_tiny_shard_set(tmp_path / "shards")
    one_step = ["train.steps=1", "optim.warmup=0", "optim.decay=0"]
    [(_, serial)] = losses_of(overrides(data, tmp_path / "a", *layout(), *one_step), num_ranks=1)
    arguments = overrides(data, tmp_path / "b", *layout(pp=2, vpp=2), *one_step)
    [(_, ours)] = losses_of(arguments, num_ranks=2)
    assert ours == pytest.approx(serial, rel=1e-6)
    stock = run_ranks(gradient_norm_of_stock_communication, 2, arguments)[0]
    assert abs(stock / serial - 1) > 0.1, "megatron-core keeps the messages apart: `_pipeline` can be simpler"


def communication_settings(_context: RankContext) -> dict[tuple[int, int], tuple[bool, bool]]:
    """(pp, vpp) -> (overlap_p2p_comm, batch_p2p_comm) of the translated configuration."""
    from k25_train.model.megatron_config import backbone_config
    from tests.helpers.hf_reference import tiny_model_config
    from tests.helpers.model_chunks import train_config
    from tests.helpers.parallel_sizes import even_layout, parallel_sizes

    settings = {}
    for pp in range(1, 17):
        for vpp in range(1, 5 if pp > 1 else 2):
            model = tiny_model_config(num_layers=pp * vpp)
            sizes = parallel_sizes(pp=pp, vpp=vpp)
            config = backbone_config(model, train_config(), sizes, even_layout(pp * vpp, pp, vpp))
            settings[pp, vpp] = (config.overlap_p2p_comm, config.batch_p2p_comm)
    return settings


def test_no_layout_gets_the_communication_that_swaps_messages() -> None:
    settings = run_ranks(communication_settings, 1)[0]
    assert len(settings) == 1 + 15 * 4
    for (_, vpp), setting in settings.items():
        # The plain schedule refuses unbatched, overlapped communication.
        assert setting == ((True, False) if vpp > 1 else (False, True))


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from parallel.megatron.platform import use_platform
use_platform("cpu")
from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz
from megatron.core.transformer.moe import paged_stash
try:
    paged_stash.paged_stash_copy_kernel[(1,)]()
except RuntimeError as error:
    print(error)
"""


def test_megatron_core_is_imported_without_triton() -> None:
    """As in an image for CPUs."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "needs triton" in done.stdout
