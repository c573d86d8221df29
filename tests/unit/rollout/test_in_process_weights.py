"""Where the release's tensors go: as transformers' own loading puts them, whatever they come as."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from k25_train.export.stream import NamedTensor
from k25_train.rollout.engines.base import EngineError, PauseMode
from k25_train.rollout.engines.in_process.engine import InProcessEngine
from k25_train.rollout.engines.in_process.network import Network
from tests.helpers.hf_folders import small_model, with_int4_experts
from tests.helpers.hf_reference import build_hf_reference, random_checkpoint
from tests.helpers.sampled_engine import build_engine, special_ids, stream

MODEL = small_model()
STATE = random_checkpoint(MODEL)
EXPERT = "language_model.model.layers.1.mlp.experts.2.up_proj.weight"
NORM = "language_model.model.norm.weight"


@pytest.fixture(scope="module")
def engine() -> InProcessEngine:
    return build_engine(MODEL)


def committed(engine: InProcessEngine, tensors: object) -> dict[str, Tensor]:
    """transformers' tensors after a push of these."""

    async def body() -> None:
        await engine.pause(PauseMode.keep)
        await engine.stage(tensors, 4)  # type: ignore[arg-type]
        await engine.commit(4)

    asyncio.run(body())
    return engine._network.weights


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    wrong = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not wrong


def test_every_tensor_is_where_transformers_puts_it(engine: InProcessEngine) -> None:
    reference, _ = build_hf_reference(MODEL, STATE)
    assert_equal(committed(engine, stream(STATE)), reference.state_dict())


def test_staging_leaves_the_weights_in_use_as_they_are(engine: InProcessEngine) -> None:
    before = {name: tensor.clone() for name, tensor in committed(engine, stream(STATE)).items()}
    asyncio.run(engine.stage(stream(random_checkpoint(MODEL, 1)), 5))
    assert_equal(engine._network.weights, before)


def test_a_folder_gives_what_a_stream_gives(engine: InProcessEngine, tmp_path: Path) -> None:
    names = list(STATE)
    for number in range(2):
        save_file({name: STATE[name] for name in names[number::2]}, tmp_path / f"part_{number}.safetensors")
    expected = {name: tensor.clone() for name, tensor in committed(engine, stream(STATE)).items()}
    assert_equal(committed(engine, tmp_path), expected)


def test_packed_experts_are_what_compressed_tensors_unpacks(engine: InProcessEngine) -> None:
    stored, plain = with_int4_experts({name: tensor.bfloat16() for name, tensor in STATE.items()})
    assert len(stored) > len(plain)
    # As float32 products, of which bfloat16 ones are roundings.
    unpacked = committed(engine, stream(plain))
    expected = {name: tensor.clone() for name, tensor in unpacked.items()}
    found = committed(engine, stream(stored))
    for name, tensor in found.items():
        assert torch.equal(tensor.bfloat16(), expected[name].bfloat16()), name


def test_bfloat16_is_as_transformers_loads_it(engine: InProcessEngine) -> None:
    from transformers import Kimi_K25ForConditionalGeneration

    low = Network(MODEL, special_ids(MODEL), torch.device("cpu"), torch.bfloat16)
    loaded = Kimi_K25ForConditionalGeneration.from_pretrained(
        None, config=low._network.config, state_dict=dict(STATE), dtype=torch.bfloat16
    )
    assert {name: each.dtype for name, each in low._network.state_dict().items()} == {
        name: each.dtype for name, each in loaded.state_dict().items()
    }
    for name, buffer in low._network.named_buffers():
        if "inv_freq" in name or "time_position" in name:
            assert torch.equal(buffer.float(), loaded.get_buffer(name).float()), name


def test_building_draws_no_random_number() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Network(MODEL, special_ids(MODEL), torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def _without(name: str) -> Callable[[], dict[str, Tensor]]:
    return lambda: {each: tensor for each, tensor in STATE.items() if each != name}


def _with(name: str, tensor: Tensor) -> Callable[[], dict[str, Tensor]]:
    return lambda: STATE | {name: tensor}


PACKED = dict(with_int4_experts({EXPERT: STATE[EXPERT]})[0])


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        (_without(NORM), f"version 4 lacks {NORM}"),
        (dict, r"version 4 lacks .* and \d+ more"),
        (_with("model.norm.weight", torch.zeros(64)), "model.norm.weight is no tensor of the model"),
        (_with(NORM, torch.zeros(65)), r"norm.weight is torch.float32 \[65\], but should be a float \[64\]"),
        (_with(NORM, torch.zeros(64, dtype=torch.int32)), r"norm.weight is torch.int32 \[64\]"),
        (_with(f"{EXPERT}_packed", PACKED[f"{EXPERT}_packed"]), f"{EXPERT}_packed came twice"),
        (
            lambda: _without(EXPERT)() | {f"{EXPERT}_packed": PACKED[f"{EXPERT}_packed"]},
            f"of {EXPERT} only packed came",
        ),
        (
            lambda: _without(EXPERT)() | PACKED | {f"{EXPERT}_scale": torch.ones(32, 1).bfloat16()},
            rf"{EXPERT}: codes \[32, 8\], scales \[32, 1\]",
        ),
        (_with(f"{NORM}_packed", torch.zeros(64)), "only these are packed"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_staged(
    engine: InProcessEngine, tensors: Callable[[], dict[str, Tensor]], match: str
) -> None:
    before = {name: tensor.clone() for name, tensor in committed(engine, stream(STATE)).items()}

    async def body() -> None:
        with pytest.raises(EngineError, match=match):
            await engine.stage(stream(tensors()), 4)
        with pytest.raises(EngineError, match="nothing is staged"):
            await engine.commit(4)

    asyncio.run(body())
    assert_equal(engine._network.weights, before)


def test_a_tensor_that_comes_twice_is_named(engine: InProcessEngine) -> None:
    twice = [NamedTensor(NORM, STATE[NORM])] * 2
    with pytest.raises(EngineError, match=f"{NORM} came twice"):
        asyncio.run(engine.stage(twice, 4))


def test_a_folder_without_weights_or_with_damage_is_named(engine: InProcessEngine, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"has no \.safetensors file"):
        asyncio.run(engine.stage(tmp_path, 4))
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(EngineError, match=r"model\.safetensors"):
        asyncio.run(engine.stage(tmp_path, 4))


def test_models_that_transformers_has_no_like_of_are_named() -> None:
    from dataclasses import replace

    oblong = replace(MODEL, vision=replace(MODEL.vision, pos_emb_width=8))
    with pytest.raises(
        EngineError, match=r"model\.name=test has a table of vision positions that is no square"
    ):
        build_engine(oblong)
    with pytest.raises(EngineError, match="float16"):
        build_engine(MODEL, dtype=torch.float16)
