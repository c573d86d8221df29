"""A verifiers environment server as it is spoken to: ZeroMQ and msgpack, frames of one DEALER.

    [request, "run", {task_data, client, model, sampling}] ─►
                                   ◄─ [request, "delta", what has changed of a trace] …
                                   ◄─ [request, "reply", {success, error, head, traces}]

Source: verifiers 0.4, `v1/serve/{client,server,types,delta}.py`.
"""

import asyncio
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from k25_train.environments.environment import EnvironmentFaultError
from k25_train.errors import MachineError

NO_KEY = "K25_NO_KEY"
"""Environment variable that no server has: sessions are known by their path."""


@dataclass(slots=True)
class Trace:
    """What an episode of theirs has come to, of one agent."""

    rewards: Mapping[str, Any] = field(default_factory=dict)
    """Name -> {score, weight}."""
    trainable: bool = True
    """Whether the policy plays it."""
    errors: list[Mapping[str, Any]] = field(default_factory=list)
    """What went wrong."""

    def apply(self, delta: Mapping[str, Any]) -> None:
        """Take a change in."""
        changed = delta.get("set") or {}
        self.rewards = changed.get("rewards", self.rewards)
        self.trainable = changed.get("agent", {}).get("trainable", self.trainable)
        self.errors += delta.get("errors") or []


class VerifiersWire:
    """One connection, for one attempt."""

    def __init__(self, address: str) -> None:
        """To be made where an event loop runs. Raises MachineError without what it needs.

        `address`: such as `tcp://127.0.0.1:5000`.
        """
        try:
            import msgpack  # type: ignore[import-untyped]
            import zmq.asyncio
        except ImportError as error:
            raise MachineError(
                f"verifiers servers are spoken to with {error.name}: `pip install k25-train[agents]`"
            ) from error
        self.address = address
        self._pack, self._unpack, self._error = msgpack.packb, msgpack.unpackb, zmq.ZMQError
        self._socket = zmq.asyncio.Context.instance().socket(zmq.DEALER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self._socket.setsockopt(option, 0)
        self._socket.connect(address)

    def close(self) -> None:
        """Close it."""
        self._socket.close(linger=0)

    async def health(self, timeout_s: float) -> None:
        """Raises EnvironmentFaultError unless the server answers in time."""
        try:
            async with asyncio.timeout(timeout_s):
                request = await self._send("health", {})
                answer = await self._reply(request, "health", {})
        except TimeoutError as error:
            raise self.fault(
                "health",
                f"no answer within {timeout_s:g} s",
                "start it, or correct options.address of its source; a name or port that is wrong does not "
                "answer either",
            ) from error
        if not answer.get("success"):
            raise self.fault("health", f"it says {answer.get('error')}", "its log says more")

    async def run(
        self, task: Mapping[str, Any], base_url: str, model: str, sampling: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], list[Trace]]:
        """Have an episode played against an endpoint: its head, and its traces.

        Args:
            task: dumped `TaskData`.
            base_url: OpenAI's API of the policy, with `/v1`.
            model: name that the endpoint is asked for.
            sampling: verifiers' `SamplingConfig`.

        Raises EnvironmentFaultError. Cancelled, it has the server end the episode.
        """
        client = {"type": "eval", "base_url": base_url, "api_key_var": NO_KEY}
        body = {"task_data": task, "client": client, "model": model, "sampling": sampling}
        traces: dict[str, Trace] = {}
        request = await self._send("run", body)
        try:
            answer = await self._reply(request, "run", traces)
        except asyncio.CancelledError:
            await asyncio.shield(self._send("cancel", {"request_id": request.decode()}))
            raise
        if not answer.get("success") or not isinstance(answer.get("head"), Mapping):
            raise self.fault("run", f"it says {answer.get('error')}", "its log says more")
        listed = [str(each["id"]) for each in answer.get("traces", ())]
        if missing := [each for each in listed if each not in traces]:
            raise self.fault("run", f"no word of trace {missing[0]}", "was it restarted?")
        return answer["head"], [traces[each] for each in listed]

    def fault(self, asked: str, what: str, remedy: str) -> EnvironmentFaultError:
        """The error of a request."""
        return EnvironmentFaultError(f"verifiers server {self.address}, {asked}: {what}\n  -> {remedy}")

    async def _send(self, method: str, body: Mapping[str, Any]) -> bytes:
        request = uuid.uuid4().hex.encode()
        await self._socket.send_multipart([request, method.encode(), self._pack(body, use_bin_type=True)])
        return request

    async def _reply(self, request: bytes, asked: str, traces: dict[str, Trace]) -> Mapping[str, Any]:
        """The reply to a request; what comes before it is taken into the traces."""
        while True:
            frames = await self._socket.recv_multipart()
            if len(frames) != 3:
                raise self.fault(
                    asked, f"{len(frames)} frames instead of 3", "it has to be a server of verifiers 0.4"
                )
            if frames[0] != request:
                continue
            try:
                content = self._unpack(frames[2], raw=False, strict_map_key=False)
                if frames[1] == b"reply":
                    return dict(content)
                if content.get("discard"):
                    traces.pop(content["trace"], None)
                else:
                    traces.setdefault(content["trace"], Trace()).apply(content)
            except Exception as error:
                # msgpack raises whatever its input leads to.
                raise self.fault(
                    asked,
                    f"a frame that cannot be read ({type(error).__name__}: {error})",
                    "it has to be a server of verifiers 0.4, reached without anything between",
                ) from error
