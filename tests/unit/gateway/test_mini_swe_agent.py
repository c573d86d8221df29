"""mini-swe-agent, as it comes from the registry and in an environment of its own, acts as the policy."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from k25_train.rollout.trajectory import Ended
from tests.helpers.acting_agents import act
from tests.helpers.gateway_parts import call_text
from tests.helpers.sandboxes import needs_bubblewrap

PACKAGE = "mini-swe-agent==2.4.6"
SETTINGS = ("MSWEA_CONFIGURED=true", "MSWEA_COST_TRACKING=ignore_errors", "LITELLM_LOCAL_MODEL_COST_MAP=True")


def says(prompt: str) -> str:
    """Writes a file, looks at it, and is done."""
    done = prompt.count("## Return of")
    commands = ("echo 7 > made", "cat made", "echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT")
    return call_text("bash", json.dumps({"command": commands[done]}), done, said="I go on.")


@pytest.mark.slow
@needs_bubblewrap
@pytest.mark.skipif(shutil.which("uv") is None and not Path(sys.prefix, "bin/uv").exists(), reason="needs uv")
def test_an_agent_of_the_registry_acts_unmodified(tmp_path: Path) -> None:
    uv, environment = shutil.which("uv") or f"{sys.prefix}/bin/uv", tmp_path / "mini"
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, environment], check=True)
    subprocess.run([uv, "pip", "install", "-q", "--python", environment / "bin/python", PACKAGE], check=True)
    command = (
        "env", *SETTINGS, f"{environment}/bin/mini", "-y", "--exit-immediately", "-m", "openai/{model}",
        "-t", "{prompt}", "-o", "/tmp/trajectory.json",
    )  # fmt: skip
    acted, stage, trial = act(tmp_path, command, says)
    assert acted.ended is Ended.STOP
    roles = [message["role"] for message in acted.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert "What is in {model}?" in acted.messages[1]["content"]
    assert '"output": "7\\n"' in acted.messages[5]["content"]
    # One branch that grows: nothing of it was encoded twice, and all three turns are trained.
    assert len(trial.response.branches) == 1
    assert trial.response.num_turns == 3
    assert "agent/status_0" in stage.counts
