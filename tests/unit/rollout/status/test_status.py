"""The status page as a browser shows it, and metrics as Prometheus' own parser reads them."""

import asyncio
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from k25_train.errors import MachineError
from k25_train.rollout.manager.snapshot import EngineUse, Slow, Snapshot, together
from k25_train.rollout.status.page import page
from k25_train.rollout.status.server import StatusServer
from tests.helpers.browser import opened

HOSTILE = 'task<script>document.title="taken"</script>"\\\n'
SEEN = Snapshot(
    live=3,
    cap=4,
    cap_reason="kv_use 0.93 >= 0.9 with 7 requests waiting",
    queued={"sums": 12, "files": 1},
    phases={"generate": 2, "tool": 1},
    phase_seconds={"generate": 250.0, "tool": 8000.0},
    events={"turns": 70, "tokens": 4000, "admitted": 9, "ended": 6},
    failures={"judge_error": 2, HOSTILE: 1},
    slowest=(Slow(name=HOSTILE, source="files", phase="tool", detail="make", phase_s=61.0, total_s=300.0),),
    sandboxes=1,
    max_sandboxes=8,
    engines={
        "http://a:1": EngineUse(version=7, running=5, waiting=7, kv_use=0.93, busy_share=0.5),
        "http://b:1": EngineUse(
            version=-1, running=0, waiting=0, kv_use=0.0, busy_share=0.0, fenced="probe failed: 500"
        ),
    },
    lag_p50_s=0.001,
    lag_p99_s=0.04,
    uptime_s=20.0,
)
BEFORE = Snapshot(events={"turns": 20, "tokens": 3000}, uptime_s=10.0)


async def answers(server: StatusServer, *paths: str) -> list[str]:
    await server.start(0)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{server.port}") as session:
            found = []
            for path in paths:
                async with session.get(path) as response:
                    assert response.status == 200
                    found.append(await response.text())
            return found
    finally:
        await server.close()


async def seen() -> Snapshot:
    return SEEN


def test_the_served_page_says_in_a_browser_what_is_going_on(tmp_path: Path) -> None:
    (text,) = asyncio.run(answers(StatusServer("runs/blend", seen), "/"))
    file = tmp_path / "status.html"
    file.write_text(text, encoding="utf-8")
    script = "document.title = document.body.innerText.replace(/\\s+/g, ' ')"
    shown = opened(file, script, tmp_path / "profile")
    for words in (
        "runs/blend", "3 of 4", "kv_use 0.93", "1.0, 40.0 ms", "fenced off: probe failed: 500", "judge_error",
        "tool: make", "5.0 min", "2.2 h",
    ):  # fmt: skip
        assert words in shown, words
    assert "<title>taken" not in shown and "task&lt;script&gt;" in shown


def test_rates_are_of_the_time_between_two_looks() -> None:
    text = page("run", SEEN, BEFORE)
    assert "<b>5.0</b><span>turns/s" in text and "<b>100</b><span>tokens/s" in text


def test_a_run_that_has_not_begun_has_a_page() -> None:
    text = page("run", Snapshot(), Snapshot())
    assert text.count("no rollout lives") == 2 and "<b>0.0</b><span>turns/s" in text


def test_prometheus_reads_every_line() -> None:
    (text,) = asyncio.run(answers(StatusServer("run", seen), "/metrics"))
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert all(name.startswith("rollout_") for name in families)

    def value(family: str, **labels: str) -> float:
        return next(each.value for each in families[family].samples if each.labels == labels)

    assert value("rollout_live") == 3 and value("rollout_queued", source="sums") == 12
    assert value("rollout_events", kind="turns") == 70 and families["rollout_events"].type == "counter"
    assert value("rollout_failures", cause=HOSTILE) == 1
    assert value("rollout_engine_kv_use", engine="http://a:1") == 0.93
    assert value("rollout_engine_fenced", engine="http://b:1") == 1
    assert value("rollout_loop_lag_seconds", quantile="0.99") == 0.04
    assert value("rollout_phase_seconds", phase="tool") == 8000


def test_programs_get_the_snapshot_back_as_it_was() -> None:
    async def trial() -> None:
        server = StatusServer("run", seen)
        await server.start(0)
        url = f"http://127.0.0.1:{server.port}/snapshot.json"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            assert Snapshot.from_json(await response.json()) == SEEN
        with pytest.raises(MachineError, match=f"status_port={server.port}: cannot be listened on"):
            await StatusServer("other", seen).start(server.port)
        await server.close()
        await server.close()

    asyncio.run(trial())


def test_several_event_loops_are_seen_as_one() -> None:
    other = Snapshot(
        live=2, cap=4, cap_reason="max_live", phases={"tool": 2}, events={"turns": 5},
        slowest=(Slow(name="older", source="s", phase="tool", detail="", phase_s=1.0, total_s=900.0),),
        lag_p99_s=0.5, uptime_s=10.0, engines=SEEN.engines,
    )  # fmt: skip
    whole = together([SEEN, other])
    assert (whole.live, whole.cap, whole.phases["tool"], whole.events["turns"]) == (5, 8, 3, 75)
    assert whole.lag_p99_s == 0.5 and whole.uptime_s == 20.0 and len(whole.engines) == 2
    assert [each.name for each in whole.slowest] == ["older", HOSTILE]
    assert "max_live" in whole.cap_reason and "kv_use" in whole.cap_reason
    assert together([]) == Snapshot()
