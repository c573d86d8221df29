"""Tools under the names that a task gives them: what the policy sees, and what its calls mean."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k25_train.environments.environment import Tool, ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownCall:
    """A call of a tool that there is."""

    name: str
    """Of the tool, as its toolset has it."""
    arguments: Mapping[str, Any]
    """By the names of its toolset."""
    schema: Mapping[str, Any]
    """What the arguments of the call itself have to be."""


class ShownTools:
    """Declarations as the policy sees them."""

    def __init__(self, declarations: tuple[Tool, ...], names: Mapping[str, Mapping[str, Any]]) -> None:
        """
        Args:
            declarations: of the toolsets.
            names: tool -> `name`, `description` and `arguments` (name -> name) that are shown instead.
        """
        self._real: dict[str, tuple[str, Mapping[str, str]]] = {}
        """Shown name -> real name, shown argument -> real one."""
        shown = []
        for each in declarations:
            name = each["function"]["name"]
            changed = renamed(each, names.get(name, {}))
            arguments = names.get(name, {}).get("arguments", {})
            self._real[changed["function"]["name"]] = (name, {new: old for old, new in arguments.items()})
            shown.append(changed)
        self.declarations: tuple[Tool, ...] = tuple(shown)
        self._schemas = {each["function"]["name"]: each["function"].get("parameters", {}) for each in shown}

    def known(self, call: ToolCall) -> KnownCall | None:
        """What a call means; None for a tool that there is not."""
        if call.name not in self._real:
            return None
        name, arguments = self._real[call.name]
        return KnownCall(
            name=name,
            arguments={arguments.get(key, key): value for key, value in call.arguments.items()},
            schema=self._schemas[call.name],
        )


def renamed(tool: Tool, names: Mapping[str, Any]) -> Tool:
    """A declaration under other names."""
    if not names:
        return tool
    changed: dict[str, Any] = copy.deepcopy(dict(tool))
    function = changed["function"]
    function["name"] = names.get("name", function["name"])
    function["description"] = names.get("description", function.get("description", ""))
    arguments, parameters = names.get("arguments", {}), function.get("parameters", {})
    if "properties" in parameters:
        properties = parameters["properties"]
        parameters["properties"] = {arguments.get(key, key): value for key, value in properties.items()}
        parameters["required"] = [arguments.get(key, key) for key in parameters.get("required", ())]
    return changed
