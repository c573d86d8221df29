"""What a pod says of how its ranks ended."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from k25_train.compose.resolve import compose, to_yaml
from k25_train.entry import exit_status
from k25_train.errors import K25Error
from k25_train.joining import network
from k25_train.joining.network import NetworkError
from launch import torchrun
from launch.forwarding import FORWARDED, Forwarding
from launch.gathering import GatheringError
from launch.kubernetes import pod
from launch.kubernetes.outcomes import FAILED, FINISHED, IMPOSSIBLE, STOPPED, UNFIT
from launch.rendezvous import RendezvousError
from tests.helpers.project_sources import REPO

NUM_STEPS = 5
SECTION = yaml.safe_load((REPO / "conf/cluster/site_kubernetes.yaml").read_text())["kubernetes"]


class Ranks:
    """Stands in for torchrun: what it is asked to start, and how each start ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
        self.run = run
        self.started: list[tuple[str, int]] = []
        self.met_at: list[int] = []
        self.statuses = {"launch.preflight": 0, "k25_train.any_run": 0}
        self.last_step = NUM_STEPS
        self.signal_during = ""
        monkeypatch.setattr(Forwarding, "run", self.start)
        monkeypatch.setattr(pod, "meet", self.meet)
        monkeypatch.setattr(pod, "wait_for_name", lambda host, limit_s: None)

    def meet(self, config: object, place: torchrun.Place) -> None:
        self.met_at.append(place.port)
        self._perhaps_signal("meeting")

    def start(self, command: list[str], environment: object) -> int:
        module = command[command.index("--max-restarts=0") + 2]
        self.started.append((module, int(next(a for a in command if "port" in a).split("=")[1])))
        if module == "k25_train.any_run":
            (self.run / "metrics.jsonl").write_text(json.dumps({"step": self.last_step, "loss": 1.0}) + "\n")
        self._perhaps_signal(module)
        return self.statuses[module]

    def _perhaps_signal(self, moment: str) -> None:
        if moment == self.signal_during:
            signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    run = tmp_path / "run"
    run.mkdir()
    config = compose(
        [
            "experiment=smoke",
            f"run.dir={run}",
            f"train.steps={NUM_STEPS}",
            "optim.decay=2",
            "optim.warmup=2",
            "train.eval_interval=5",
            "checkpoint.interval=5",
        ]
    )
    values = yaml.safe_load(to_yaml(config))
    values["cluster"] |= {"nodes": 2, "gpus_per_node": 2, "kubernetes": SECTION}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    monkeypatch.setattr("sys.argv", ["pod", str(path)])
    monkeypatch.setenv(pod.INDEX, "0")
    monkeypatch.setenv(pod.FIRST_NODE, "first.example.org")
    before = {number: signal.getsignal(number) for number in FORWARDED}
    yield Ranks(monkeypatch, run)
    for number, handler in before.items():
        signal.signal(number, handler)


def test_it_checks_and_then_trains_at_another_port(ranks: Ranks) -> None:
    assert exit_status(pod._run) == FINISHED
    assert ranks.started == [("launch.preflight", 29500), ("k25_train.any_run", 29501)]
    assert ranks.met_at == [29500, 29501]


@pytest.mark.parametrize(
    ("module", "status", "last_step", "signal_during", "expected"),
    [
        ("launch.preflight", 1, 0, "", UNFIT),
        ("launch.preflight", 143, 0, "launch.preflight", STOPPED),
        ("launch.preflight", 0, 0, "launch.preflight", STOPPED),
        ("launch.preflight", 0, 0, "meeting", STOPPED),
        ("k25_train.any_run", 1, 3, "", FAILED),
        ("k25_train.any_run", 137, NUM_STEPS, "", FAILED),
        ("k25_train.any_run", 0, 3, "k25_train.any_run", STOPPED),
        # Told to end on another node: its ranks agree with those here.
        ("k25_train.any_run", 0, 3, "", STOPPED),
        ("k25_train.any_run", 1, 3, "k25_train.any_run", STOPPED),
        ("k25_train.any_run", 0, NUM_STEPS, "k25_train.any_run", FINISHED),
    ],
)
def test_how_it_ended(
    ranks: Ranks, module: str, status: int, last_step: int, signal_during: str, expected: int
) -> None:
    ranks.statuses[module], ranks.last_step, ranks.signal_during = status, last_step, signal_during
    assert exit_status(pod._run) == expected
    if expected == UNFIT or signal_during in ("launch.preflight", "meeting"):
        assert "k25_train.any_run" not in [module for module, _ in ranks.started]


@pytest.mark.parametrize("error", [NetworkError, RendezvousError, GatheringError])
def test_pods_that_do_not_come_in_time_may_do_so_at_the_next_start(
    ranks: Ranks,
    monkeypatch: pytest.MonkeyPatch,
    error: type[K25Error],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A large image takes longer to fetch on a new node than pods wait for each other."""

    def meet(config: object, place: torchrun.Place) -> None:
        raise error("3 of 4 nodes are there")

    monkeypatch.setattr(pod, "meet", meet)
    assert exit_status(pod._run) == FAILED
    assert f"{error.__name__}: 3 of 4 nodes" in capsys.readouterr().out and not ranks.started


@pytest.mark.parametrize("moment", ["meet", "wait_for_name", "load_saved"])
def test_a_pod_without_ranks_goes_at_once(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    original = getattr(pod, moment)

    def wait(*arguments: object) -> object:
        signal.raise_signal(signal.SIGTERM)
        if moment != "load_saved":
            pytest.fail("it waits on")
        return original(*arguments)

    monkeypatch.setattr(pod, moment, wait)
    assert exit_status(pod._run) == STOPPED
    assert not ranks.started


@pytest.mark.parametrize("missing", [pod.INDEX, pod.FIRST_NODE])
def test_a_pod_that_is_none_is_refused(
    ranks: Ranks, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(missing)
    assert exit_status(pod._run) == IMPOSSIBLE
    assert missing in capsys.readouterr().err and not ranks.started


def test_a_name_that_does_not_resolve_yet_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [NetworkError("the name 'first' does not resolve")] * 2

    def resolve(host: str) -> list[str]:
        if answers:
            raise answers.pop()
        return ["10.0.0.1"]

    monkeypatch.setattr(network, "resolve", resolve)
    monkeypatch.setattr(network, "PROGRESS_S", 0.0)
    monkeypatch.setattr(pod.time, "sleep", lambda seconds: None)
    pod.wait_for_name("first", 300.0)
    assert capsys.readouterr().out.count("does not resolve; ") == 2
    answers.append(NetworkError("the name 'first' does not resolve"))
    with pytest.raises(NetworkError):
        pod.wait_for_name("first", 0.0)
