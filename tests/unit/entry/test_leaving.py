"""How a rank leaves after an error: its status is the error's, whatever threads of torch still run."""

import subprocess
import sys

LEAVE = """
import torch.distributed as dist
from k25_train.entry import run_command
from k25_train.errors import TrainingError

class Late:
    def __del__(self):
        print("torn down")

kept = Late()

def body():
    if {meets}:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    print("said")
    raise TrainingError("no")

run_command(body)
"""


def leave(*, meets: bool) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LEAVE.format(meets=meets)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_rank_leaves_at_once_with_all_that_it_said() -> None:
    ended = leave(meets=True)

    assert ended.returncode == 2
    assert ended.stdout == "said\n"
    assert "TrainingError: no" in ended.stderr


def test_a_process_without_peers_is_torn_down_as_usual() -> None:
    ended = leave(meets=False)

    assert ended.returncode == 2
    assert ended.stdout == "said\ntorn down\n"
