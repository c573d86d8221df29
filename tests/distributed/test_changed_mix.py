"""Another mixture on resume: legal, told, recorded, and in force from the next step on."""

import json
from pathlib import Path

import pytest

from tests.helpers.interrupted_runs import FOUR_RANKS, ONE_RANK, SHORT, cut_off, rows, short_run
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import fit
from tests.helpers.tiny_shards import write_tiny_shard_set

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

MIXED = ("data.sources.text.weight=0.1", "~data.sources.ocr", "data.sources.video.weight=0.9")


def fit_and_print(context: RankContext, arguments: list[str]) -> str:
    """What rank 0 prints while it trains."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        fit(context, arguments)
    return printed.getvalue()


def test_a_run_goes_on_with_another_mixture_and_remembers_it(tmp_path: Path) -> None:
    data, saved = write_tiny_shard_set(tmp_path / "set"), SHORT.saved_at
    run_ranks(fit, 1, short_run(data, tmp_path / "first", *ONE_RANK))
    resumed = cut_off(tmp_path / "first", tmp_path / "run")

    printed, *_ = run_ranks(fit_and_print, 4, [*short_run(data, resumed, *FOUR_RANKS), *MIXED])

    # 1. It is told, source by source.
    assert f"from step {saved + 1} on the data are mixed in another way:" in printed
    for line in ("ocr: weight 0.05 -> left out", "text: weight 0.6 -> weight 0.1"):
        assert f"  {line}\n" in printed
    # 2. It is in the metrics from that step on, and what came before is as it was.
    before, after = rows(tmp_path / "first"), rows(resumed)
    assert [row["step"] for row in after] == list(range(SHORT.num_steps + 1))
    for one, other in zip(before[1 : saved + 1], after[1 : saved + 1], strict=True):
        assert one["source_tokens/text"] == other["source_tokens/text"]
    told = [row["step"] for row in after if "source_weight/text" in row]
    assert told == [1, saved + 1]
    assert not any("source_tokens/ocr" in row for row in after[saved + 1 :])
    assert {"eval_loss/text", "eval_loss/video"} <= after[-1].keys()
    # 3. And in every checkpoint from there on.
    state = json.loads((resumed / f"checkpoints/step_{SHORT.num_steps}/data_state.json").read_text())
    assert [each["from_step"] for each in state["mixtures"]] == [1, saved + 1]
    assert state["loader"]["step"] == SHORT.num_steps
    assert (resumed / "mix.png").stat().st_size > 10_000
