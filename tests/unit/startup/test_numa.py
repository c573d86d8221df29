"""Ranks run near their GPUs: the plan on trees of files, the binding on this machine."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from k25_train.errors import ConfigError
from k25_train.startup import near_gpu, numa
from k25_train.startup.numa import Binding, bind, cpus_in, plan, spans
from k25_train.startup.platform import check_nothing_blocks
from tests.helpers.project_sources import REPO

GPUS = [f"0000:{number:02x}:00.0" for number in (0x18, 0x2A, 0x3A, 0x5D, 0x9A, 0xAB, 0xBA, 0xDB)]
"""Of eight GPUs, four on each socket."""
FIRST, SECOND = "0-47,96-143", "48-95,144-191"
ALL = range(192)


class Machine:
    """Two sockets of 48 cores with two threads each; a test changes what it wants otherwise."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for number, cpus in enumerate((FIRST, SECOND)):
            self.write(f"sys/devices/system/node/node{number}/cpulist", f"{cpus}\n")
        for index, gpu in enumerate(GPUS):
            self.write(f"sys/bus/pci/devices/{gpu}/numa_node", f"{index // 4}\n")
        self.write("sys/devices/system/node/online", "0-1\n")
        self.write("proc/self/status", "Cpus_allowed_list:\t0-191\nMems_allowed_list:\t0-1\n")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_each_rank_runs_on_the_socket_of_its_gpu(machine: Machine) -> None:
    plans = [plan(GPUS, own, ALL, machine.root) for own in range(8)]
    assert [spans(each.cpus or ()) for each in plans] == [FIRST] * 4 + [SECOND] * 4
    assert plans[5].text == f"runs on CPUs {SECOND} of NUMA node 1 of GPU {GPUS[5]}"
    assert not any(each.is_flawed for each in plans)


def test_a_rank_stays_within_the_cpus_of_its_job(machine: Machine) -> None:
    # Half of each socket, as SLURM's cpus_per_task gives.
    allowed = [*range(24), *range(48, 72)]
    assert spans(plan(GPUS, 6, allowed, machine.root).cpus or ()) == "48-71"


@pytest.mark.parametrize(
    ("allowed", "said"),
    [
        (range(48), "no CPU of NUMA node 1 of GPU 0000:9a:00.0 (48-95,144-191) is among this job's 0-47"),
        ((0, 1, 48, 49, 50), "4 ranks would share 3 CPUs of NUMA node 1 of GPU 0000:9a:00.0"),
    ],
    ids=["all on the other socket", "fewer than ranks"],
)
def test_too_few_cpus_leave_it_unbound_by_name(machine: Machine, allowed: range, said: str) -> None:
    found = plan(GPUS, 4, allowed, machine.root)
    assert found.cpus is None
    assert found.is_flawed
    assert said in found.text


def test_a_node_that_the_firmware_does_not_tell_is_named(machine: Machine) -> None:
    machine.write(f"sys/bus/pci/devices/{GPUS[2]}/numa_node", "-1\n")
    found = plan(GPUS, 2, ALL, machine.root)
    assert found.cpus is None
    assert f"does not say which of 2 NUMA nodes GPU {GPUS[2]}" in found.text


def test_memory_that_the_job_may_not_use_is_named(machine: Machine) -> None:
    machine.write("proc/self/status", "Mems_allowed_list:\t0\n")
    found = plan(GPUS, 7, ALL, machine.root)
    assert spans(found.cpus or ()) == SECOND
    assert found.is_flawed
    assert "memory of NUMA node 1" in found.text


def test_a_machine_of_one_node_needs_nothing(tmp_path: Path) -> None:
    one = Machine(tmp_path)
    (one.root / "sys/devices/system/node/node1/cpulist").unlink()
    (one.root / "sys/devices/system/node/node1").rmdir()
    assert plan(GPUS, 0, ALL, one.root) == Binding(cpus=None, text="")


@pytest.mark.parametrize("text", ["0-2,8", "5", "", "0-47,96-143"])
def test_lists_of_the_kernel(text: str) -> None:
    assert spans(cpus_in(text)) == text


BIND = """
import os, sys, threading
from pathlib import Path
from k25_train.startup.numa import bind
earlier = threading.Event()
thread = threading.Thread(target=earlier.wait); thread.start()
print(bind(["0000:18:00.0"], 0, {}, Path(sys.argv[1])).text)
later = []
another = threading.Thread(target=lambda: later.append(os.sched_getaffinity(0)))
another.start(); another.join()
print(sorted(os.sched_getaffinity(0)), sorted(later[0]), sorted(os.sched_getaffinity(thread.native_id)))
earlier.set()
"""
"""Binds a process, and shows where it, a later and an earlier thread may run."""


def test_a_process_and_its_threads_really_move(machine: Machine) -> None:
    cpu = max(os.sched_getaffinity(0))
    machine.write("sys/devices/system/node/node0/cpulist", f"{cpu}\n")
    done = subprocess.run(
        [sys.executable, "-c", BIND, str(machine.root)], cwd=REPO, capture_output=True, text=True, check=True
    )
    said, where = done.stdout.splitlines()
    assert said == f"runs on CPUs {cpu} of NUMA node 0 of GPU 0000:18:00.0"
    assert where == f"[{cpu}] [{cpu}] [{cpu}]"


def test_a_container_that_forbids_it_is_no_error(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: int, cpus: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(ALL))
    found = bind(GPUS, 0, {}, machine.root)
    assert found.cpus is None
    assert f"not allowed to choose CPUs {FIRST} (Operation not permitted)" in found.text


def test_a_site_can_switch_it_off(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: pytest.fail("it has looked"))
    assert bind(GPUS, 0, {numa.VARIABLE: numa.OFF}, machine.root) == Binding(cpus=None, text="")
    # As YAML reads `off` without quotes.
    with pytest.raises(ConfigError, match="K25_NUMA_BINDING=False: must be gpu or off"):
        bind(GPUS, 0, {numa.VARIABLE: "False"}, machine.root)


def test_a_rank_binds_to_the_gpu_that_it_has_chosen(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [[int(part, 16) for part in gpu[:-2].split(":")] for gpu in GPUS]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(GPUS))
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda number: SimpleNamespace(
            **dict(zip(("pci_domain_id", "pci_bus_id", "pci_device_id"), parts[number], strict=True))
        ),
    )
    asked = []
    monkeypatch.setattr(
        numa, "bind", lambda *given: asked.append(given) or Binding(cpus=None, text="slow", is_flawed=True)
    )
    monkeypatch.setenv("RANK", "13")
    near_gpu.bind_near(torch.device("cuda", 5))
    assert asked[0][:2] == (GPUS, 5)
    assert capsys.readouterr().out == "rank 13 slow\n"


@pytest.mark.parametrize("name", ["CUDA_LAUNCH_BLOCKING", "TORCH_NCCL_BLOCKING_WAIT"])
def test_variables_with_which_ranks_would_wait_in_a_circle_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=1 in the environment: ranks would wait"):
        check_nothing_blocks({name: "1", "WORLD_SIZE": "2"})
    check_nothing_blocks({name: "1", "WORLD_SIZE": "1"})
    check_nothing_blocks({name: "0", "WORLD_SIZE": "2"})
