"""Queries to SLURM, whose commands are scripts: states, retries and arguments."""

import pytest

from k25_train.run_folder import jobs
from k25_train.run_folder.jobs import SchedulerError, ask, job_state
from k25_train.run_folder.passing import passes
from launch import scheduler
from launch.scheduler import unusable
from tests.helpers.scripted_job import ScriptedJob


@pytest.mark.parametrize(
    ("state", "is_usable"),
    [
        ("allocated", True), ("mixed-", True), ("idle", True), ("completing", True), ("idle@", True),
        ("allocated*", False), ("down", False), ("down*", False), ("draining", False), ("drained*", False),
        ("failing", False), ("unknown", False), ("idle~", False),
    ],
)  # fmt: skip
def test_states_of_nodes(job: ScriptedJob, state: str, is_usable: bool) -> None:
    job.set_states(n2=state)
    assert unusable(["n1", "n2"]) == ({} if is_usable else {"n2": state})


@pytest.mark.parametrize("state", ["unknown", "unknown*"])
def test_nodes_that_the_controller_has_not_heard_of_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """As after its restart: they are there, and nobody's ranks were lost with them."""
    answers = [{"n1": state, "n2": state}, {"n1": "mixed", "n2": state}, {"n1": "mixed", "n2": "down"}]
    looks = iter(answers)
    monkeypatch.setattr(scheduler, "node_states", lambda patience_s, *selection: next(looks))
    monkeypatch.setattr(scheduler, "LOOK_S", 0.01)
    assert unusable(["n1", "n2"], patience_s=3600.0) == {"n2": "down"} and not list(looks)
    # Not for ever, and not by a command that a user waits for.
    monkeypatch.setattr(scheduler, "node_states", lambda patience_s, *selection: answers[0])
    monkeypatch.setattr(scheduler, "HEARD_S", 0.05)
    for patience_s in (0.0, 3600.0):
        assert unusable(["n1", "n2"], patience_s) == answers[0]


def answer_first(job: ScriptedJob, tool: str, words: str, *, times: int = 2) -> None:
    """Have a command fail with these words, and then do as before."""
    path = job.folder / "bin" / tool
    path.rename(path.with_name(f"real_{tool}"))
    path.write_text(
        f"""#!/bin/sh
echo x >> {job.folder}/asked
if [ "$(wc -l < {job.folder}/asked)" -le {times} ]; then
    echo '{tool}: error: {words.replace("'", "")}' >&2; exit 1
fi
exec sh {path.with_name(f"real_{tool}")} "$@"
"""
    )
    path.chmod(0o755)


PASSING_ANSWERS = [
    "Unable to contact slurm controller (connect failure)",
    "Unable to contact slurm controller (receive failure)",
    "slurm_load_jobs error: Socket timed out on send/recv operation",
    "slurm_receive_msgs: Zero Bytes were transmitted or received",
    "Slurm backup controller in standby mode",
    "Controller is in standby mode, try a different controller",
    "Rate limit exceeded, please retry momentarily",
    "Job can not be altered now, try again later for job 7",
    "Job update not available right now, the DB index is being set, try again in a bit for job 7",
    "Job/step already completing or completed",
    "Job is in transitional state, retry later",
    "Duplicate job id",
    "Requested nodes are busy",
    "Slurm temporarily unable to accept job, sleeping and retrying: Resource temporarily unavailable",
    "Unable to connect to database",
    "Protocol authentication error",
    "Invalid authentication credential",
    "Munge encode failed: Failed to access /run/munge/munge.socket.2 (Did you start munged?)",
    "Munge decode failed: Expired credential",
    "Munge decode failed: Rewound credential",
    "If munged is up, restart with --num-threads=10",
    "_slurm_send_recv_msg: Transport endpoint is not connected",
    "connect: Connection refused",
    "fatal: Could not establish a configuration source",
    "resolve: Temporary failure in name resolution",
    "The scheduler of this site is restarting, TRY AGAIN in a minute",
]
REFUSALS = [
    "Access/permission denied",
    "Batch job submission failed: Invalid account or account/partition combination specified",
    "Batch job submission failed: Requested node configuration is not available",
    "Job violates accounting/QOS policy (job submit limit, users size and/or time limits)",
    "Invalid qos specification",
    "invalid partition specified: mian",
    "Requested operation is presently disabled",
    "System submissions disabled",
    "Unable to open file submit.sbatch",
    "Job dependency problem",
    "Node count specification invalid",
    "Job credential revoked",
    "authentication plugin auth/munge not found",
]


@pytest.mark.parametrize("words", PASSING_ANSWERS)
def test_trouble_that_passes_is_told_from_refusals(words: str) -> None:
    assert passes(f"scontrol: error: {words}")


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals_are_told_from_trouble_that_passes(words: str) -> None:
    assert not passes(f"sbatch: error: {words}")


@pytest.mark.parametrize("tool", ["squeue", "sinfo", "scontrol"])
def test_trouble_that_passes_is_waited_out_by_every_command(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tool: str
) -> None:
    monkeypatch.setattr(jobs, "RETRY_S", 0.01)
    answer_first(job, tool, "Munge decode failed: Expired credential")
    if tool == "squeue":
        assert job_state(7, patience_s=60.0) == "RUNNING"
    elif tool == "sinfo":
        assert scheduler.members("main", patience_s=60.0) == {"n1", "n2", "n3", "n4"}
    else:
        assert scheduler.excluded_nodes(7, patience_s=60.0) == []
    assert "Expired credential: that passes; asking again, 0 of at most 60 s" in capsys.readouterr().out


@pytest.mark.parametrize("operation", ["requeue", "update"])
@pytest.mark.parametrize("words", ["the DB index is being set, try again in a bit", "Connection refused"])
def test_a_job_goes_back_once_the_controller_can(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch, operation: str, words: str
) -> None:
    monkeypatch.setattr(jobs, "RETRY_S", 0.01)
    tool = job.folder / "bin/scontrol"
    failing = f"""
echo "$*" >> "$FAKE/scontrol.calls"
if [ "$1" = {operation} ] && [ "$(grep -c ^{operation} "$FAKE/scontrol.calls")" -le 3 ]; then
    echo '{words}' >&2; exit 1
fi"""
    tool.write_text(f"#!/bin/sh\n{failing}\n")
    scheduler.requeue(7, 2, 3, [], patience_s=60.0)
    calls = [call.split()[0] for call in job.calls("scontrol")]
    assert calls.count(operation) == 4 and calls[-1] == "update"


@pytest.mark.parametrize("end", ["exit 1", "kill -9 $$"])
def test_a_command_that_ends_without_a_word_is_called_again_for_a_while(
    job: ScriptedJob, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(jobs, "RETRY_S", 0.01)
    monkeypatch.setattr(jobs, "SILENT_S", 0.5)
    tool = job.folder / "bin/squeue"
    tool.write_text(
        f'#!/bin/sh\n[ -f {job.folder}/asked ] && exec cat "$FAKE/state"\ntouch {job.folder}/asked; {end}\n'
    )
    assert job_state(7, patience_s=3600.0) == "RUNNING"
    tool.write_text(f"#!/bin/sh\n{end}\n")
    with pytest.raises(SchedulerError, match="ended without a word"):
        job_state(7, patience_s=3600.0)


def test_a_refusal_of_the_requeue_is_not_waited_on(job: ScriptedJob) -> None:
    refuse = "#!/bin/sh\necho 'Requested operation is presently disabled for job 7' >&2; exit 1\n"
    (job.folder / "bin/scontrol").write_text(refuse)
    with pytest.raises(SchedulerError, match="presently disabled"):
        scheduler.requeue(7, 2, 3, [], patience_s=3600.0)


@pytest.mark.parametrize(
    ("words", "expected"),
    [("Invalid job id specified", None), ("slurm_load_jobs error: Access denied", "error")],
)
def test_other_errors_are_not_waited_for(job: ScriptedJob, words: str, expected: str | None) -> None:
    (job.folder / "bin/squeue").write_text(f"#!/bin/sh\necho 'squeue: {words}' >&2; exit 1\n")
    if expected is None:
        assert job_state(7, patience_s=600.0) is None
    else:
        with pytest.raises(SchedulerError, match="Access denied"):
            job_state(7, patience_s=600.0)


def test_a_task_of_a_job_array_is_told_from_the_others(job: ScriptedJob) -> None:
    """The array's number is also the number of one task; asked for it, squeue lists all."""
    job.set_job_state("8|PENDING n1\n9|COMPLETED\n7|RUNNING n2")
    assert job_state(7) == "RUNNING"
    assert job_state(9) == "COMPLETED"
    assert job_state(5) is None


def test_what_users_have_slurm_hide_is_seen(job: ScriptedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    (job.folder / "bin/squeue").write_text('#!/bin/sh\necho "${SQUEUE_USERS:-RUNNING}"\n')
    monkeypatch.setenv("SQUEUE_USERS", "somebody")
    assert job_state(7) == "RUNNING"


def test_arguments_reach_slurm_as_they_are(job: ScriptedJob) -> None:
    ask("scontrol", "show", "a b", "$(touch x)")
    assert job.calls("scontrol") == ["show a b $(touch x)"]
