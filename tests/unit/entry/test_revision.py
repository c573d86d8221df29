"""Which code this is: by git, by what an image recorded, and that changes are noticed."""

import subprocess
import sys
from pathlib import Path

import pytest

from k25_train.errors import ConfigError
from k25_train.revision import CODE, code_digest, code_version, record
from tests.helpers.project_sources import REPO

COMMIT = "0123456789" * 4


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A folder of code without git."""
    for folder in CODE:
        (tmp_path / folder / "deep").mkdir(parents=True)
        (tmp_path / folder / "deep" / "a.py").write_text("a = 1\n")
    return tmp_path


def test_a_recorded_revision_is_told(image: Path) -> None:
    assert code_version(image) == f"not a git checkout: {image}"
    record(image, COMMIT)
    assert code_version(image) == COMMIT
    record(image, f"{COMMIT}, with local changes")
    assert code_version(image) == f"{COMMIT}, with local changes"


@pytest.mark.parametrize("change", ["content", "new", "gone", "renamed", "conf"])
def test_changes_since_are_noticed(change: str, image: Path) -> None:
    record(image, COMMIT)
    path = image / "launch" / "deep" / "a.py"
    match change:
        case "content":
            path.write_text("a = 2\n")
        case "new":
            (image / "conf" / "cluster.yaml").write_text("")
        case "gone":
            path.unlink()
        case "renamed":
            path.rename(path.with_name("b.py"))
        case "conf":
            (image / "conf" / "deep" / "a.py").write_text("a = 1")
    assert code_version(image) == f"{COMMIT}, with local changes"


def test_what_python_and_runs_write_is_no_change(image: Path) -> None:
    record(image, COMMIT)
    (image / "launch" / "__pycache__").mkdir()
    (image / "launch" / "__pycache__" / "a.pyc").write_bytes(b"x")
    (image / "runs").mkdir()
    (image / "runs" / "x").write_text("y")
    assert code_version(image) == COMMIT


def test_git_is_believed_where_it_is(image: Path) -> None:
    """A file that was left behind by an earlier build says nothing of a checkout."""
    record(image, "an old one")
    git = ["git", "-C", str(image), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "a"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    assert code_version(image) == head
    (image / "conf" / "mine.yaml").write_text("a: 1")
    assert code_version(image) == f"{head}, with local changes"


@pytest.mark.parametrize("text", ["", "one line", "a\nb\nc\n"])
def test_a_damaged_record_is_named(text: str, image: Path) -> None:
    (image / "REVISION").write_text(text)
    assert code_version(image).startswith(f"unknown: {image / 'REVISION'} cannot be read")


@pytest.mark.parametrize("revision", ["", " ", "a\nb"])
def test_an_empty_revision_is_refused(revision: str, image: Path) -> None:
    with pytest.raises(ConfigError, match=r"docker/build\.sh"):
        record(image, revision)


def test_names_are_part_of_the_digest(image: Path) -> None:
    """Moving a boundary between name and content, or between files, gives another digest."""
    before = code_digest(image)
    (image / "conf" / "b").write_text("c")
    with_b = code_digest(image)
    (image / "conf" / "b").rename(image / "conf" / "bc")
    (image / "conf" / "bc").write_text("")
    assert len({before, with_b, code_digest(image)}) == 3


def test_the_command_prints_it() -> None:
    command = [sys.executable, "-m", "launch.revision"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == code_version(REPO)
