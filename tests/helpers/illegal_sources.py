"""Every way to break a rule of the data's sources and of their mixture."""

from collections.abc import Callable

from tests.helpers.legal_config import Broken, Legal, Values

SCHEDULED, MORE = "data.schedule.late", "data.sources.more"


def changed(changes: Values, key: str, rule: str) -> Callable[[Legal], Broken]:
    """Overrides that are wrong together."""
    return lambda legal: (changes, key, rule)


def slow_reads(legal: Legal) -> Broken:
    """Each number alone is one that somebody could want."""
    workers = legal.pick([0, 2])
    changes = {"data.read_in": "process", "data.workers": workers, "data.read_timeout_s": 50}
    changes["train.stall_timeout_s"] = 400 if workers else 150
    return changes, "data.read_timeout_s", "has to end before train.stall_timeout_s"


SOURCE_BREAKS: dict[str, Callable[[Legal], Broken]] = {
    "weights": changed(
        {f"data.sources.{kind}.weight": 0 for kind in ("text", "caption", "ocr", "video")},
        "data.sources",
        "need at least one with a positive weight",
    ),
    "kinds elsewhere": changed(
        {f"{MORE}.format": "chat", f"{MORE}.path": "x", f"{MORE}.kinds": "[text]"},
        f"{MORE}.kinds",
        "are only for format=shards",
    ),
    "workers of a thread": changed(
        {"data.read_in": "thread", "data.workers": 2}, "data.workers", "needs data.read_in=process"
    ),
    "reads slower than a stall": slow_reads,
    "held out twice": changed(
        {"data.sources.text.heldout": 5}, "data.sources.text.heldout", "is not for format=shards"
    ),
    "schedule of no source": changed(
        {f"{SCHEDULED}.from_step": 3, f"{SCHEDULED}.weights": "{vidoe: 1}"},
        f"{SCHEDULED}.weights.vidoe",
        "is none of data.sources: text",
    ),
    "schedule from no step": changed(
        {f"{SCHEDULED}.from_step": 0}, f"{SCHEDULED}.from_step", "must be positive"
    ),
    "schedule twice": changed(
        {f"{SCHEDULED}.from_step": 9, "data.schedule.later.from_step": 9},
        "data.schedule.later.from_step",
        "is the first step of late, too",
    ),
}
