"""The one screen of a plan: what it says, that it fits, in which order."""

from dataclasses import replace

import pytest

from k25_train.plan.assumptions import Assumptions
from k25_train.plan.cause import Cause
from k25_train.plan.memory.stage import stage_memories
from k25_train.plan.memory.verdict import Fit
from k25_train.plan.report.bars import Amount, bar, bar_rows, largest
from k25_train.plan.report.labels import CAUSES, LABEL_WIDTH, memory_amounts, time_amounts
from k25_train.plan.report.planned import Planned
from k25_train.plan.report.screen import NUM_LINES, screen
from k25_train.plan.report.words import assumed_text, layout_text
from k25_train.plan.time.step_plan import Part
from k25_train.units import GB
from parallel.pipeline.layout import PipelineLayout, parse_layout
from tests.helpers.hand_made_plans import (
    SECONDS,
    hand_made_plan,
    hand_made_remedy,
    hand_made_verdict,
    with_verdict,
)
from tests.helpers.project_sources import REPO

OVERRIDES = ["activation.moe.swiglu_input=fp8+offload", "optim.offload=cpu", "dep.feature_buffer_gib=0"]
GOLDEN = REPO / "tests/golden/plan_screen.txt"


@pytest.fixture(scope="module")
def pretrain() -> Planned:
    """The 1T model on 256 ranks, in a step of 60 seconds."""
    return hand_made_plan("experiment=k25_pretrain_4k")


def lines_of(planned: Planned, width: int = 80) -> list[str]:
    return [line.plain for line in screen(planned, width)]


def test_the_screen_is_as_it_was(pretrain: Planned) -> None:
    shown = "\n".join(lines_of(pretrain)) + "\n"
    assert shown == GOLDEN.read_text(encoding="utf-8"), f"if it should be so, write it to {GOLDEN}:\n{shown}"


@pytest.mark.parametrize("width", [40, 80, 93, 100, 160])
@pytest.mark.parametrize("fit", Fit)
def test_it_fits_a_screen(pretrain: Planned, width: int, fit: Fit) -> None:
    remedy = None if fit is Fit.fits else hand_made_remedy(*OVERRIDES)
    device_gb = {Fit.fits: 72.0, Fit.tight: 83.0, Fit.does_not_fit: 92.0}[fit]
    verdict = hand_made_verdict(fit, device_gb=device_gb, remedy=remedy)
    lines = lines_of(with_verdict(pretrain, verdict), width)
    most = min(max(width, 80), 100)
    pasted = [line for line in lines if line.strip() == " ".join(OVERRIDES)]
    assert len(pasted) == (remedy is not None), "overrides are one line, to paste"
    assert all(len(line) <= most for line in lines if line not in pasted)
    assert sum(-(-max(len(line), 1) // most) for line in lines) <= NUM_LINES
    # The verdict comes first, below the title.
    assert lines[1].startswith(fit.value.upper())
    assert all("nan" not in line for line in lines)


def test_who_has_too_little_is_said(pretrain: Planned) -> None:
    of_device = hand_made_verdict(Fit.does_not_fit, device_gb=92.0)
    assert "7.10 GB too little on devices of stage 0" in lines_of(with_verdict(pretrain, of_device))[1]
    assert any("--search" in line for line in lines_of(with_verdict(pretrain, of_device))[2:5])
    of_host = hand_made_verdict(Fit.does_not_fit, node_gb=2500.0)
    assert lines_of(with_verdict(pretrain, of_host))[2].startswith("host memory: 353 GB too little")
    trial = lines_of(with_verdict(pretrain, replace(of_host, fit=Fit.fits, limit_bytes=None)))[2]
    assert trial == "host memory: 2,500 GB on the fullest node, which has 2,147; not judged on CPUs"
    closest = hand_made_remedy("optim.offload=cpu", left_gb=-1, fit=Fit.does_not_fit)
    hopeless = hand_made_verdict(Fit.does_not_fit, device_gb=192.0, remedy=closest)
    text = "\n".join(lines_of(with_verdict(pretrain, hopeless)))
    assert "no change of memory alone fits; what helps most leaves it 1.00 GB short" in text


def test_the_cpu_has_no_limit_of_its_own(pretrain: Planned) -> None:
    lines = lines_of(with_verdict(pretrain, hand_made_verdict(limit_gb=None)))
    assert lines[1] == "FITS  72.00 GB per rank, which are the host's: the device is the CPU"


def test_every_second_and_byte_is_in_the_bars(pretrain: Planned) -> None:
    assert sum(each.value for each in time_amounts(pretrain.step)) == pytest.approx(60)
    for memory in (*pretrain.memories, *stage_memories(pretrain.pipeline)):
        amounts = memory_amounts(memory)
        assert sum(each.value for each in amounts) == pytest.approx(memory.device / GB)
        assert "others" not in [each.label for each in amounts], "a field of StageMemory has no label"
    few = largest(time_amounts(pretrain.step), 4)
    assert [each.label for each in few][::3] == ["products, attention", f"{len(SECONDS) - 3} smaller ones"]
    assert sum(each.value for each in few) == pytest.approx(60)


def test_every_cause_has_a_label() -> None:
    assert set(CAUSES) == set(Cause)
    assert max(map(len, CAUSES.values())) <= LABEL_WIDTH
    assert len(set(CAUSES.values())) == len(Cause)


def test_bars_are_as_long_as_they_should() -> None:
    assert bar(1, 4) == "████" and bar(0, 4) == ""
    assert bar(1e-9, 4) == "▏", "something is seen of everything"
    assert bar(0.5, 5) == "██▌"
    rows = bar_rows([Amount("a", 3.0), Amount("much too long a label", 1.0)], 40, 12)
    assert rows == ["a             3.00  75% " + "█" * 16, "much too lo…  1.00  25% " + "█" * 5 + "▍"]


def test_a_layout_is_written_so_that_it_can_be_typed() -> None:
    for sizes in (
        (2, 2, (2, 1, 2, 0)),
        (4, 4, (2,) + (1,) * 14 + (0,)),
        (1, 1, (9,)),
        (2, 1, (3, 3)),
        (4, 2, (5,) * 8),
        (3, 1, (4, 12, 0)),
    ):
        layout = PipelineLayout(pp=sizes[0], vpp=sizes[1], layers_per_chunk=sizes[2])
        text = layout_text(layout)
        assert parse_layout(text, layout.num_layers, layout.pp, layout.vpp) == layout, text
        assert len(text) <= len(layout.to_megatron())


def test_what_is_assumed_is_said(pretrain: Planned) -> None:
    assumptions = Assumptions(vision_share=0.5, expert_imbalance=1.5, slow_node=1.1, document_tokens=1024)
    text = assumed_text(replace(pretrain.pipeline, assumptions=assumptions))
    assert text.startswith("assumed: 50% vision, experts imbalanced 1.5 times, ")
    assert text.endswith(" times, a node 1.1 times as slow, documents of 1,024 tokens")


def test_a_step_of_one_cause(pretrain: Planned) -> None:
    step = replace(pretrain.step, parts=(Part(Cause.compute, 1e-3, ""),))
    lines = lines_of(replace(pretrain, step=step))
    assert any(line.startswith("products, attention  0.00 100% ") for line in lines)
