"""Rows of published runs: they can be planned, say where they are from, and agree with themselves."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from k25_train.compose.resolve import compose
from k25_train.plan.assumptions import Compute, Sharding
from k25_train.plan.batch_sizes import BatchSizes
from k25_train.plan.cause import Cause
from k25_train.plan.flops import training_flops
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.time.plan_step import plan_step
from tests.helpers.published import Published, Role, Row, read_published
from tests.helpers.published_fit import chip, error, planned
from tests.helpers.trained import LANGUAGE_MODEL


@pytest.fixture(scope="module")
def published() -> Published:
    return read_published()


def test_every_row_can_be_planned(published: Published) -> None:
    for row in published.rows:
        config = row.config()
        assert config.train.transformer_engine, row.name
        assert not config.model.has_vision, row.name
        assert row.assumptions.vision_share == 0
        assert len(row.source) > 20, row.name
        # What others do to devices is their code's; the plan's own corrections are left to calibration rows.
        assert config.cluster.rates.device.lower() in " ".join(row.overrides)


def test_gradients_of_a_single_chunk_are_reduced_layer_by_layer(published: Published) -> None:
    """All 48 layers are in one chunk: nearly all of its exchange is over before the last backward pass is."""
    (row,) = [row for row in published.rows if row.name == "qwen3-30b-gb300-256"]
    waited_s = {}
    for overlaps in (True, False):
        more = tuple(
            f"parallelism.{key}={overlaps}" for key in ("overlap_grad_reduce", "overlap_param_gather")
        )
        step = plan_step(planned(replace(row, overrides=(*row.overrides, *more)), kernels=1.0))
        waited_s[overlaps] = step.exposed_s[Cause.data_parallel]
    assert 0 < waited_s[True] < 0.25 * waited_s[False]


def test_messages_that_are_waited_for_are_not_hidden(published: Published) -> None:
    """Each pass of a stage waits 1.2 ms for 59 MB: 8 micro-batches, 4 chunks, both ways, but at the ends."""
    (row,) = [row for row in published.rows if row.name == "automodel-k2-h100"]
    code = replace(row.assumptions.code, waits_for_messages=False)
    ahead = replace(row, assumptions=replace(row.assumptions, code=code))
    waits, hides = (plan_step(planned(each, kernels=1.0)) for each in (row, ahead))
    assert waits.exposed_s[Cause.pipeline] == pytest.approx(64 * 59e6 / 50e9, rel=0.15)
    assert 0 < waits.step_s - hides.step_s < waits.exposed_s[Cause.pipeline]


def test_a_constant_makes_up_for_its_device(published: Published) -> None:
    """Kernels that take 1.25 times longer make a row of one device slower, by less than that."""
    (row,) = [row for row in published.of(Role.calibration) if chip(row) == "H100"]
    slowed = (1 + error(row, 1.25)) / (1 + error(row, 1.0))
    assert 1 / 1.25 < slowed < 0.95


def test_one_row_of_a_device_calibrates_it(published: Published) -> None:
    devices = Counter(row.config().cluster.rates.device for row in published.of(Role.calibration))
    assert set(devices) == {"H100", "B200", "B300", "GB200", "GB300"}
    assert set(devices.values()) == {1}
    tried = {row.config().cluster.rates.device for row in published.of(Role.test)}
    assert tried == {"H100", "H800", "B200", "B300", "GB200", "GB300"}
    assert all("Chosen" in row.notes for row in published.of(Role.calibration))


def test_files_of_devices_have_the_constants_of_these_rows(published: Published) -> None:
    for row in published.of(Role.calibration):
        assert abs(error(row, row.config().cluster.rates.calibration.kernels)) < 0.005, row.name


@pytest.mark.parametrize("device", ["h800", "h200"])
def test_the_same_die_has_the_same_constant(device: str) -> None:
    of_device, of_die = (
        compose(["experiment=published", f"device={name}"]).cluster.rates.calibration
        for name in (device, "h100")
    )
    assert of_device == of_die


def test_tokens_and_flops_of_a_row_agree(published: Published) -> None:
    """TFLOP/s over tokens/s is what this project counts for a token; so the model is the one that was run."""
    for row in published.rows:
        if row.measured.tflops is None or row.measured.tokens_per_s_per_gpu is None:
            continue
        config = row.config()
        sizes = BatchSizes.of([config.train.seq_len], [])
        flops = training_flops(
            config.model, sizes, LANGUAGE_MODEL, mtp_layers=row.assumptions.code.mtp_layers
        )
        said = row.measured.tflops * 1e12 / row.measured.tokens_per_s_per_gpu
        assert flops / config.train.seq_len == pytest.approx(said, rel=0.015), row.name


def test_pairs_have_the_sign_of_what_their_rows_measured(published: Published) -> None:
    for pair in published.pairs:
        before, after = pair.without.measured, pair.changed.measured
        if before.tokens_per_s_per_gpu and after.tokens_per_s_per_gpu:
            percent = 100 * (after.tokens_per_s_per_gpu / before.tokens_per_s_per_gpu - 1)
            assert percent == pytest.approx(pair.percent, abs=1.0), pair.name
        assert pair.without.assumptions != pair.changed.assumptions or (
            pair.without.overrides != pair.changed.overrides
        )


def test_what_the_code_of_others_does_is_read() -> None:
    rows = {row.name: row for row in read_published().rows}
    code = rows["dsv3-gb300-2608"].assumptions.code
    assert (code.compute, code.mtp_layers, code.moment_bytes) == (Compute.fp8, 1, 2)
    assert (code.cuda_graphs, code.graphs_experts) == (True, True)
    assert rows["automodel-k2-h100"].assumptions.code.sharding is Sharding.weights
    assert not rows["mlm-overlap"].measured.fits


GOOD: dict[str, Any] = {
    "name": "a",
    "source": "there",
    "role": "test",
    "overrides": ["experiment=published"],
    "measured": {"tokens_per_s_per_gpu": 1},
}


def written(folder: Path, row: dict[str, Any], **more: Any) -> Path:
    content = {"source": "a report", "rows": [row], **more}
    (folder / "one.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"speed": 3}, "a: unknown keys speed"),
        ({"role": "tset"}, "role='tset': must be one of calibration, test, pair"),
        ({"measured": {"tokens": 1}}, "measured: unknown keys tokens"),
        ({"measured": {"tflops": 1}}, "a test row needs measured.tokens_per_s_per_gpu"),
        ({"measured": {"tokens_per_s_per_gpu": "many"}}, "tokens_per_s_per_gpu='many': must be"),
        ({"assumptions": {"imbalance": 2}}, "assumptions: unknown keys imbalance"),
        ({"assumptions": {"code": {"compute": "fp4"}}}, "code.compute='fp4': must be one of as_trained, fp8"),
        ({"assumptions": {"code": {"graphs": True}}}, "assumptions.code: unknown keys graphs"),
    ],
)
def test_a_bad_row_is_named(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"one\.yaml: .*{expected}"):
        read_published(written(tmp_path, GOOD | changes))


def test_rows_and_pairs_have_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no rows"):
        read_published(tmp_path)
    with pytest.raises(ValueError, match="another row of this name"):
        read_published(written(tmp_path, GOOD, rows=[GOOD, GOOD]))
    pair = {"name": "p", "source": "s", "without": "a", "with": "b", "percent": 1}
    with pytest.raises(ValueError, match="p: with: b: is not a row"):
        read_published(written(tmp_path, GOOD, pairs=[pair]))
    with pytest.raises(ValueError, match="p: lacks percent"):
        read_published(written(tmp_path, GOOD, pairs=[_without(pair)]))


def _without(pair: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in pair.items() if key != "percent"}


def test_overrides_of_the_file_come_first(tmp_path: Path) -> None:
    [row] = read_published(written(tmp_path, GOOD, overrides=["model=deepseek_v3"])).rows
    assert isinstance(row, Row)
    assert row.overrides == ("model=deepseek_v3", "experiment=published")
    assert row.source == "a report: there"


def test_scales_of_whole_tensors_cost_a_look_at_each(published: Published) -> None:
    """A cast reads its tensor twice, and experts' tensors are cast one by one."""
    [row] = [row for row in published.rows if row.name == "qwen3-30b-h100-fp8"]
    assert row.assumptions.code.scales_per_tensor
    blocks = replace(row.assumptions.code, scales_per_tensor=False)
    found = {
        of_tensor: plan_step(
            plan_pipeline(row.config(), assumptions=replace(row.assumptions, code=code))
        ).step_s
        for of_tensor, code in ((True, row.assumptions.code), (False, blocks))
    }
    assert 1.05 * found[False] < found[True] < 1.3 * found[False]
