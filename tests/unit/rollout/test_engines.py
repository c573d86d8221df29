"""What every engine promises, put to each of ours: directly, and behind a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.engine_promises import *  # noqa: F403 - every test of them
from tests.helpers.engine_subjects import (
    Subject,
    directly,
    in_process_subject,
    over_sglang_wire,
    over_vllm_wire,
    table_subject,
    table_weights,
)
from tests.helpers.tiny_shards import tiny_vision_config

THROUGH = {"direct": directly, "served": over_vllm_wire, "sglang": over_sglang_wire}
KINDS = [("table", "direct"), ("table", "served"), ("table", "sglang")]
KINDS += [("in_process", "direct"), ("in_process", "served")]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    engine, way = request.param
    work = tmp_path_factory.mktemp("engine")
    if engine == "table":
        same = way != "sglang"
        yield table_subject(tiny_vision_config(), table_weights(work), THROUGH[way], same_draws=same)
        return
    with in_process_subject(work, THROUGH[way]) as real:
        yield real
