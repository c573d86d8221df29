"""A run that is watched from elsewhere: its metrics are an object of a real S3 server."""

import json

import pytest

from k25_train.metrics.watch.files import file_of
from k25_train.metrics.watch.following import Followed
from tests.helpers.s3_server import KEYS, s3_server


def lines(*steps: int) -> bytes:
    return b"".join(json.dumps({"step": step, "loss": 1.0}).encode() + b"\n" for step in steps)


def test_an_object_that_grows_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as server:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        server.put("runs", {"other": b""})
        followed = Followed(file_of("s3://runs/first"))
        assert not followed.poll() and not followed.exists
        for steps in ((1, 2), (1, 2, 3), (1,)):
            server.put("runs", {"first/metrics.jsonl": lines(*steps)})
            assert followed.poll()
            assert [row["step"] for row in followed.rows] == list(steps)
