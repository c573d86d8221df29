"""Any number of traces by seed, made by many workers, as files of JSON lines.

    OUT/train/traces-00000.jsonl      conversations of the numbers 0 to 499, in order
    OUT/heldout/traces-00000.jsonl    those of them that are held out
    OUT/parts/00000.json              what was made of them; appears last

A part depends on the options and its numbers alone. A command that is interrupted goes on with the parts
that are missing, and one that asks for more adds to what is there.
"""

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from k25_train.data.traces.conversation import TraceOptions, make_trace
from k25_train.data.traces.families.registry import FAMILIES
from k25_train.data.traces.session import Session
from k25_train.errors import DataError

PART_TRACES = 500
"""Numbers of one part. Our choice: a part takes seconds to make and a few megabytes."""
SPLITS = ("train", "heldout")

Progress = Callable[[int, int], None]
"""Called with (numbers done, numbers)."""


@dataclass(frozen=True, slots=True)
class Counts:
    """What was made."""

    written: dict[str, int]
    """Split -> traces."""
    by_family: dict[str, int]
    discarded: dict[str, int]
    """Reason -> traces that were thrown away."""


def generate(options: TraceOptions, count: int, out: Path, workers: int, progress: Progress) -> Counts:
    """Make the traces of the numbers 0 to `count` - 1, as far as they are not there.

    `workers`: processes, 0 for this one. Raises DataError for options that are out of range, a folder of
    other options, and one that cannot be written.
    """
    _check(options, count, workers)
    try:
        for folder in (*SPLITS, "parts"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be made ({error}). Choose another folder with --out.") from error
    starts = range(0, count, PART_TRACES)
    parts = [range(start, min(start + PART_TRACES, count)) for start in starts]
    done: dict[int, Counts] = {}
    for number, traces in enumerate(parts):
        found = _made(options, out, number, len(traces))
        if found is not None:
            done[number] = found
    missing = {number: traces for number, traces in enumerate(parts) if number not in done}
    progress(sum(len(parts[number]) for number in done), count)
    for number, counts in _make_parts(options, out, missing, workers):
        done[number] = counts
        progress(sum(len(parts[each]) for each in done), count)
    return _sum(list(done.values()))


def _check(options: TraceOptions, count: int, workers: int) -> None:
    unknown = [name for name in options.families if name not in FAMILIES]
    if unknown or not options.families:
        known = ", ".join(FAMILIES)
        raise DataError(f"--family {' '.join(unknown)}: known families of traces are {known}.")
    if any(each not in (1, 2, 3) for each in options.difficulties) or not options.difficulties:
        raise DataError(f"--difficulty {options.difficulties}: is 1, 2 or 3.")
    for name, share in (("--slips", options.slips), ("--heldout", options.heldout)):
        if not 0 <= share <= 1:
            raise DataError(f"{name} {share}: is a share of the traces, from 0 to 1.")
    for name, least, number in (
        ("--count", 1, count),
        ("--seed", 0, options.seed),
        ("--workers", 0, workers),
    ):
        if number < least:
            raise DataError(f"{name} {number}: must be at least {least}.")


def _make_parts(
    options: TraceOptions, out: Path, missing: Mapping[int, range], workers: int
) -> Iterator[tuple[int, Counts]]:
    if workers == 0 or len(missing) < 2:
        for number, traces in missing.items():
            yield number, make_part(options, out, number, traces)
        return
    with ProcessPoolExecutor(min(workers, len(missing)), multiprocessing.get_context("spawn")) as pool:
        jobs = {
            pool.submit(make_part, options, out, number, traces): number for number, traces in missing.items()
        }
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def make_part(options: TraceOptions, out: Path, number: int, traces: range) -> Counts:
    """Make the part of a number, these traces, in a session of its own; it appears when it is complete."""
    written, by_family, discarded = Counter[str](), Counter[str](), Counter[str]()
    files = {split: out / split / f"traces-{number:05d}.jsonl" for split in SPLITS}
    partial = {split: path.with_suffix(".partial") for split, path in files.items()}
    with ExitStack() as stack:
        session = stack.enter_context(Session())
        streams = {
            split: stack.enter_context(open(path, "w", encoding="utf-8")) for split, path in partial.items()
        }
        for each in traces:
            trace = make_trace(options, each, session)
            if trace.conversation is None:
                discarded[trace.discarded] += 1
                continue
            split = SPLITS[trace.is_heldout]
            streams[split].write(json.dumps(trace.conversation, ensure_ascii=False) + "\n")
            written[split] += 1
            by_family[trace.conversation["trace"]["family"]] += 1
    for split, path in files.items():
        os.replace(partial[split], path)
    counts = Counts(dict(written), dict(by_family), dict(discarded))
    facts = {"options": asdict(options), "size": len(traces), "counts": asdict(counts)}
    place = _part_file(out, number)
    place.with_suffix(".partial").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    os.replace(place.with_suffix(".partial"), place)
    return counts


def _made(options: TraceOptions, out: Path, number: int, size: int) -> Counts | None:
    """What a part has that was made before; None for one that is missing or shorter than asked for."""
    place = _part_file(out, number)
    if not place.is_file():
        return None
    try:
        facts = json.loads(place.read_text(encoding="utf-8"))
        found, counts = facts["options"], Counts(**facts["counts"])
        made = int(facts["size"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{place}: not what a part of traces says ({error!r}). Delete it.") from error
    asked = json.loads(json.dumps(asdict(options)))
    differing = [f"{key}={found.get(key)}, not {asked[key]}" for key in asked if found.get(key) != asked[key]]
    if differing:
        raise DataError(
            f"{out}: has traces made with {'; '.join(differing)}. Choose another folder with --out, or "
            "the same options."
        )
    return counts if made == size else None


def _part_file(out: Path, number: int) -> Path:
    return out / "parts" / f"{number:05d}.json"


def _sum(all_counts: list[Counts]) -> Counts:
    names = ("written", "by_family", "discarded")
    sums = [sum((Counter(getattr(each, name)) for each in all_counts), Counter()) for name in names]
    return Counts(*(dict(each) for each in sums))
