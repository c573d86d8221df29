"""Which session a request is of: by its path, or by its key. Both are random, and end with the session."""

import hashlib
import secrets
from collections.abc import Mapping
from typing import NamedTuple

from k25_train.rollout.gateway.conversation import Kind, RefusedError
from k25_train.rollout.gateway.sessions import AgentSession

KEY_PREFIX = "sk-k25-"
"""Keys look like OpenAI's and Anthropic's, since some clients check."""


class Access(NamedTuple):
    """How an agent reaches its session. Whoever has it may ask: it is shown to nobody else, nor logged."""

    session_id: str
    """In paths: 32 hexadecimal digits."""
    key: str
    """As a bearer's, or in `x-api-key`."""

    def __repr__(self) -> str:
        """Without what is secret."""
        return f"Access(session {self.session_id[:6]}…)"


class Registry:
    """Sessions that are open."""

    def __init__(self) -> None:
        self._by_id: dict[str, AgentSession] = {}
        self._by_key: dict[str, str] = {}

    def admit(self, session: AgentSession) -> Access:
        """Let an agent ask."""
        access = Access(secrets.token_hex(16), KEY_PREFIX + secrets.token_urlsafe(32))
        self._by_id[access.session_id] = session
        self._by_key[_hidden(access.key)] = access.session_id
        return access

    async def close(self, access: Access) -> None:
        """End a session, and what is in flight. Twice is as once."""
        session = self._by_id.pop(access.session_id, None)
        self._by_key.pop(_hidden(access.key), None)
        if session is not None:
            await session.close()

    async def close_all(self) -> None:
        """End all sessions."""
        sessions = list(self._by_id.values())
        self._by_id.clear()
        self._by_key.clear()
        for session in sessions:
            await session.close()

    def __len__(self) -> int:
        return len(self._by_id)

    def find(self, session_id: str | None, headers: Mapping[str, str]) -> AgentSession:
        """The session of a request.

        `session_id`: that its path names, None where it names none. Raises `RefusedError` if it has ended or
        never was, and for the key of another one.
        """
        of_key = self._by_key.get(_hidden(key_of(headers)))
        if session_id is None:
            if of_key is None:
                raise RefusedError(
                    Kind.unauthorized,
                    "no session has this key: it has ended with its rollout, or never was. Give the agent "
                    "the key of its session, or have its base URL end with /sessions/ID",
                )
            session_id = of_key
        elif of_key is not None and of_key != session_id:
            raise RefusedError(Kind.unauthorized, "the key is that of another session than the path's")
        session = self._by_id.get(session_id)
        if session is None:
            raise RefusedError(
                Kind.unknown, "there is no such session: it has ended with its rollout, or never was"
            )
        return session


def key_of(headers: Mapping[str, str]) -> str:
    """The key of a request; empty where it has none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def _hidden(key: str) -> str:
    """What keys are looked up by, so that the time it takes tells nothing of them."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
