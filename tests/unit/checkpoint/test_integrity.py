"""A checkpoint that is not what was written is refused by name, with advice that destroys nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from k25_train.checkpoint import publish as publishing
from k25_train.checkpoint.integrity import changed_files, entry_of, verify
from k25_train.checkpoint.manifest import FileEntry, Manifest, read_manifest
from k25_train.checkpoint.publish import check_complete, publish
from k25_train.errors import CheckpointError
from tests.helpers.written_checkpoints import CONFIG_YAML, FACTS, RANK_FILES, fill_partial, write_checkpoint


def edited(key: str, value: object) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | {key: value})


@pytest.fixture
def step_20(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path, 10)
    return write_checkpoint(tmp_path, 20)


def test_a_published_checkpoint_is_whole(step_20: Path) -> None:
    manifest = verify(step_20)

    assert manifest == read_manifest(step_20)
    assert (manifest.step, manifest.is_sound, manifest.facts) == (20, True, FACTS)
    assert set(manifest.files) == {*RANK_FILES, ".metadata", "metadata.json", "config.yaml"}
    assert (step_20 / "config.yaml").read_text() == CONFIG_YAML
    assert changed_files(step_20, manifest.files, 0, 1) == []


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp", "config.yaml", "metadata.json"])
def test_a_missing_file_is_named_with_the_remedy(name: str, step_20: Path) -> None:
    (step_20 / name).unlink()

    with pytest.raises(CheckpointError) as raised:
        verify(step_20)

    assert f"{step_20 / name} is missing" in str(raised.value)
    assert f"mv {step_20} {step_20}.damaged) to resume from {step_20.parent}/step_10" in str(raised.value)
    assert "delete" not in str(raised.value)


def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    os.truncate(folder / "__0_0.distcp", 7)

    with pytest.raises(
        CheckpointError, match=r"__0_0\.distcp has 7 bytes instead of 120.* start from scratch"
    ):
        verify(folder)


def test_the_advice_names_no_other_that_is_damaged_or_unsound(step_20: Path) -> None:
    write_checkpoint(step_20.parent, 12)
    write_checkpoint(step_20.parent, 14, why_unsound="bad")
    (step_20.parent / "step_12/__0_0.distcp").unlink()
    (step_20 / "__0_0.distcp").unlink()

    with pytest.raises(CheckpointError, match=f"to resume from {step_20.parent}/step_10, which is whole"):
        verify(step_20)


@pytest.mark.parametrize("name", [*RANK_FILES, ".metadata", "metadata.json", "config.yaml"])
def test_changed_content_is_named_by_the_rank_whose_share_it_is(name: str, step_20: Path) -> None:
    content = bytearray((step_20 / name).read_bytes())
    content[-1] ^= 1
    (step_20 / name).write_bytes(content)
    files = read_manifest(step_20).files

    found = [changed_files(step_20, files, share, 3) for share in range(3)]

    assert [each for share in found for each in share] == [
        f"{step_20 / name}: its content changed since it was saved"
    ]


def test_losses_to_compare_with_are_those_of_the_run_and_no_others(tmp_path: Path) -> None:
    """A resumed run is judged as if it had not ended; what was accepted by hand starts over."""
    from k25_train.checkpoint.checking import losses_before

    folder = write_checkpoint(tmp_path, 10, losses=[2.5, 0.1, 1 / 3])
    assert verify(folder).losses == [2.5, 0.1, 1 / 3]
    assert losses_before(folder, FACTS) == losses_before(folder, {}) == [2.5, 0.1, 1 / 3]
    assert losses_before(folder, FACTS | {"data.tokenizer": "another"}) == []
    assert losses_before(write_checkpoint(tmp_path, 20, "its loss was 30", losses=[2.5]), FACTS) == []


def test_a_file_of_another_step_with_the_same_size_is_found(tmp_path: Path) -> None:
    first, second = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2)
    (first / "config.yaml").write_text(CONFIG_YAML.replace("7", "8"))
    shutil.copy(first / "config.yaml", second / "config.yaml")
    with pytest.raises(CheckpointError, match=r"config\.yaml: its content changed since it was saved"):
        verify(second)


def test_a_file_that_cannot_be_read_is_named(step_20: Path) -> None:
    files = verify(step_20).files
    (step_20 / "__0_0.distcp").unlink()
    (found,) = changed_files(step_20, files, 0, 1)
    assert found.startswith(f"{step_20}/__0_0.distcp cannot be read (")


BROKEN: dict[str, Callable[[str], str]] = {
    "empty": lambda _: "",
    "half": lambda text: text[: len(text) // 2],
    "a list": lambda _: "[1]",
    "no format": lambda _: '{"step": 10}',
    "no files": lambda _: '{"format_version": 1, "step": 10}',
    "sizes of the first format that are none": lambda _: '{"format_version": 1, "file_bytes": {"a": "1"}}',
    "a later format": edited("format_version", 99),
    "another step": edited("step", 21),
    "made sound": edited("sound", True),
    "no reason": edited("why_unsound", ""),
    "other facts": edited("facts", {}),
    "fewer files": edited("files", {}),
    "deeply nested": lambda _: "[" * 100_000,
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_or_edited_manifest_is_named(case: str, tmp_path: Path) -> None:
    manifest = write_checkpoint(tmp_path, 10, why_unsound="bad") / "manifest.json"
    manifest.write_text(BROKEN[case](manifest.read_text()))

    with pytest.raises(CheckpointError, match=r"manifest\.json: missing or unreadable"):
        verify(manifest.parent)


def test_a_foreign_manifest_cannot_point_elsewhere(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, 10)
    for name in ("../secret", "/etc/passwd", "a/../../b"):
        outside = Manifest(step=10, files={name: FileEntry(1, "")}, facts={})
        (folder / "manifest.json").write_text(outside.to_text())
        with pytest.raises(CheckpointError, match="is not a file of the checkpoint"):
            verify(folder)


@pytest.mark.parametrize("name", ["common.pt", "__0.metadata"])
def test_files_that_a_loader_would_read_must_be_listed(name: str, step_20: Path) -> None:
    (step_20 / "notes.txt").touch()
    assert verify(step_20).step == 20
    (step_20 / name).touch()
    with pytest.raises(CheckpointError, match=f"{name} is not a file of this checkpoint"):
        verify(step_20)


def test_a_renamed_checkpoint_is_found_out(step_20: Path) -> None:
    renamed = step_20.rename(step_20.with_name("step_30"))
    with pytest.raises(CheckpointError, match="holds step 20: it was renamed"):
        verify(renamed)
    # Away from a run any name will do.
    assert verify(renamed.rename(renamed.with_name("best"))).step == 20


def test_the_first_format_is_read_without_checksums(step_20: Path) -> None:
    sizes = {name: file.num_bytes for name, file in verify(step_20).files.items()}
    (step_20 / "manifest.json").write_text(
        json.dumps({"format_version": 1, "step": 20, "file_bytes": sizes}, indent=1)
    )
    manifest = verify(step_20)
    assert (manifest.step, manifest.is_sound, manifest.has_checksums) == (20, True, False)
    assert changed_files(step_20, manifest.files, 0, 1) == []


def test_what_is_no_checkpoint_is_told_with_what_it_holds(tmp_path: Path) -> None:
    root = tmp_path / "run/checkpoints"
    (tmp_path / "new_run/checkpoints").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    for step in (10, 20):
        write_checkpoint(root, step)
    write_checkpoint(root, 31, why_unsound="bad")
    write_checkpoint(tmp_path / "ruined/checkpoints", 4, why_unsound="bad")
    (tmp_path / "file").touch()
    (root / "step_30.partial").mkdir()
    holds = f"holds step_10, step_20, step_31.unsound (unsound): name one, as {root}/step_20"
    expected = {
        "run": f"{tmp_path}/run is not a checkpoint; it {holds}",
        "run/checkpoints": f"{root} is not a checkpoint; it {holds}",
        "run/checkpoints/step_11": f"step_11: no such checkpoint; {root} {holds}",
        "run/checkpoints/step_30.partial": f"step_30.partial was never completed: the run ended while it was "
        f"saved; {root} {holds}",
        "ruined": f"holds step_4.unsound (unsound): name one, as {tmp_path}/ruined/checkpoints/step_4",
        "new_run": f"{tmp_path}/new_run is not a checkpoint; it holds none",
        "photos": f"{tmp_path}/photos is not a checkpoint: it has no manifest.json",
        "file": f"{tmp_path}/file is a file, not the folder of a checkpoint",
        "nowhere": f"{tmp_path}/nowhere: no such checkpoint; {tmp_path} holds none",
    }
    for name, text in expected.items():
        with pytest.raises(CheckpointError) as raised:
            verify(tmp_path / name)
        assert text in str(raised.value)
        assert "delete" not in str(raised.value)


# Before it gets its name ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("gone", "but the first rank does not see it: the place of the checkpoints must be one"),
        ("cut", "a rank wrote 36 bytes, but the first rank sees 5 bytes"),
    ],
)
def test_what_lacks_a_file_is_not_published(
    fault: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "PATIENCE_S", 0.0)
    good, partial = write_checkpoint(tmp_path, 2), fill_partial(tmp_path, 3)
    written = {name: entry_of(partial / name) for name in RANK_FILES}
    check_complete(partial, written)
    if fault == "gone":
        (partial / "__1_0.distcp").unlink()
    else:
        os.truncate(partial / "__1_0.distcp", 5)

    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: ") as raised:
        publish(tmp_path, partial, Manifest(step=3, files=written, facts={}), {"config.yaml": ""})

    assert told in str(raised.value)
    assert not (tmp_path / "step_3").exists()
    assert verify(good).step == 2


def test_a_complete_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    before = (write_checkpoint(tmp_path, 3) / "__0_0.distcp").stat()

    with pytest.raises(CheckpointError, match="step_3 is there already, and stays: see that no other job"):
        write_checkpoint(tmp_path, 3)

    assert (tmp_path / "step_3/__0_0.distcp").stat() == before


def test_a_damaged_or_unsound_one_makes_way_and_stays_aside(tmp_path: Path) -> None:
    (write_checkpoint(tmp_path, 3) / "__0_0.distcp").unlink()
    write_checkpoint(tmp_path, 4, why_unsound="bad").rename(tmp_path / "step_4")

    for step in (3, 4):
        assert verify(write_checkpoint(tmp_path, step)).is_sound

    left = sorted(path.name for path in tmp_path.glob("step_*"))
    assert left == ["step_3", "step_3.damaged", "step_4", "step_4.unsound"]
