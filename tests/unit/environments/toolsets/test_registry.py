"""Toolsets come by name, from here and from packages: the one that the README shows does."""

import asyncio
import re
import sys
from pathlib import Path

import pytest

from k25_train.environments.toolsets import base, registry
from k25_train.environments.toolsets.registry import make_toolset
from k25_train.environments.toolsets.schema import faults

README = Path(base.__file__).with_name("README.md")


def test_the_toolset_of_the_readme_comes_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(
        r"```python\n# my_package/dice.py\n(.*?)```", README.read_text(encoding="utf-8"), re.S
    )
    assert len(code.splitlines()) <= 25
    package, info = tmp_path / "my_package", tmp_path / "my_package-1.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "dice.py").write_text(code, encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(
        f"[{registry.GROUP}]\ndice = my_package.dice:make_dice\n", encoding="utf-8"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    toolset = make_toolset("dice", {})

    async def run() -> str:
        tools = await toolset.open(base.Place(task="t/1", sandbox=None, services=None))  # type: ignore[arg-type]
        return (await tools.call("roll", {"dice": 3})).text

    assert re.fullmatch(r"\[[1-6], [1-6], [1-6]\]", asyncio.run(run()))
    assert list(faults({"dice": 0}, toolset.declarations[0]["function"]["parameters"]))


def test_every_toolset_is_in_the_readme() -> None:
    text = README.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in registry.TOOLSETS)


@pytest.mark.parametrize(
    ("value", "schema", "found"),
    [
        ({"a": 1}, {"type": "object", "properties": {"a": {"type": "integer"}}}, []),
        ({"a": True}, {"properties": {"a": {"type": "integer"}}}, ["a must be integer, not boolean"]),
        ({"a": 1.5}, {"properties": {"a": {"type": "number", "maximum": 1}}}, ["a must be at most 1"]),
        ({"a": [1]}, {"properties": {"a": {"items": {"type": "null"}}}}, ["a[0] must be null, not integer"]),
        ({"a": "x"}, {"properties": {"a": {"enum": ["y"]}}}, ["a must be one of 'y'"]),
        ({"a": ""}, {"properties": {"a": {"minLength": 1}}}, ["the length of a must be at least 1"]),
        ({"a": {"b": 1}}, {"properties": {"a": {"required": ["c"]}}}, ["a.c is missing"]),
        ({"a": None}, {"properties": {"a": {"type": ["string", "null"]}}}, []),
        ({"a": 1}, {"properties": {"a": {"$ref": "#/x"}}}, []),
    ],
)  # fmt: skip
def test_arguments_are_held_against_the_schema(
    value: object, schema: dict[str, object], found: list[str]
) -> None:
    assert list(faults(value, schema)) == found
