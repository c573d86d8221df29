"""Illegal configurations, each a random legal one with one rule broken: refused with key, value, rule and
remedy, before any process group forms."""

import ast
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import parallel.config
from k25_train.compose import checks, context_checks, dispatcher_checks, reinforcement_checks, resolve
from k25_train.compose.resolve import compose, load, to_yaml
from k25_train.config import (
    algorithm,
    basics,
    batches,
    checkpoint,
    cluster,
    environment,
    fabric,
    forms,
    model,
    optimizer,
    rollout,
    sbatch_options,
    site,
    slurm,
    sources,
    span,
    training,
)
from k25_train.config import data as data_section
from k25_train.errors import ConfigError
from parallel.config import Problem
from tests.helpers.illegal_configs import BREAKS, as_arguments, legal_values
from tests.helpers.illegal_reinforcement import REINFORCEMENT_BREAKS
from tests.helpers.legal_config import Legal, Values
from tests.helpers.project_sources import REPO

WITH_RULES = (
    algorithm, basics, batches, checkpoint, checks, cluster, context_checks, data_section, dispatcher_checks,
    environment, fabric, forms, model, optimizer, parallel.config, reinforcement_checks, resolve, rollout,
    sbatch_options, site, slurm, sources, span, training,
)  # fmt: skip
"""The modules that report problems."""
PLAIN: Values = {
    "cluster.nodes": 1, "cluster.gpus_per_node": 8, "parallelism.pp": 4, "parallelism.vpp": 2,
    "parallelism.ep": 2, "parallelism.layout": None, "parallelism.overlap_expert_comm": True,
    "parallelism.delay_wgrad": True, "parallelism.overlap_grad_reduce": True,
    "parallelism.overlap_param_gather": True, "model.num_layers": 9, "model.num_dense_layers": 1,
    "model.num_experts": 8, "train.micro_batch_size": 1, "train.global_batch_size": 16,
    "train.eval_sequences": 8, "train.seq_len": 256, "optim.warmup": 5, "optim.decay": 5,
    "train.steps": 12,
}  # fmt: skip
"""One legal configuration, with everything switched on."""


@settings(max_examples=20)
@given(legal_values())
def test_what_is_drawn_is_legal(values: Values) -> None:
    config = compose(["experiment=smoke", *as_arguments(values)])
    assert config.world_size == values["cluster.nodes"] * values["cluster.gpus_per_node"]


def refusal(overrides: Sequence[str]) -> list[str]:
    """Lines of the error that these overrides end in."""
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=smoke", *overrides])
    return str(caught.value).splitlines()


def assert_reported(lines: list[str], key: str, rule: str, overrides: Values) -> None:
    """Key and value are in one line, the rule in the next, the remedy in the one after."""
    at = [i for i, line in enumerate(lines) if line.partition("=")[0] == f"  {key}" and rule in lines[i + 1]]
    assert at, "\n".join([f"no line on {key}: {rule}", *lines])
    shown, remedy = lines[at[0]], lines[at[0] + 2]
    assert remedy.startswith("      -> ") and len(remedy) > len("      -> ") + 3
    given = overrides.get(key)
    if isinstance(given, int) and not isinstance(given, bool):
        assert float(shown.partition("=")[2]) == given


@pytest.mark.parametrize("name", BREAKS)
@settings(max_examples=1)
@given(data=st.data())
def test_a_broken_rule_is_refused(name: str, data: st.DataObject) -> None:
    values = data.draw(legal_values(), "legal")
    legal = Legal(values, lambda wrong: data.draw(st.sampled_from(list(wrong))))
    changes, key, rule = BREAKS[name](legal)
    lines = refusal(as_arguments(values | changes))
    assert_reported(lines, key, rule, changes)


def sites() -> set[str]:
    """module:line of every `Problem(…)` in the source."""
    return {
        f"{module.__name__}:{node.lineno}"
        for module in WITH_RULES
        for node in ast.walk(ast.parse(inspect.getsource(module)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Problem"
    }


def test_every_place_that_reports_a_problem_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Read from a file, which is faster than composing each.
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(compose(["experiment=smoke", *as_arguments(PLAIN)])))
    reached: set[str] = set()

    def problem(*args: Any) -> Problem:
        frame = inspect.currentframe()
        assert frame is not None and frame.f_back is not None
        reached.add(f"{frame.f_back.f_globals['__name__']}:{frame.f_back.f_lineno}")
        return Problem(*args)

    for module in WITH_RULES:
        monkeypatch.setattr(module, "Problem", problem)
    legal = Legal(PLAIN, lambda wrong: wrong[0])
    for name in BREAKS.keys() - REINFORCEMENT_BREAKS.keys():
        with pytest.raises(ConfigError):
            load(saved, as_arguments(BREAKS[name](legal)[0]))
    for broken in REINFORCEMENT_BREAKS.values():
        with pytest.raises(ConfigError):
            compose(["experiment=smoke", *as_arguments(PLAIN | broken(legal)[0])])
    for arguments in ([], ["experiment=none"]):
        with pytest.raises(ConfigError):
            compose(arguments)
    missed = sorted(sites() - reached)
    assert not missed, f"no case of tests/helpers/illegal_configs.py BREAKS breaks the rules at {missed}"


REPORT = """
import json, sys
sys.argv[1:] = json.loads(sys.argv[1])
try:
    from k25_train.train import main
    main()
except SystemExit as end:
    import torch.distributed
    imported = any(name.partition(".")[0] == "megatron" for name in sys.modules)
    print(json.dumps([end.code, imported, torch.distributed.is_initialized()]))
"""


def test_the_command_ends_before_ranks_meet_and_megatron_core_is_imported() -> None:
    arguments = ["experiment=smoke", "parallelism.ep=3", "parallelism.delay_wgrad=true"]
    done = subprocess.run(
        [sys.executable, "-c", REPORT, json.dumps(arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPO,
        env={**os.environ, "RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"},
    )
    assert json.loads(done.stdout) == [2, False, False], done.stderr
    assert done.stderr.startswith(
        "ConfigError: 1 problem in the configuration\n  parallelism.delay_wgrad=True"
    )
    assert "Traceback" not in done.stderr
