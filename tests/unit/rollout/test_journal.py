"""A journal keeps what it has acknowledged, whatever ends its writer, and no more than is needed."""

import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest

from k25_train.environments.base import scored, unscored
from k25_train.errors import RolloutError
from k25_train.rollout.journal import Journal, journal_files, read_state
from k25_train.rollout.journal_state import JournalState, admitted, base, consumed, grouped
from k25_train.rollout.records import Record, records_in
from k25_train.rollout.response_records import judged
from k25_train.rollout.turns import Place
from tests.helpers.made_groups import extended, group, segment, stopped


def whole_group(journal: Journal, number: int) -> None:
    journal.append(admitted(group(number)))
    for sample in range(2):
        journal.append(extended(number, sample, 0, segment([number, sample])))
        journal.append(stopped(number, sample))
        journal.append(judged(number, sample, scored(0.5, {"accuracy": 0.5})))
    journal.append(grouped(number))


def same(first: JournalState, second: JournalState) -> bool:
    def told(state: JournalState) -> object:
        return state.num_admitted, [
            (
                each.number,
                each.task,
                [(r.token_ids.tolist(), r.logprobs.tolist(), r.versions.tolist(), r.verdict, r.ended,
                  r.num_segments, r.last_round, r.round_tokens) for r in each.responses],
            )
            for each in state.open.values()
        ]  # fmt: skip

    return told(first) == told(second)


def test_what_was_appended_is_there_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    whole_group(journal, 0)
    journal.append(admitted(group(1)))
    journal.append(extended(1, 0, 0, segment([5, 6], ends=False, number_of_round=4)))
    journal.append(extended(1, 0, 1, segment([7], version=4, number_of_round=5, after=Place(0, 4))))
    journal.flush()
    again = read_state(tmp_path)
    assert same(journal.state, again)
    response = again.open[1].responses[0]
    assert response.token_ids.tolist() == [5, 6, 7]
    assert response.versions.tolist() == [3, 3, 4]
    assert response.logprobs.dtype == np.float32
    assert again.open[0].is_complete and not again.open[1].is_complete
    journal.close()


def test_flushed_records_are_on_disk_and_others_soon(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    whole_group(journal, 0)
    journal.flush()
    assert len(read_state(tmp_path).open) == 1
    journal.append(admitted(group(1)))
    journal.close()
    assert read_state(tmp_path).num_admitted == 2


@pytest.mark.parametrize("cut", [1, 3, 9, 20])
def test_a_torn_end_is_cut_off_and_told(cut: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    whole_group(journal, 0)
    journal.append(admitted(group(1)))
    journal.close()
    (path,) = journal_files(tmp_path)
    os.truncate(path, path.stat().st_size - cut)
    notices: list[str] = []
    journal = Journal(tmp_path, notice=notices.append)
    assert journal.state.num_admitted == 1
    assert len(notices) == 1 and "cut short by a kill" in notices[0] and str(path) in notices[0]
    journal.append(admitted(group(1)))
    journal.close()
    assert read_state(tmp_path).num_admitted == 2, "what comes next is behind whole records"


def test_zeros_at_the_end_are_a_power_cut(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    whole_group(journal, 0)
    journal.close()
    (path,) = journal_files(tmp_path)
    with path.open("ab") as file:
        file.write(bytes(100))
    Journal(tmp_path).close()
    assert len(read_state(tmp_path).open) == 1


def test_a_damaged_record_that_others_follow_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    whole_group(journal, 0)
    journal.append(admitted(group(1)))
    journal.close()
    (path,) = journal_files(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(RolloutError, match=r"000000.log: damaged at byte \d+ of"):
        Journal(tmp_path)


def test_records_count_once_however_often_they_are_read() -> None:
    state = JournalState()
    records = [
        base(0),
        admitted(group(0)),
        extended(0, 0, 0, segment([1, 2])),
        stopped(0, 0),
        judged(0, 0, scored(1.0, {})),
        extended(0, 1, 0, segment([3])),
        stopped(0, 1),
        judged(0, 1, scored(0.0, {})),
    ]
    for record in [*records, *records[1:]]:
        state.apply(record)
    assert [r.token_ids.tolist() for r in state.open[0].responses] == [[1, 2], [3]]
    state.apply(judged(0, 0, scored(0.25, {})))
    assert state.open[0].rewards().tolist() == [1.0, 0.0], "the first verdict with a reward counts"


def test_an_unscored_verdict_makes_way_for_a_score() -> None:
    state = JournalState()
    for record in [base(0), admitted(group(0, size=1)), extended(0, 0, 0, segment([1])), stopped(0, 0)]:
        state.apply(record)
    state.apply(judged(0, 0, unscored("offline: x")))
    verdict = state.open[0].responses[0].verdict
    assert verdict is not None and math.isnan(verdict.reward) and not state.open[0].is_complete
    state.apply(judged(0, 0, scored(1.0, {})))
    assert state.open[0].is_complete


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (admitted(group(3)), "group 3 follows group 0"),
        (extended(0, 0, 1, segment([1])), "segment 1 follows segment -1"),
        (extended(7, 0, 0, segment([1])), "group 7, which was not admitted"),
        (Record({"kind": "surprise"}), "kind 'surprise'"),
        (Record({"kind": "judged", "group": 0, "sample": 0, "verdict": {}}), "makes no sense"),
        (extended(0, 9, 0, segment([1])), "makes no sense"),
    ],
)
def test_what_cannot_follow_is_named(record: Record, words: str) -> None:
    state = JournalState()
    for each in (base(0), admitted(group(0))):
        state.apply(each)
    with pytest.raises(RolloutError, match=words):
        state.apply(record)


def test_a_group_is_given_to_one_step_alone() -> None:
    state = JournalState()
    for each in (base(0), admitted(group(0)), admitted(group(1)), consumed(1, (0,))):
        state.apply(each)
    state.apply(consumed(1, (0,)))
    assert state.num_consumed == 1
    with pytest.raises(RolloutError, match=r"step 2 would be given groups \[0\]"):
        state.apply(consumed(2, (0, 1)))


def test_a_step_that_lost_its_file_has_consumed_nothing() -> None:
    state = JournalState(has_data=lambda step: step != 1)
    for each in (base(0), admitted(group(0)), admitted(group(1)), consumed(1, (0,)), consumed(2, (1,))):
        state.apply(each)
    assert list(state.open) == [0]


class TestFiles:
    """The journal grows by files, and old ones go."""

    @staticmethod
    def journal(folder: Path) -> Journal:
        return Journal(folder, file_bytes=600)

    def test_many_files_are_one_journal(self, tmp_path: Path) -> None:
        journal = self.journal(tmp_path)
        for number in range(6):
            whole_group(journal, number)
        journal.flush()
        assert journal.num_files > 3
        assert same(journal.state, read_state(tmp_path))
        journal.close()
        again = self.journal(tmp_path)
        assert same(journal.state, again.state) and again.num_files == journal.num_files
        again.close()

    def test_files_go_once_a_kept_checkpoint_is_behind_their_groups(self, tmp_path: Path) -> None:
        journal = self.journal(tmp_path)
        for number in range(6):
            whole_group(journal, number)
            journal.append(consumed(number + 1, (number,)))
        assert not journal.prune(0), "a run may go back to its beginning"
        before = journal.num_files
        assert journal.prune(3) and journal.num_files < before
        whole_group(journal, 6)
        journal.flush()
        kept = read_state(tmp_path)
        assert same(journal.state, kept) and list(kept.open) == [6] and kept.num_admitted == 7
        journal.close()
        # Steps from 4 on could lose their files, and be made again.
        again = read_state(tmp_path, has_data=lambda step: step <= 3)
        assert list(again.open) == [3, 4, 5, 6] and all(again.open[each].is_complete for each in (3, 4, 5))

    def test_a_group_that_is_under_way_keeps_its_file(self, tmp_path: Path) -> None:
        journal = self.journal(tmp_path)
        journal.append(admitted(group(0)))
        for number in range(1, 6):
            whole_group(journal, number)
            journal.append(consumed(number, (number,)))
        assert not journal.prune(5)
        journal.close()

    def test_memory_is_that_of_open_groups(self, tmp_path: Path) -> None:
        journal = self.journal(tmp_path)
        for number in range(50):
            whole_group(journal, number)
            journal.append(consumed(number + 1, (number,)))
            journal.prune(number)
        assert not journal.state.open and len(journal.state.consumed) <= 2 and journal.num_files <= 3
        journal.close()


def test_a_disk_that_is_full_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.flush()
    (path,) = journal_files(tmp_path / "journal")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("k25_train.rollout.journal._finish", full)
        journal.append(admitted(group(0)))
        with pytest.raises(RolloutError, match=r"cannot be written.*No space left.*make room"):
            journal.flush()
    journal.close()


def test_nobody_waits_for_a_journal_that_is_not_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.flush()

    def broken(*_: object) -> None:
        raise MemoryError("no room for a batch")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("k25_train.rollout.journal._finish", broken)
        journal.append(admitted(group(0)))
        with pytest.raises(RolloutError, match=r"cannot be written \(no room for a batch\)"):
            journal.flush()
    journal.close()
    closed = Journal(tmp_path / "other")
    closed.close()
    with pytest.raises(RolloutError, match="is closed"):
        closed.append(admitted(group(0)))


def test_a_power_cut_takes_no_new_file_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    really = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    folder = tmp_path / "journal"
    journal = Journal(folder, file_bytes=1)
    journal.append(admitted(group(0)))
    journal.close()
    assert len(journal_files(folder)) > 1
    assert synced.count(str(folder)) == len(journal_files(folder))


def test_a_record_is_what_its_bytes_say() -> None:
    record = extended(4, 1, 0, segment([1, 2, 3]))
    data = record.to_bytes()
    ((read, stop),) = records_in(data)
    assert stop == len(data) and dict(read.header) == dict(record.header)
    assert all((read.arrays[name] == array).all() for name, array in record.arrays.items())
    assert int.from_bytes(data[4:8], "little") == zlib.crc32(data[8:])


def test_journals_of_single_turns_still_read() -> None:
    """Before there were branches, each segment had the prompt, and ended its response by itself."""
    state = JournalState()
    for each in (base(0), admitted(group(0))):
        state.apply(each)
    for number, (tokens, reason) in enumerate((([5, 6], "aborted"), ([7], "stop"))):
        header = {
            "kind": "segment", "group": 0, "sample": 0, "segment": number, "round": number,
            "spans": [[3, 0, len(tokens)]], "finish_reason": reason,
        }  # fmt: skip
        arrays = {"prompt_ids": [9, 8], "token_ids": tokens}
        kept = {name: np.array(value, np.int32) for name, value in arrays.items()}
        state.apply(Record(header, {**kept, "logprobs": np.zeros(len(tokens), np.float32)}))
    response = state.open[0].responses[0]
    assert response.branches[0].token_ids.tolist() == [9, 8, 5, 6, 7]
    assert response.token_ids.tolist() == [5, 6, 7] and response.num_turns == 1
    assert response.ended is not None and response.ended.value == "stop"
