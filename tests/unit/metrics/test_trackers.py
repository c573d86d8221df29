"""Weights & Biases and MLflow: one run there per run folder, no secrets, and no fault of theirs costs a step.

Where the libraries are installed, they are used: W&B offline, MLflow with a database on disk.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from k25_train import train
from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.metrics.report import Report
from k25_train.metrics.sinks import Row, SteadySink, read_rows
from k25_train.metrics.trackers import background, build
from k25_train.metrics.trackers.background import BackgroundSink
from k25_train.metrics.trackers.build import build_trackers, check_trackers, described
from k25_train.metrics.trackers.mlflow_sink import MlflowSink, name_of
from k25_train.metrics.trackers.run_ids import RunId
from k25_train.metrics.trackers.wandb_sink import WandbSink
from tests.helpers.in_process import status_of_command


def config_in(folder: Path, *more: str) -> Config:
    wandb, mlflow = (
        "metrics.wandb.project=k25",
        f"metrics.mlflow={{uri: 'sqlite:///{folder}/m.db', experiment: e}}",
    )
    return compose(["experiment=smoke", f"run.dir={folder}", wandb, mlflow, *more])


def row_of(step: int) -> Row:
    return {
        "step": step,
        "loss": 1 / step,
        "loss/a:b": 2.0,
        "expert_loads": [1.0, 2.0],
        "mfu": None,
        "x": 1e999,
    }


class Service:
    """A sink that answers when it is told to."""

    rows_per_flush = 1

    def __init__(self) -> None:
        self.answers, self.steps = threading.Event(), list[Any]()
        self.is_closed = False

    def write(self, row: Row) -> None:
        self.answers.wait()
        self.steps.append(row["step"])

    def flush(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        self.is_closed = True


def test_a_service_that_does_not_answer_holds_nothing_up() -> None:
    told: list[str] = []
    service = Service()
    sink = BackgroundSink(SteadySink("it", lambda _: service, told.append), told.append, close_s=0.2)
    start = time.monotonic()
    for step in range(100):
        sink.write({"step": step})
    sink.close()
    assert time.monotonic() - start < 5 and service.steps == []
    assert told[0] == "it: does not answer within 0 s, the run ends without it"
    assert told[1].startswith("it: ") and "row(s) could not be handed on and are lost" in told[1]
    service.answers.set()


def test_rows_arrive_in_order_and_the_end_waits_for_them() -> None:
    told: list[str] = []
    service = Service()
    sink = BackgroundSink(SteadySink("it", lambda _: service, told.append), told.append)
    for step in range(100):
        sink.write({"step": step})
    service.answers.set()
    sink.close()
    assert (service.steps, service.is_closed, told) == (list(range(100)), True, [])


def test_too_many_rows_are_lost_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "MOST_ROWS", 3)
    told: list[str] = []
    service = Service()
    sink = BackgroundSink(SteadySink("it", lambda _: service, told.append), told.append)
    for step in range(10):
        sink.write({"step": step})
    service.answers.set()
    sink.close()
    assert service.steps == sorted(service.steps) and len(service.steps) <= 4
    assert told == [f"it: {10 - len(service.steps)} row(s) could not be handed on and are lost"]


def test_a_server_out_of_reach_is_told_once_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(build, "WandbSink", refuse)
    monkeypatch.setattr(build, "MlflowSink", refuse)
    config = config_in(tmp_path)
    with Report(config, is_main=True, device_name="CPU") as report:
        report.start(0)
        for step in range(1, 5):
            report.add({**row_of(step), "step_time_s": 0.1})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    printed = capsys.readouterr().out
    for name in ("Weights & Biases", "MLflow"):
        assert printed.count(f"warning: {name}: cannot be written (ConnectionError: no route to host)") == 1
        assert printed.count(f"warning: {name}: 4 row(s) could not be written and are lost") == 1


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_library_that_is_not_installed_is_named_before_anything_starts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, find = config_in(tmp_path), importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda asked, *rest: None if asked == name else find("json") or find(asked),
    )
    with pytest.raises(ConfigError, match=rf"metrics\.{name}: .*pip install 'k25-train\[{name}\]'"):
        check_trackers(config)
    check_trackers(compose(["experiment=smoke"]))
    wanted = {"wandb": "metrics.wandb.project=k", "mlflow": "metrics.mlflow={uri: http://h, experiment: e}"}[
        name
    ]
    assert status_of_command(train.command, "experiment=smoke", f"run.dir={tmp_path}/run", wanted) == 2
    assert f"metrics.{name}: its library is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_no_service_is_asked_for_by_default(tmp_path: Path) -> None:
    assert build_trackers(compose(["experiment=smoke"]), tmp_path, print) == []


def test_what_is_shown_holds_no_path_url_or_command(tmp_path: Path) -> None:
    config = config_in(tmp_path, "data.dir=/secret/place", "checkpoint.init_from=s3://key:password@bucket/x")
    shown = json.dumps(described(config))
    assert "k25_tiny" in shown and "seq_len" in shown
    assert not any(word in shown for word in ("secret", "password", str(tmp_path)))


def test_a_run_keeps_its_name_in_one_place_alone(tmp_path: Path) -> None:
    RunId(tmp_path, "wandb", "me/k25").save("abc")
    assert RunId(tmp_path, "wandb", "me/k25").load() == "abc"
    assert RunId(tmp_path, "wandb", "me/other").load() is None
    assert RunId(tmp_path, "mlflow", "me/k25").load() is None
    for damaged in ("", "[]", "{", '{"where": "me/k25", "id": 5}'):
        (tmp_path / "wandb.json").write_text(damaged)
        assert RunId(tmp_path, "wandb", "me/k25").load() is None


class FakeWandb(ModuleType):
    """Remembers what it is asked."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, float]] = []
        self.Settings = dict

    def init(self, **settings: Any) -> SimpleNamespace:
        self.inits.append(settings)
        return SimpleNamespace(
            log=self.logged.append, finish=lambda: None, define_metric=lambda *_, **__: None
        )


def test_a_resumed_run_is_one_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = config_in(tmp_path)
    assert config.metrics.wandb is not None
    for step in (1, 2):
        sink = WandbSink(tmp_path, config.metrics.wandb, described(config))
        sink.write(row_of(step))
        sink.close()
    first, second = fake.inits
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["dir"] == str(tmp_path)
    assert fake.logged[1] == {"loss": 0.5, "loss/a:b": 2.0, "train_step": 2}
    assert first["settings"]["x_disable_meta"] and first["settings"]["console"] == "off"


def test_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = config_in(tmp_path)
    assert config.metrics.wandb is not None
    for steps in ((1, 2, 3), (3, 4)):
        sink = WandbSink(tmp_path, config.metrics.wandb, described(config))
        for step in steps:
            sink.write(row_of(step))
        sink.close()
    name = json.loads((tmp_path / "wandb.json").read_text())["id"]
    written = list((tmp_path / "wandb").glob(f"offline-run-*/run-{name}.wandb"))
    # Its own process writes, also after it has said that it is done.
    deadline = time.monotonic() + 60
    while not all(b"train_step" in path.read_bytes() for path in written) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert written and all(b"train_step" in path.read_bytes() for path in written)


def test_real_mlflow_with_a_database(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    config = config_in(tmp_path)
    assert config.metrics.mlflow is not None
    for steps in ((1, 2, 3), (3, 4)):
        sink = MlflowSink(tmp_path, config.metrics.mlflow, described(config))
        for step in steps:
            sink.write(row_of(step))
        sink.close()
    client = mlflow.MlflowClient(tracking_uri=config.metrics.mlflow.uri)
    name = json.loads((tmp_path / "mlflow.json").read_text())["id"]
    assert [each.step for each in client.get_metric_history(name, "loss")] == [1, 2, 3, 3, 4]
    found = client.get_run(name)
    assert found.data.metrics == {"loss": 0.25, "loss/a_b": 2.0} and found.info.status == "FINISHED"
    assert found.data.params["train.seq_len"] == "256"
    # One that was deleted there is begun again.
    client.delete_run(name)
    MlflowSink(tmp_path, config.metrics.mlflow, described(config)).close()
    assert json.loads((tmp_path / "mlflow.json").read_text())["id"] != name


def test_names_are_those_that_mlflow_takes() -> None:
    assert name_of("loss/te xt:ü-1.5_a") == "loss/te xt__-1.5_a"
