"""The HTML page of a plan, and what a real browser makes of it at two widths and in two colour schemes."""

import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from k25_train.metrics.planned_timeline import planned_rows
from k25_train.metrics.timeline import Kind
from k25_train.plan.memory.verdict import Fit
from k25_train.plan.report.html.elements import Curve, plot, section
from k25_train.plan.report.html.page import page
from k25_train.plan.report.html.timeline import IDLE, KINDS, timeline_svg
from k25_train.plan.report.planned import Planned
from tests.helpers.browser import opened
from tests.helpers.hand_made_plans import hand_made_plan, hand_made_remedy, hand_made_verdict, with_verdict

CURVES = [
    Curve(name, tuple((n / 10, 1500.0 - n * slope) for n in range(6)))
    for name, slope in (("coupled", 90), ("upfront", 40), ("bubbles", 9))
]
SCRIPT = """
for (const each of document.querySelectorAll("details")) each.open = true;
const all = selector => [...document.querySelectorAll(selector)];
const box = element => element.getBoundingClientRect();
const isShown = element => box(element).width > 0 && box(element).height > 0;
const numbers = colour => colour.match(/[0-9.]+/g).map(Number);
const linear = value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const light = colour => numbers(colour).slice(0, 3).map(value => linear(value / 255))
  .reduce((sum, value, index) => sum + [0.2126, 0.7152, 0.0722][index] * value, 0);
const behind = element => {
  const colour = getComputedStyle(element).backgroundColor;
  return numbers(colour)[3] === 0 && element.parentElement ? behind(element.parentElement) : colour;
};
const contrast = element => {
  const [low, high] = [light(getComputedStyle(element).color), light(behind(element))].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
};
const WORDS = "h1,h2,p,td,th,small,code,pre,b,.cards span,.label,.number,.ticks span,.plot span,summary";
const texts = all(WORDS).filter(each => isShown(each) && each.innerText.trim());
const outside = texts.filter(each => !each.closest(".scrolls"))
  .filter(each => box(each).right > innerWidth + 1 || box(each).left < -1);
const touching = selector => all(selector).map(box).filter((each, index, boxes) => index
  && each.left < boxes[index - 1].right && each.top < boxes[index - 1].bottom
  && each.bottom > boxes[index - 1].top).length;
const verdict = document.querySelector(".verdict h2");
top.document.body.dataset.seen = JSON.stringify({
  width: innerWidth,
  page: document.documentElement.scrollWidth,
  outside: outside.map(each => each.innerText),
  verdict: isShown(verdict) ? verdict.innerText : "",
  contrast: Math.min(...texts.map(contrast)),
  paper: light(getComputedStyle(document.body).backgroundColor),
  tables: all("table").map(each =>
    [each.scrollWidth, each.parentElement.clientWidth, getComputedStyle(each.parentElement).overflowX]),
  bars: all(".track i").length,
  stages: all(".timeline svg").length,
  overlaps: touching(".ticks span") + touching(".x span"),
});
"""
"""Looks at the page as it is laid out, and leaves what it saw with the document on top."""


@pytest.fixture(scope="module")
def pretrain() -> Planned:
    """The 1T model on 256 ranks, in a step of 60 seconds."""
    return hand_made_plan("experiment=k25_pretrain_4k")


@pytest.fixture(scope="module")
def written(pretrain: Planned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page that has everything, of a plan that does not fit."""
    verdict = hand_made_verdict(Fit.does_not_fit, device_gb=92, remedy=hand_made_remedy("optim.offload=cpu"))
    parts = [section("Vision", plot(CURVES, "share of <vision> tokens", "tokens/s per GPU"))]
    path = tmp_path_factory.mktemp("page") / "plan.html"
    text = page(with_verdict(pretrain, verdict), planned_rows(pretrain.step), parts, "model: <x> & y")
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "is_dark"), [(390, False), (1280, True)])
def test_a_browser_shows_all_of_it(written: Path, tmp_path: Path, width: int, is_dark: bool) -> None:
    document = opened(written, SCRIPT, tmp_path / "profile", width=width, is_dark=is_dark)
    found = re.search(r'data-seen="([^"]*)"', document)
    assert found is not None, document[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["width"] == width and seen["page"] <= width, "nothing is wider than the page"
    assert seen["outside"] == []
    assert seen["verdict"] == "DOES NOT FIT"
    assert (seen["paper"] < 0.1) is is_dark
    assert seen["contrast"] >= 4.5, "WCAG 2.2, 1.4.3"
    assert all(inner <= outer or scrolls == "auto" for inner, outer, scrolls in seen["tables"])
    assert seen["bars"] > 30 and seen["stages"] == 16
    assert seen["overlaps"] == 0


def test_it_needs_nothing_else(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script|<link|src=|url\(|@import", text)
    assert "model: &lt;x&gt; &amp; y" in text and "share of &lt;vision&gt; tokens" in text
    assert "<code>optim.offload=cpu</code>" in text
    assert len(text) < 500_000


class Tags(HTMLParser):
    """Checks that what is opened is closed, in order."""

    VOID = ("meta",)

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in self.VOID:
            self.path.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.path.pop() == tag


def test_tags_are_balanced(written: Path) -> None:
    tags = Tags()
    tags.feed(written.read_text(encoding="utf-8"))
    assert tags.path == []


def rectangles(svg: str, kind: str) -> Iterator[tuple[int, int]]:
    for path in re.findall(rf'<path class="{kind}" d="([^"]*)"', svg):
        yield from ((int(x), int(w)) for x, w in re.findall(r"M(\d+) 0h(\d+)v1", path))


def test_the_timeline_draws_what_ranks_do_to_scale() -> None:
    rows = [
        [("backbone forward", 0.0, 1.0), (IDLE, 1.0, 2.0), ("backbone backward", 2.0, 4.0)],
        [("backbone forward", 1.0, 1.0 + 1e-9), ("optimizer", 4.0, 5.0)],
    ]
    svg = timeline_svg(rows)
    assert list(rectangles(svg, "k0")) == [(0, 20_000), (20_000, 1)], "even what is short is seen"
    assert list(rectangles(svg, "k1")) == [(40_000, 40_000)]
    assert list(rectangles(svg, "k3")) == [(80_000, 20_000)]
    assert svg.count("<svg") == 2
    assert "vision forward" not in svg, "the legend has what is there"


def test_the_timeline_knows_what_ranks_do() -> None:
    waits = {Kind.features, Kind.experts, Kind.contexts, Kind.pipeline}
    assert set(KINDS) == {kind.value for kind in Kind if kind not in waits}
    assert Kind.other.value == IDLE


def test_a_plot_is_to_scale() -> None:
    text = plot([Curve("a", ((0.0, 0.0), (0.5, 1000.0), (1.0, 2000.0)))], "x", "y")
    assert 'points="0.0,1000.0 500.0,500.0 1000.0,0.0"' in text
    assert re.findall(r"top:[\d]+%\">([\d,]+)<", text) == ["0", "500", "1,000", "1,500", "2,000"]
