"""Every command, with an output that cannot be written and with files that cannot be read."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest

import k25_train.plan.__main__ as plan
import launch.preflight.__main__ as preflight
import launch.slurm as slurm
import launch.status.__main__ as status
import launch.torchrun as torchrun
from k25_train import eval as evaluate
from k25_train import train
from k25_train.checkpoint import __main__ as checkpoint
from k25_train.checkpoint.manifest import Manifest
from k25_train.compose.resolve import compose, to_yaml
from k25_train.convert import __main__ as convert
from k25_train.data import __main__ as data
from k25_train.dryrun import __main__ as dryrun
from k25_train.errors import DataError
from k25_train.metrics import __main__ as metrics
from k25_train.recipes import needle, stages, vision_ratio
from k25_train.rl import __main__ as reinforce
from k25_train.rollout import __main__ as rollout
from launch import node, preflight_rank, rank, rendezvous, supervisor
from tests.helpers.in_process import status_of_command
from tests.helpers.project_sources import CODE, REPO, relative, source_files
from tests.helpers.smoke_mix import mix
from tests.helpers.stored_checkpoints import tiny_tensors, write_stored
from tests.helpers.tiny_shards import write_tiny_shard_set

Main = Callable[[], object]
SMALL = "experiment=smoke"
FOLDERS = (SMALL, "cluster=local_slurm")
LARGE = "experiment=k25_pretrain_4k"


@pytest.fixture(autouse=True)
def signals_are_as_before() -> Iterator[None]:
    """A supervisor handles them from its first line on; others of this process do not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small shard set."""
    return write_tiny_shard_set(tmp_path_factory.mktemp("data") / "tiny")


def run(main: Main, *arguments: str) -> int:
    """Run a command in this process; returns its exit status."""
    return status_of_command(main, *arguments)


@contextlib.contextmanager
def output_to(stream: TextIO) -> Iterator[None]:
    """Have this process print into a stream, which may fail."""
    before, sys.stdout = sys.stdout, stream
    try:
        yield
    finally:
        sys.stdout = before


PRINTING: dict[str, tuple[Main, list[str]]] = {
    "plan": (plan.main, [SMALL]),
    "plan in detail": (plan.main, [SMALL, "--details"]),
    "plan of activations": (plan.main, [LARGE, "--activations"]),
    "plan of the optimizer": (plan.main, [SMALL, "--optimizer"]),
    "plan as JSON": (plan.main, [SMALL, "--json"]),
    "plan of what might be": (plan.main, [SMALL, "--what-if", "slow-node"]),
    "plan's help": (plan.main, ["--help"]),
    "train's help": (train.command, ["--help"]),
    "rl's help": (reinforce.command, ["--help"]),
    "train's values": (train.command, [SMALL, "--cfg", "job", "model.name=ü→"]),
    "eval's help": (evaluate.main, ["--help"]),
    "dryrun's help": (dryrun.main, ["--help"]),
    "inspect": (data.main, ["inspect", "TINY", "--show", "1"]),
    "verify": (data.main, ["verify", "TINY"]),
    "data's help": (data.main, ["--help"]),
    "a checkpoint": (checkpoint.main, ["inspect", "CHECKPOINT"]),
    "two checkpoints": (checkpoint.main, ["diff", "CHECKPOINT", "CHECKPOINT", "--json"]),
    "a checkpoint's faults": (checkpoint.main, ["verify", "CHECKPOINT"]),
    "checkpoint's help": (checkpoint.main, ["--help"]),
    "convert's help": (convert.main, ["import", "--help"]),
    "a run": (metrics.main, ["watch", "RUN", "--once"]),
    "runs": (metrics.main, ["compare", "RUN", "RUN", "--json"]),
    "metrics' help": (metrics.main, ["compare", "--help"]),
    "serving's help": (rollout.main, ["serve", "--help"]),
    "status's help": (status.main, ["--help"]),
    "a chain": (stages.main, ["--commands"]),
    "stages' help": (stages.main, ["--help"]),
    "needle's help": (needle.main, ["--help"]),
    "vision ratio's help": (vision_ratio.main, ["--help"]),
    "submission": (slurm.main, [*FOLDERS, "--dry-run"]),
    "submission's help": (slurm.main, ["--help", "--dry-run"]),
}
"""Commands that exist to print."""


ONE_OF_EACH_WAY = ("plan", "plan's help", "train's help", "inspect")
"""Some that print by rich, by argparse and by themselves."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint."""
    return write_stored(tmp_path_factory.mktemp("checkpoints") / "step_5", tiny_tensors())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a few steps."""
    folder = tmp_path_factory.mktemp("run")
    rows = ({"step": step, "loss": 9.0 - step, "step_time_s": 1.0} for step in range(1, 5))
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


@pytest.fixture(params=PRINTING)
def printing(request: pytest.FixtureRequest, tiny: Path, stored: Path, told: Path) -> tuple[Main, list[str]]:
    """A command and its arguments."""
    main, arguments = PRINTING[request.param]
    places = {"TINY": str(tiny), "CHECKPOINT": str(stored), "RUN": str(told)}
    return main, [places.get(each, each) for each in arguments]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_encoding_will_do(printing: tuple[Main, list[str]], encoding: str) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with output_to(terminal):
        # What `verify` finds ends it with 1.
        assert run(printing[0], *printing[1]) in (0, 1)
    terminal.seek(0)
    assert len(terminal.read()) > 100


@pytest.mark.parametrize("printing", ONE_OF_EACH_WAY, indirect=True)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_named(printing: tuple[Main, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    full = open("/dev/full", "w", encoding="utf-8")  # noqa: SIM115
    with output_to(full):
        assert run(printing[0], *printing[1]) == 2
    error = capsys.readouterr().err
    assert "MachineError: stdout: cannot be written" in error and "ENOSPC" in error
    assert "Traceback" not in error
    with contextlib.suppress(OSError):
        full.close()


@pytest.mark.parametrize("printing", ONE_OF_EACH_WAY, indirect=True)
def test_a_reader_that_leaves_ends_it_in_silence(
    printing: tuple[Main, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    pipe = open(write, "w", encoding="utf-8")  # noqa: SIM115
    with output_to(pipe):
        assert run(printing[0], *printing[1]) == 141
    assert capsys.readouterr().err == ""
    with contextlib.suppress(OSError):
        pipe.close()


NONE, FILE, FOLDER, LOOP = "NONE", "FILE", "FOLDER", "LOOP"
"""Stand for a path to nothing, to a file of bytes, to an empty folder, and for a link to itself."""
UNREADABLE: list[tuple[Main, list[str], str]] = [
    (train.command, ["--config", NONE], "No such file"),
    (train.command, ["--config", FOLDER], "Is a directory"),
    (train.command, ["--config", LOOP], "symbolic links"),
    (train.command, ["--config", FILE], "is not UTF-8"),
    (train.command, ["--config"], "--config: is not followed by a value"),
    (train.command, [SMALL, "--cfg", "hydra"], "--cfg hydra"),
    (train.command, ["experiment=rl_smoke"], "start it with `python -m k25_train.rl` (k25-rl)"),
    (reinforce.command, [SMALL], "algorithm: is not given, so there is nothing to reinforce"),
    (evaluate.main, ["checkpoint="], "checkpoint=: must name a checkpoint"),
    (evaluate.main, [f"checkpoint={NONE}"], NONE),
    (convert.main, ["import", NONE, "out"], NONE),
    (evaluate.main, [f"checkpoint={FILE}"], FILE),
    (evaluate.main, [f"checkpoint={FOLDER}"], FOLDER),
    (evaluate.main, [f"checkpoint={LOOP}"], LOOP),
    (plan.main, ["experiment=none"], "is not a choice of experiment"),
    (plan.main, [SMALL, "--train.steps=7"], "here train.steps=7"),
    (plan.main, [SMALL, "--html", FOLDER], "--html FOLDER: is a folder"),
    (plan.main, [SMALL, "--perfetto", f"{NONE}/step.json"], "--perfetto NONE/step.json: NONE is no folder"),
    (plan.main, [SMALL, "--html", LOOP], "LOOP: cannot be written: Too many levels of symbolic links"),
    (plan.main, [SMALL, "--html", FILE, "--optimizer"], "--html FILE: is of one whole plan: leave"),
    (plan.main, [SMALL, "--vision-share", "1.5"], "--vision-share=1.5"),
    (plan.main, [SMALL, "--what-if", "weather"], "--what-if=weather"),
    (plan.main, ["calibrate", NONE], NONE),
    (dryrun.main, [SMALL, "-m"], "sweeps are not done"),
    (dryrun.main, ["experiment=smoke", "train.steps"], "here train.steps=VALUE"),
    (data.main, ["inspect", NONE], NONE),
    (data.main, ["inspect", FILE], FILE),
    (data.main, ["inspect", FOLDER], FOLDER),
    (data.main, ["inspect", LOOP], LOOP),
    *(
        (checkpoint.main, [command, where], where)
        for command in ("inspect", "verify", "prune")
        for where in (NONE, FILE, FOLDER, LOOP)
    ),
    (checkpoint.main, ["diff", NONE, FOLDER], NONE),
    (data.main, ["build", "--out", f"{FILE}/set"], "FILE"),
    (slurm.main, [*FOLDERS, f"run.dir={FILE}/run"], "FILE"),
    (preflight.main, [SMALL, "--report", f"{FILE}/report"], "FILE"),
    (preflight.main, ["--config", FOLDER], "Is a directory"),
    (supervisor.main, [], "0 arguments were given, expected RUN_FOLDER"),
    (supervisor.main, [FOLDER], "SLURM_JOB_ID is not set"),
    (node.main, [FOLDER, "1"], "2 arguments were given, expected RUN_FOLDER ATTEMPT"),
    (node.main, [FOLDER, "1", "2", "h", "1"], "FOLDER/submit.json: No such file"),
    (rank.main, [FOLDER], "RANK is not set"),
    (preflight_rank.main, [], "0 arguments were given"),
    (rendezvous.main, [], "0 arguments were given, expected FIRST_PORT"),
    (status.main, [FILE], "FILE: is not the folder of a run"),
    (status.main, [FOLDER], "FOLDER: is not the folder of a run"),
    (status.main, [LOOP, "--json"], "LOOP: is not the folder of a run"),
    *((metrics.main, ["watch", where, "--once"], where) for where in (NONE, FOLDER, LOOP)),
    (metrics.main, ["watch", f"{FILE}/metrics.jsonl", "--once"], "is not there yet"),
    (metrics.main, ["watch", "nonsense://x", "--once"], "nonsense://x/metrics.jsonl: no file system"),
    (metrics.main, ["watch", FOLDER, "--interval", "0"], "--interval 0: must be within"),
    *((metrics.main, ["compare", where], where) for where in (NONE, FOLDER, LOOP)),
    (metrics.main, ["compare", FOLDER, "--png", "x.jpg"], "--png x.jpg: must end in .png"),
    (rollout.main, ["serve", FOLDER, "--python", NONE], "--engine vllm: NONE is not there"),
    *(
        (rollout.main, ["serve", where, "--engine", "in_process"], f"{where}: neither a checkpoint")
        for where in (NONE, FILE, FOLDER, LOOP)
    ),
    (stages.main, ["chain=none"], "is not a chain"),
    (stages.main, [f"chain={NONE}.yaml"], "NONE.yaml"),
    (stages.main, ["--from", "nothing", "--explain"], "--from: is for training"),
    (stages.main, ["lm.train.steps=0"], "stage lm"),
    (needle.main, ["checkpoint=x", f"data={FOLDER}"], "has no needles"),
    (needle.main, ["checkpoint=x", "length=long"], "length=long"),
    (vision_ratio.main, ["train.steps=none"], "train.steps=none"),
    (torchrun.main, [SMALL, "--node", "7", "--first-node", "h"], "--node 7"),
]


@pytest.mark.parametrize(
    "index", range(len(UNREADABLE)), ids=lambda i: " ".join(UNREADABLE[i][1]) or "nothing"
)
def test_what_cannot_be_read_or_made_is_named(
    index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments, words = UNREADABLE[index]
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    Path(FILE).write_bytes(b"\xff\x00")
    Path(FOLDER).mkdir()
    Path(LOOP).symlink_to(LOOP)
    assert run(main, *arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Error: " in error
    assert "Traceback" not in error
    assert sorted(os.listdir()) == [FILE, FOLDER, LOOP]


def test_a_rank_waits_for_the_first_to_speak(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("k25_train.entry.WAIT_FOR_FIRST_RANK_S", 0.0)
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    # Nobody has ended the first rank of another node: the error is that node's own.
    own = "rank 1: ConfigError: 2 process(es) started, but"
    for number, local, words in (("0", "0", own.partition(": ")[2]), ("1", "0", own), ("1", "1", "")):
        monkeypatch.setenv("RANK", number)
        monkeypatch.setenv("LOCAL_RANK", local)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert run(train.command, SMALL) == 2
        assert capsys.readouterr().err.startswith(words)
    assert words == "" and capsys.readouterr().err == ""


@pytest.mark.parametrize("value", ["", "two", "-1", "٣"])
def test_a_number_of_ranks_that_is_none(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    assert run(train.command, SMALL) == 2
    error = capsys.readouterr().err
    assert "WORLD_SIZE" in error and repr(value) in error and "must be a whole number" in error


def test_torchruns_report_ends_with_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert run(plan.main, "experiment=none") == 2
    assert "is not a choice of experiment" in (tmp_path / "error.json").read_text(encoding="utf-8")


def test_media_are_not_shuffled_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose([SMALL, *mix(text=1)])
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (tmp_path / "manifest.json").touch()
    monkeypatch.setattr(evaluate, "verify", lambda _: Manifest(step=1, files={}, facts={}))
    assert run(evaluate.main, f"checkpoint={tmp_path}", "shuffle_media=1") == 2
    assert (
        "shuffle_media=1: needs samples with media, but data.sources has only text: text"
        in capsys.readouterr().err
    )


def test_a_fault_of_the_code_keeps_its_traceback_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan, "plan_pipeline", lambda config, assumptions: {}[config.model.name])
    assert run(plan.main, SMALL) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and "KeyError: 'k25_tiny'" in error
    assert "KeyError in k25_train.plan.__main__:" in error and "is a fault of k25-train" in error


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(config: object, assumptions: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "plan_pipeline", interrupted)
    assert run(plan.main, SMALL) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_streams_are_as_before_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.stdout, sys.stderr
    monkeypatch.setattr(
        plan, "plan_pipeline", lambda config, assumptions: (_ for _ in ()).throw(DataError("x"))
    )
    assert run(plan.main, SMALL) == 2
    assert (sys.stdout, sys.stderr) == before


CHILDREN = (
    "k25_train/rl/rewards/worker.py",
    "k25_train/rollout/shards/shard.py",
    *(
        f"k25_train/environments/{name}.py"
        for name in (
            "adapters/verifiers_process",
            "sandboxes/in_sandbox",
            "sandboxes/session_init",
            "toolsets/kernel_driver",
        )
    ),
)
"""Processes that are no commands: our own code starts them, talks to them by pipes, and judges their end."""


def test_every_entry_point_ends_that_way() -> None:
    for path in source_files(*CODE):
        source = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in source and relative(path) not in CHILDREN:
            ends = (
                "run_command(_run",
                "run_subcommand(",
                "exit_status(body",
                "hydra_app(",
                "(COMMANDS).main(",
            )
            assert any(words in source for words in ends), path


@pytest.mark.slow
def test_a_preflight_writes_its_report_whatever_becomes_of_the_terminal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch.preflight", SMALL, "--report", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for target in (os.devnull, "/dev/full"):
        with open(target, "wb") as output:
            done = subprocess.run(
                command, cwd=REPO, stdout=output, stderr=subprocess.PIPE, env=environment, check=False
            )
        report = tmp_path / "preflight.json"
        assert report.exists() and b"Traceback" not in done.stderr
        assert done.returncode in (0, 1), done.stderr
        report.unlink()
