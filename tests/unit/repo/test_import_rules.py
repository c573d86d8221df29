"""Who may import whom (read from the source, nothing is imported), and what may not need torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.source import CODE, REPO, imports_of, relative, source_files

EVERY_FILE = source_files(*CODE)

# Package or module -> what of this project it may not import.
FORBIDDEN = {
    "parallel": ["k25_train", "launch"],
    "k25_train": ["launch"],
    "launch": ["parallel", "k25_train.model", "k25_train.data", "k25_train.optim", "k25_train.checkpoint"],
    "k25_train.model": ["k25_train.data", "k25_train.optim", "k25_train.checkpoint"],
    "k25_train.data": ["k25_train.model", "k25_train.optim", "k25_train.checkpoint"],
    "k25_train.optim": ["k25_train.model", "k25_train.data", "k25_train.checkpoint"],
    "k25_train.checkpoint": ["k25_train.model", "k25_train.data", "k25_train.optim"],
}
# Package or module -> all that it may import.
ALLOWED = {
    "parallel.activations": {
        "stdlib",
        "torch",
        "triton",
        "parallel.activations",
        "parallel.dep.timeline",
        "parallel.stopwatch",
    },
    "parallel.activations.fp8": {
        "stdlib",
        "torch",
        "parallel.activations.fp8_triton",
        "parallel.activations.sizes",
    },
    "parallel.config": {"stdlib"},
    "parallel.layout": {"stdlib"},
    "parallel.layout_plan": {"stdlib", "parallel.layout"},
    "parallel.micro_batches": {"stdlib"},
    "parallel.activations.order": {"stdlib", "parallel.dep.timeline"},
    "parallel.activations.policy": {"stdlib"},
    "parallel.activations.sizes": {"stdlib"},
    "parallel.dep.plan": {"stdlib", "parallel.dep.split"},
    "parallel.dep.split": {"stdlib"},
    "parallel.dep.timeline": {"stdlib", "parallel.micro_batches"},
    "parallel.dep.bubbles": {"stdlib", "parallel.dep.timeline"},
    "parallel.dep.program": {"stdlib", "parallel.dep.bubbles", "parallel.dep.plan", "parallel.dep.timeline"},
    "k25_train.errors": {"stdlib"},
    "k25_train.config": {
        "stdlib",
        "hydra",
        "omegaconf",
        "yaml",
        "k25_train.config",
        "k25_train.errors",
        "k25_train.plan",
        "parallel.activations.policy",
        "parallel.config",
        "parallel.layout",
        "parallel.layout_plan",
    },
    "k25_train.optim.rules": {"stdlib", "k25_train.config.optimizer", "k25_train.config.schema"},
    "k25_train.plan": {
        "stdlib",
        "rich",
        "k25_train.config",
        "k25_train.errors",
        "k25_train.metrics.flops",
        "k25_train.optim.rules",
        "k25_train.plan",
        "parallel.activations.order",
        "parallel.activations.policy",
        "parallel.activations.sizes",
        "parallel.config",
        "parallel.dep.bubbles",
        "parallel.dep.plan",
        "parallel.dep.program",
        "parallel.dep.timeline",
        "parallel.layout",
        "parallel.layout_plan",
        "parallel.micro_batches",
    },
    "launch.decide": {"stdlib"},
    "launch.lock": {"stdlib", "k25_train.errors"},
    "launch.scheduler": {"stdlib", "k25_train.errors"},
    "launch.rendezvous": {"stdlib", "k25_train.errors"},
}
TORCH_FREE = [
    "k25_train.config.resolve",
    "k25_train.config.command_line",
    "k25_train.plan.__main__",
    "launch.preflight.__main__",
    "launch.preflight.node",
    "launch.preflight.measured",
    "launch.slurm",
    "launch.supervisor",
    "launch.torchrun",
]
ON_NODES = ["supervisor", "steps", "checker", "node", "rank", "rendezvous"]
# All of `launch` that imports torch: imported when preflight starts to measure, not before.
TORCH_IN_LAUNCH = {"launch.preflight.job", "launch.preflight.measure", "launch.preflight.meeting"}


def module_name(path: Path) -> str:
    """Dotted name of a file, `__init__` left out."""
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def within(name: str, package: str) -> bool:
    """Whether a dotted name is the package or lies in it."""
    return name == package or name.startswith(f"{package}.")


def violations(name: str, imported: str) -> list[str]:
    """What is wrong with a module's importing a name."""
    found = []
    for package, forbidden in FORBIDDEN.items():
        if within(name, package) and any(within(imported, other) for other in forbidden):
            found.append(f"{name} imports {imported}, which {package} may not")
    for package, allowed in ALLOWED.items():
        is_stdlib = imported.split(".")[0] in sys.stdlib_module_names
        if within(name, package) and not is_stdlib and not any(within(imported, other) for other in allowed):
            found.append(f"{name} imports {imported}; {package} may import {sorted(allowed)} only")
    return found


@pytest.mark.parametrize("path", EVERY_FILE, ids=relative)
def test_imports_follow_the_rules(path: Path) -> None:
    wrong = [text for imported in imports_of(path) for text in violations(module_name(path), imported)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("parallel.topology", "k25_train.model"),
        ("parallel.config", "torch"),
        ("parallel.activations.fp8", "triton"),
        ("k25_train.model.moonvit", "k25_train.data.batch"),
        ("k25_train.train", "launch.slurm"),
        ("k25_train.plan.parameters", "torch.nn"),
        ("k25_train.config.schema", "k25_train.model.moonvit"),
    ],
)
def test_the_rules_catch(name: str, imported: str) -> None:
    assert violations(name, imported)


def test_rules_name_what_exists() -> None:
    modules = {module_name(path) for path in EVERY_FILE}
    for package in ALLOWED | FORBIDDEN:
        assert any(within(module, package) for module in modules), package


def test_package_files_hold_no_code() -> None:
    """Code in `__init__.py` would run, and drag torch in, for every module below it."""
    for path in EVERY_FILE:
        if path.name == "__init__.py":
            statements = [
                node
                for node in ast.parse(path.read_text()).body
                # The guard against a foreign `parallel`, which has to come before any import from it.
                if ast.unparse(node) != "from k25_train.packages import check_packages"
            ]
            assert all(isinstance(node, ast.Expr | ast.Assign) for node in statements), path


def test_launch_imports_torch_only_to_measure() -> None:
    importing = {
        module_name(path)
        for path in source_files("launch")
        if any(within(imported, "torch") for imported in imports_of(path))
    }
    assert importing == TORCH_IN_LAUNCH


@pytest.mark.parametrize("module", TORCH_FREE)
def test_runs_where_torch_is_absent(module: str) -> None:
    code = f"import sys; sys.modules['torch'] = sys.modules['megatron'] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", [f"launch.{name}" for name in ON_NODES])
def test_supervision_needs_the_standard_library_only(module: str) -> None:
    """The first node's Python may have nothing else: the ranks' packages can be in a container."""
    blocked = "torch hydra omegaconf yaml rich numpy".split()
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import {module}"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plan_runs_where_torch_is_absent() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv[1:] = ['experiment=k25_pretrain_4k', '--json']; "
        "from k25_train.plan.__main__ import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"total": 1026879353328' in done.stdout
