"""Tests share what is in `tests/helpers`, and nothing else: any test module can be moved or removed."""

from pathlib import Path

import pytest

from tests.helpers.project_sources import imports_of, in_test_modules, relative, source_files


@pytest.mark.parametrize("path", source_files("tests"), ids=relative)
def test_no_module_imports_a_test_module(path: Path) -> None:
    assert in_test_modules(imports_of(path)) == []


def test_an_imported_test_module_is_found() -> None:
    names = ["tests.helpers.runs.fit", "tests.distributed.test_resume.assert_close", "torch.testing"]
    assert in_test_modules(names) == ["tests.distributed.test_resume.assert_close"]
