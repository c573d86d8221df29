"""Standard output that fails or has few characters."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from k25_train.terminal import PLAIN, ClosedPipeError, Output, tolerant_output
from tests.helpers.project_sources import REPO


def test_other_characters_take_the_place_of_those_that_an_encoding_lacks() -> None:
    text = "┌─┐ │ ┃ ╭ … 2×3 → a—b ü 😀 \udcff"
    assert text.encode("ascii", PLAIN) == b"+-+ | | + ... 2x3 -> a-b \\xfc \\U0001f600 \\udcff"
    assert "ü \ud83d".encode("utf-8", PLAIN) == "ü \\ud83d".encode()


class Broken(io.StringIO):
    """A stream that refuses until it is told not to."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error: OSError | None = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


def test_what_goes_on_says_so_once_and_prints_again(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Broken(OSError(28, "No space left on device"))
    output = Output(stream, "stdout", goes_on=True)
    for line in ("a", "b"):
        print(line, file=output)
    stream.error = None
    print("c", file=output)
    assert stream.getvalue() == "c\n"
    assert capsys.readouterr().err.count("stdout cannot be written") == 1


def test_what_exists_to_print_ends() -> None:
    with pytest.raises(ClosedPipeError):
        print("a", file=Output(Broken(BrokenPipeError(32, "Broken pipe")), "stdout", goes_on=False))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_streams_that_python_has_none_of(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, name, None)
    with tolerant_output(goes_on=False):
        print("a", file=getattr(sys, name))
    assert getattr(sys, name) is None


COMMAND = """
import sys
from k25_train.entry import run_command
def body():
    for number in range(20_000):
        print(number, "…")
    print("done", file=sys.stderr)
run_command(body, output_goes_on=sys.argv[1] == "on")
"""


@pytest.mark.parametrize(
    ("mode", "redirect", "status", "words"),
    [
        ("off", "| head -1; exit ${PIPESTATUS[0]}", 141, ""),
        ("on", "| head -1; exit ${PIPESTATUS[0]}", 0, "stdout cannot be written ([Errno 32] Broken pipe)"),
        ("off", "> /dev/full", 2, "MachineError: stdout: cannot be written"),
        ("on", "> /dev/full", 0, "done"),
        ("off", ">&-", 0, "done"),
        ("on", "2>&- > /dev/null", 0, ""),
    ],
)
def test_a_process_ends_as_it_should(
    tmp_path: Path, mode: str, redirect: str, status: int, words: str
) -> None:
    script = tmp_path / "command.py"
    script.write_text(COMMAND, encoding="utf-8")
    line = f"PYTHONPATH={REPO} PYTHONIOENCODING=ascii {sys.executable} {script} {mode} {redirect}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == status, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
