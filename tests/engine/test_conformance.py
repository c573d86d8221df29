"""vLLM does what every engine promises: the tests are those of `tests/unit/rollout/test_engines.py`."""

import pytest

from tests.helpers.engine_subjects import Subject
from tests.helpers.vllm_engine import ServedRun
from tests.unit.rollout.test_engines import *  # noqa: F403 - every test of them

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def subject(served: ServedRun) -> Subject:  # type: ignore[no-redef]
    return served.subject()
