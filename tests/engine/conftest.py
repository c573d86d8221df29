"""One vLLM server for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.helpers.vllm_engine import ServedRun, served_run


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedRun]:
    with served_run(tmp_path_factory.mktemp("served")) as run:
        yield run
