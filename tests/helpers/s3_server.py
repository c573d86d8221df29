"""An S3 server on localhost (moto's, over HTTP) and a proxy in front of it that can be made to fail."""

import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, override

KEYS = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
"""What the server takes. Others are refused by the proxy, as moto takes any."""
_OWNER = (
    f"AWS4-HMAC-SHA256 Credential={KEYS['AWS_ACCESS_KEY_ID']}/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
)


@dataclass(slots=True)
class Faults:
    """What the proxy does to requests for objects."""

    refusals: int = 0
    """Requests that are answered with 503 SlowDown before others are served."""
    stalls: int = 0
    """Requests that are accepted and never answered."""
    halves: int = 0
    """Requests that get half of their body, and the end of the connection."""
    cuts: int = 0
    """Uploads whose connection ends before they are answered; nothing of them reaches the server."""
    losses: int = 0
    """Uploads that reach the server, and whose connection ends before they are answered."""
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of each that came, in order."""

    def take(self, name: str) -> bool:
        """Whether a fault is due; it is used up."""
        left = getattr(self, name)
        setattr(self, name, max(left - 1, 0))
        return bool(left)


@dataclass(frozen=True, slots=True)
class S3:
    """A running server."""

    url: str
    """Of the proxy: the endpoint for readers."""
    behind: str
    """Of the server itself."""
    faults: Faults

    def put(self, bucket: str, files: dict[str, bytes]) -> None:
        """Make a bucket and write objects into it."""
        self._request("PUT", f"/{bucket}", b"")
        for name, data in files.items():
            self._request("PUT", f"/{bucket}/{name}", data)

    def _request(self, method: str, path: str, body: bytes) -> None:
        connection = HTTPConnection(self.behind.removeprefix("http://"))
        connection.request(method, path, body, {"Authorization": _OWNER})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        assert answer.status < 300, (path, answer.status)


@contextmanager
def s3_server() -> Iterator[S3]:
    """A server with no bucket, and the proxy in front of it."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem  # type: ignore[import-untyped]

    # fsspec keeps file systems by their options, and not by the endpoint that the environment names:
    # one of an earlier server would be given out again.
    S3FileSystem.clear_instance_cache()
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    faults = Faults()
    proxy = _Proxy(("127.0.0.1", 0), _handler(f"{host}:{port}", faults))
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield S3(f"http://127.0.0.1:{proxy.server_address[1]}", f"http://{host}:{port}", faults)
    finally:
        proxy.shutdown()
        proxy.server_close()
        server.stop()
        S3FileSystem.clear_instance_cache()


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give a request up are part of the tests."""


def _handler(behind: str, faults: Faults) -> type[socketserver.BaseRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve()

        def do_HEAD(self) -> None:
            self._serve()

        def do_PUT(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def do_DELETE(self) -> None:
            self._serve()

        def _serve(self) -> None:
            body = self._body()
            faults.requests.append((self.command, self.path, self.headers.get("Range", "")))
            if KEYS["AWS_ACCESS_KEY_ID"] not in self.headers.get("Authorization", ""):
                return self._refuse(403, "InvalidAccessKeyId")
            if faults.take("refusals"):
                return self._refuse(503, "SlowDown")
            if faults.take("stalls"):
                time.sleep(3600)
            connection = HTTPConnection(behind)
            if self.command == "PUT" and faults.take("cuts"):
                return self._hang_up()
            connection.request(self.command, self.path, body, dict(self.headers.items()))
            answer = connection.getresponse()
            data = answer.read()
            if self.command == "PUT" and faults.take("losses"):
                return self._hang_up()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "server", "date"):
                    self.send_header(name, value)
            self.end_headers()
            if self.command == "GET" and faults.take("halves"):
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                return self._hang_up()
            self.wfile.write(data)
            return None

        def _body(self) -> bytes:
            """What was uploaded."""
            if "100-continue" in self.headers.get("Expect", "").lower():
                del self.headers["Expect"]
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _hang_up(self) -> None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

        def _refuse(self, status: int, code: str) -> None:
            body = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing."""

    return Handler
