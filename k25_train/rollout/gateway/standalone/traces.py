"""What agents do at a standalone gateway, as the journal of a run has it: `k25-rollout show` reads it.

FOLDER/config.yaml                        of the run whose engines these are: names the vocabulary
FOLDER/rollouts/journal/000000.log        each session is a group of one response, named by its task
"""

import shutil
from pathlib import Path

from k25_train.rollout.asking import Asking
from k25_train.rollout.gateway.recording import recorder_of
from k25_train.rollout.gateway.sessions import AgentSession, SessionRules
from k25_train.rollout.journal import Journal
from k25_train.rollout.journal_state import admitted
from k25_train.rollout.overview.groups import JOURNAL, ROLLOUTS
from k25_train.rollout.prompts import Prompts
from k25_train.rollout.response_records import ended
from k25_train.rollout.session import Identity, Session
from k25_train.rollout.trajectory import Ended, Group, Response
from k25_train.rollout.work import Round


class Traces:
    """Sessions on disk. Those that have ended are there alone, and take no memory."""

    def __init__(self, folder: Path, asking: Asking, prompts: Prompts) -> None:
        """Go on behind what is in the folder. Raises `RolloutError` as `Journal`."""
        self._journal = Journal(folder / ROLLOUTS / JOURNAL)
        self._journal.state.open.clear()
        self._asking, self._prompts = asking, prompts

    def begin(self, task: str, version: int, rules: SessionRules) -> tuple[int, AgentSession]:
        """A session of an agent, and the number of its group.

        Args:
            task: what it is called.
            version: of the weights that are served.
            rules: of the session.

        Raises `RolloutError` if the disk is full.
        """
        state = self._journal.state
        number = state.num_admitted
        stamp = {"source": "gateway"}
        group = Group(number=number, task=task, epoch=0, version=version, stamp=stamp, responses=[Response()])
        self._journal.append(admitted(group))
        group = state.open[number]
        session = Session(
            # Draws differ from session to session, and are the same for the same number.
            Identity(task=task, group=number, sample=0, seed=number),
            group.responses[0],
            group.media,
            asking=self._asking,
            vocabulary=self._prompts,
            allowed=Round(number=0),
            append=self._journal.append,
        )
        return number, AgentSession(recorder_of(session, self._prompts), rules)

    def end(self, number: int) -> None:
        """A session has ended; returns once all of it is on disk."""
        group = self._journal.state.open[number]
        self._journal.append(ended(number, 0, group.responses[0], Ended.STOP))
        self._journal.state.open.pop(number)
        self._journal.flush()

    def close(self) -> None:
        """Write what is left."""
        self._journal.close()


def keep_config(config: Path, folder: Path) -> None:
    """Put a run's configuration where those who read the traces look for it."""
    folder.mkdir(parents=True, exist_ok=True)
    if config.resolve() != (folder / "config.yaml").resolve():
        shutil.copyfile(config, folder / "config.yaml")
