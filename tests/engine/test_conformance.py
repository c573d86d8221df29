"""vLLM does what every engine promises: the tests are those of `tests/helpers/engine_promises.py`."""

import pytest

from tests.helpers.engine_promises import *  # noqa: F403 - every test of them
from tests.helpers.engine_subjects import Subject
from tests.helpers.vllm_engine import ServedRun

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def subject(served: ServedRun) -> Subject:
    return served.subject()
