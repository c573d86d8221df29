"""Input never becomes code: every call that could do that is known, with the reason why it may be there."""

import pytest

from tests.helpers.dangerous_calls import dangerous_calls
from tests.helpers.project_sources import CODE, REPO, relative, source_files

_OWN_RANKS = "between ranks of one job, which trust each other"
_OWN_NAME = "the name is written in the code"
_OWN_CELLS = "cells that this project's families of traces write, in a process of its own"
ALLOWED = {
    ("k25_train/checkpoint/agreement.py", "torch.distributed.broadcast_object_list"): _OWN_RANKS,
    ("k25_train/checkpoint/agreement.py", "torch.distributed.all_gather_object"): _OWN_RANKS,
    ("k25_train/environments/sandboxes/in_sandbox.py", "compile"): "it runs in a sandbox",
    ("k25_train/environments/sandboxes/in_sandbox.py", "exec"): "it runs in a sandbox",
    ("k25_train/environments/sandboxes/bubblewrap.py", "marshal.dumps"): "writes, reads nothing",
    ("k25_train/environments/sandboxes/session.py", "marshal.dumps"): "writes, reads nothing",
    ("k25_train/environments/sandboxes/session_init.py", "marshal.loads"): "reads orders, in a sandbox",
    ("k25_train/environments/adapters/verifiers_process.py", "importlib.import_module"): _OWN_NAME,
    ("k25_train/environments/__main__.py", "importlib.import_module"): _OWN_NAME,
    ("k25_train/export/live.py", "torch.distributed.gather_object"): _OWN_RANKS,
    ("k25_train/startup/packages.py", "importlib.import_module"): _OWN_NAME,
    ("k25_train/rollout/shards/shard.py", "importlib.import_module"): "named by the process that started it",
    ("k25_train/data/traces/session_process.py", "compile"): _OWN_CELLS,
    ("k25_train/data/traces/session_process.py", "exec"): _OWN_CELLS,
    ("k25_train/data/channel.py", "pickle.loads"): "between a rank and the process that it forked",
    ("k25_train/training/inputs.py", "torch.distributed.all_gather_object"): _OWN_RANKS,
    ("k25_train/training/trace.py", "torch.distributed.gather_object"): _OWN_RANKS,
    ("launch/preflight_rank.py", "runpy.run_module"): _OWN_NAME,
    ("launch/rank.py", "runpy.run_module"): _OWN_NAME,
    ("k25_train/checkpoint/files/plain_pickle.py", "pickle.UnpicklingError"): "raises, reads nothing",
    ("parallel/megatron/skip_non_finite.py", "torch.distributed.all_gather_object"): _OWN_RANKS,
}
"""File and call -> why it is no way in."""


def test_input_never_becomes_code() -> None:
    found = {
        (relative(path), name.replace("dist.", "torch.distributed.", 1) if name.startswith("dist.") else name)
        for path in source_files(*CODE)
        for name, _ in dangerous_calls(path.read_text())
    }
    assert found - ALLOWED.keys() == set(), "find another way, or say in ALLOWED why it is no way in"
    assert ALLOWED.keys() - found == set(), "no longer there"


DANGEROUS = """
import pickle
pickle.loads(x)
from pickle import load as read
read(x)
import pickle as p
p.Unpickler(x)
torch.load(x)
torch.load(x, weights_only=False)
np.load(x, allow_pickle=True)
yaml.load(x)
yaml.load(x, Loader=yaml.Loader)
yaml.unsafe_load(x)
eval(x)
exec(x)
__import__(x)
subprocess.run(x, shell=True)
os.system(x)
tar.extractall(x)
tar.extract(x)
shutil.unpack_archive(x)
dist.all_gather_object(a, b)
importlib.import_module(x)
"""
HARMLESS = """
model.eval()
re.compile(x)
json.loads(x)
torch.load(x, weights_only=True)
np.load(x)
yaml.load(x, Loader=yaml.SafeLoader)
yaml.safe_load(x)
subprocess.run(x, shell=False)
tar.extractfile(x)
dist.all_gather(a, b)
"""


@pytest.mark.parametrize("line", [line for line in DANGEROUS.split("\n") if "(" in line])
def test_a_dangerous_call_is_found(line: str) -> None:
    imports = [other for other in DANGEROUS.split("\n") if "import " in other]
    assert len(list(dangerous_calls("\n".join([*imports, line])))) == 1


def test_harmless_calls_are_not() -> None:
    assert list(dangerous_calls(HARMLESS)) == []


def test_what_is_trusted_is_documented() -> None:
    """Every test that CONTRIBUTING names as a proof is there."""
    text = (REPO / "CONTRIBUTING.md").read_text()
    section = text[text.index("## Security") :]
    named = {word.strip("`,;.()") for word in section.split() if word.lstrip("|").startswith("`tests/")}
    assert len(named) >= 5
    assert [name for name in sorted(named) if not (REPO / name).exists()] == []
