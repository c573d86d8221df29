"""Who may import whom, by folder (read from the source, nothing is imported), and what may not need torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.import_graph import cycle_in, folders, module_imports, module_name, parts_of
from tests.helpers.project_sources import CODE, REPO, imports_of, relative, source_files

EVERY_FILE = source_files(*CODE)

PEERS = ("model", "data", "optim", "checkpoint", "objectives")
"""Rooms of `k25_train` that `training` puts together; they do not know each other."""
RANKS = ("megatron", "torch.distributed", "parallel")
"""What knows of ranks and groups."""
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "parallel": ("k25_train", "launch", "hydra", "omegaconf", "rich"),
    # Plans of tens of thousands of vision items are arrays.
    **{f"parallel.{folder}": ("numpy",) for folder in ("activations", "megatron", "muon", "watchdog")},
    "k25_train": ("launch",),
    "launch": ("parallel", *(f"k25_train.{room}" for room in (*PEERS, "training", "dryrun", "metrics"))),
    "k25_train.config": ("hydra", "omegaconf", "yaml", "rich"),
    "k25_train.objectives": RANKS,
    "k25_train.metrics": RANKS[:2],
    # Engines take tensors of the release's names, from wherever: they know no trainer.
    "k25_train.rollout": tuple(
        f"k25_train.{room}" for room in ("model", "optim", "objectives", "training", "rl")
    ),
}
"""Folder -> folders and packages that nothing in it imports. Cycles need no rule: no folder has any."""
STANDARD_LIBRARY_ONLY = (
    "parallel.config",
    "parallel.dispatcher",
    "parallel.pipeline",
    "launch.blame",
    "launch.history",
    "launch.recurrence",
    "launch.restart_policy",
)
"""Folders and modules that import nothing else but each other and `parallel.config`."""
TORCH_FREE = (
    "k25_train.config",
    "k25_train.parameters",
    "k25_train.plan",
    "k25_train.compose",
    "parallel.config",
    "parallel.dispatcher",
    "parallel.pipeline",
    "launch",
)
"""Folders and modules that a login node imports, which has no torch."""
TRITON_KERNELS = (
    "parallel.activations.fp8_triton",
    "k25_train.model.max_logits_triton",
    "k25_train.int4_triton",
)
"""Modules that may import Triton, which the CPU does without."""
TORCH_IN_LAUNCH = {
    "launch.agent",
    "launch.preflight.job",
    "launch.preflight.measure",
    "launch.preflight.coordination",
    "launch.preflight.raw_rates",
    "launch.preflight.same_job",
    "launch.preflight.shared_folder",
}
"""All of `launch` that imports torch: what becomes torchrun, and preflight once it measures."""
ON_NODES = [
    "supervisor",
    "standby",
    "attempt_steps",
    "srun",
    "preflight_rank",
    "node",
    "rank",
    "rendezvous",
    "standby",
]
"""Modules of `launch` for which the first node's Python may have nothing but the standard library."""


def within(name: str, package: str) -> bool:
    """Whether a dotted name is the package or lies in it."""
    return name == package or name.startswith(f"{package}.")


def is_torch_free(module: str) -> bool:
    """Whether a login node has to be able to import it."""
    return module not in TORCH_IN_LAUNCH and any(within(module, folder) for folder in TORCH_FREE)


def violations(name: str, imported: str) -> list[str]:
    """What is wrong with a module's importing a name."""
    found = [
        f"{name} imports {imported}, which {folder} may not"
        for folder, forbidden in FORBIDDEN.items()
        if within(name, folder) and any(within(imported, other) for other in forbidden)
    ]
    peers = [f"k25_train.{room}" for room in PEERS]
    own = next((peer for peer in peers if within(name, peer)), None)
    if own and any(within(imported, peer) for peer in peers if peer != own):
        found.append(f"{name} imports {imported}, but {own} does not know its peers")
    ours = ("environments", "errors", *(["subcommands"] if name.endswith(".__main__") else []))
    known = any(within(imported, f"k25_train.{own}") for own in ours)
    if within(name, "k25_train.environments") and within(imported, "k25_train") and not known:
        found.append(f"{name} imports {imported}, but environments know of ours the errors alone")
    if is_torch_free(name) and imported.split(".")[0] in ("torch", "megatron", "triton"):
        found.append(f"{name} imports {imported}, but a login node imports it and has no torch")
    pure = (*STANDARD_LIBRARY_ONLY, *sys.stdlib_module_names)
    is_pure = any(within(name, folder) for folder in STANDARD_LIBRARY_ONLY)
    if is_pure and not any(within(imported, other) for other in pure):
        found.append(f"{name} imports {imported}: it may need the standard library only")
    if within(imported, "transformers") and not within(name, "k25_train.rollout.engines.in_process"):
        found.append(f"{name} imports {imported}: the engine in process alone may")
    if within(name, "k25_train.rollout") and imported.split(".")[0] in ("httpx", "httpx2", "requests"):
        found.append(f"{name} imports {imported}: with 2,000 requests in its queue it answers 13 a second")
    if within(imported, "triton") and name not in TRITON_KERNELS:
        found.append(f"{name} imports {imported}: only {' and '.join(TRITON_KERNELS)} may, on CUDA")
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
        ("parallel.pipeline.balance", "parallel.dep.plan"),
        ("parallel.activations.fp8", "triton"),
        ("k25_train.model.moonvit", "k25_train.data.batch"),
        ("k25_train.objectives.base", "torch.distributed"),
        ("k25_train.train", "launch.slurm"),
        ("k25_train.parameters.released", "torch.nn"),
        ("k25_train.environments.sandboxes.one_shot", "k25_train.data.batch"),
        ("k25_train.config.schema", "omegaconf"),
        ("launch.slurm", "torch"),
        ("k25_train.rollout.engines.pool", "k25_train.training.run"),
        ("k25_train.rl.loop", "transformers"),
        ("k25_train.rollout.gateway.server", "httpx"),
    ],
)
def test_the_rules_catch(name: str, imported: str) -> None:
    assert violations(name, imported)


def test_rules_name_what_exists() -> None:
    modules = {module_name(path) for path in EVERY_FILE}
    for folder in (*FORBIDDEN, *STANDARD_LIBRARY_ONLY, *TORCH_FREE, *TORCH_IN_LAUNCH):
        assert any(within(module, folder) for module in modules), folder


def test_no_folder_and_no_files_import_each_other_in_a_cycle() -> None:
    imports = module_imports()
    assert not cycle_in(imports)
    for folder in folders(imports):
        assert not cycle_in(parts_of(folder, imports)), folder or "the whole"


def test_cycles_are_found() -> None:
    imports = {"a.b.c": {"a.d"}, "a.d": {"a.b.e"}, "a.b.e": set()}
    assert not cycle_in(imports)
    assert cycle_in(parts_of("a", imports)) in (["a.b", "a.d", "a.b"], ["a.d", "a.b", "a.d"])


def test_package_files_hold_no_code() -> None:
    """Code in `__init__.py` would run, and drag torch in, for every module below it."""
    for path in EVERY_FILE:
        if path.name == "__init__.py":
            statements = [
                node
                for node in ast.parse(path.read_text()).body
                # The guard against a foreign `parallel`, which has to come before any import from it.
                if ast.unparse(node) != "from k25_train.startup.packages import check_packages"
            ]
            assert all(isinstance(node, ast.Expr | ast.Assign) for node in statements), path


def test_what_a_login_node_needs_runs_without_torch() -> None:
    """All of it in one process: an import of torch anywhere fails it."""
    modules = [name for path in EVERY_FILE if is_torch_free(name := module_name(path))]
    assert "launch.slurm" in modules
    code = (
        "import importlib, sys; sys.modules['torch'] = sys.modules['megatron'] = None\n"
        f"for module in {modules}: importlib.import_module(module)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_supervision_needs_the_standard_library_only() -> None:
    """The first node's Python may have nothing else: the ranks' packages can be in a container."""
    blocked = "torch hydra omegaconf yaml rich numpy".split()
    modules = [f"launch.{name}" for name in ON_NODES]
    code = (
        f"import importlib, sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        f"for module in {modules}: importlib.import_module(module)"
    )
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
