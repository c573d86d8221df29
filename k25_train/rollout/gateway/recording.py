"""Where turns of agents are recorded: the session of a response (`rollout/session.py`)."""

import numpy as np

from k25_train.rollout.gateway.sessions import Recorder
from k25_train.rollout.prompts import Prompting
from k25_train.rollout.session import Session
from k25_train.rollout.turns import Place


def recorder_of(session: Session, prompts: Prompting) -> Recorder:
    """Record into a response."""

    def ids_until(place: Place) -> np.ndarray:
        return session.response.branches[place.branch].token_ids[: place.num_tokens]

    return Recorder(name=session.identity.task, turns=session, prompts=prompts, ids_until=ids_until)
