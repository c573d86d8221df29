"""What-ifs as a table, as JSON, and as parts of the page."""

import json
import re

import pytest
from rich.console import Console

from k25_train.compose.offer import offer
from k25_train.compose.resolve import compose
from k25_train.plan.pipeline import plan_pipeline
from k25_train.plan.report.html.variants import mechanism_section, vision_curves, vision_section
from k25_train.plan.report.what_ifs import what_if_as_dict, what_if_table
from k25_train.plan.variants import WhatIfKind
from k25_train.plan.what_if import WhatIf, what_if


def found(kind: WhatIfKind) -> WhatIf:
    """Of the smoke run."""
    return what_if(kind, plan_pipeline(compose(["experiment=smoke"])), offer(), seeks_remedy=False)


@pytest.fixture(scope="module")
def mechanisms() -> WhatIf:
    return found(WhatIfKind.mechanisms)


def test_a_table_has_every_row_and_cuts_no_number(mechanisms: WhatIf) -> None:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(what_if_table(mechanisms))
    text = console.export_text()
    assert mechanisms.title in text and "…" not in text
    for row in mechanisms.rows:
        assert row.name in text
        assert row.step is None or f"{row.step.tokens_per_s_per_gpu:,.0f}" in text


def test_json_says_what_was_refused(mechanisms: WhatIf) -> None:
    data = json.loads(json.dumps(what_if_as_dict(mechanisms), allow_nan=False))
    assert data["what_if"] == "mechanisms"
    rows = {row["name"]: row for row in data["rows"]}
    assert list(rows) == [row.name for row in mechanisms.rows]
    first = rows["as configured"]
    assert first["fits"] and first["step_s"] == pytest.approx(sum(first["parts_s"].values()))
    refused = rows["with deepep"]
    assert refused["fits"] is False and refused["step_s"] is None
    assert "has kernels for CUDA only" in refused["verdict"]


def test_bars_are_relative_to_the_configuration(mechanisms: WhatIf) -> None:
    text = mechanism_section(mechanisms)
    assert text.index("as configured") < min(text.index(row.name) for row in mechanisms.rows[1:])
    rates = [row.step.tokens_per_s_per_gpu for row in mechanisms.rows if row.step is not None]
    numbers = re.findall(r"<div class=number>([\d,]+) \(([+-][\d.]+)%\)", text)
    assert sorted(float(number.replace(",", "")) for number, _ in numbers) == sorted(map(round, rates))
    assert numbers[0][1] == "+0.0"
    for number, percent in numbers:
        ratio = float(number.replace(",", "")) / rates[0]
        assert float(percent) == pytest.approx(100 * (ratio - 1), abs=0.2)
    assert "class=faded" in text, "what training refuses is not drawn as what it takes"


def test_images_have_a_curve_for_each_place_of_the_tower() -> None:
    images = found(WhatIfKind.vision)
    curves = vision_curves(images)
    assert [curve.label for curve in curves] == ["coupled", "upfront", "bubbles"]
    for curve in curves:
        assert [x for x, _ in curve.points] == [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    assert vision_section(images).count("<polyline") == 3
