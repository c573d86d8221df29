"""Tools as Kimi K2.5 declares them to the model: JSON schemas as types in the manner of TypeScript.

Source of the format: `tool_declaration_ts.py` and `tokenization_kimi.py` of moonshotai/Kimi-K2.5. Schemas are
sorted by key first. Schemas that have no such form are declared as compact JSON, all of them, as there.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_INDENT = "  "
_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
}
_UNION_NAMES = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}
_ENUM_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
}


def declare_tools(tools: Sequence[dict[str, Any]]) -> str:
    """The text that declares tools, in the form of OpenAI's API; those that are no functions are left out."""
    ordered = [_sorted(tool) for tool in tools]
    try:
        functions = [tool["function"] for tool in ordered if tool.get("type") == "function"]
        declared = [_function(function) for function in functions if function]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        declared = []
    if not declared:
        return json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))
    return "# Tools\n\n## functions\nnamespace functions {\n" + "\n".join(declared) + "\n}\n"


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(each) for key, each in sorted(value.items())}
    return [_sorted(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class _Type:
    """A schema, read; its text depends on how deep it is printed."""

    text: Callable[[str], str]
    """From indentation to what follows the colon."""
    description: str = ""
    constraints: tuple[str, ...] = ()

    def comment(self, indent: str) -> str:
        """Lines before the name, each with its end; empty for none."""
        lines = [_comment(self.description, indent)] if self.description else []
        lines += [f"{indent}// {', '.join(self.constraints)}"] if self.constraints else []
        return "".join(f"{line}\n" for line in lines)


@dataclass(frozen=True, slots=True)
class _Property:
    name: str
    type: _Type
    is_optional: bool
    default: Any

    def text(self, indent: str) -> str:
        """Comments, name and type."""
        comment = self.type.comment(indent)
        if self.default is not None:
            plain = isinstance(self.default, int | float)
            shown = repr(self.default) if plain else json.dumps(self.default, ensure_ascii=False)
            comment += f"{indent}// Default: {shown}\n"
        return f"{comment}{indent}{self.name}{'?' if self.is_optional else ''}: {self.type.text(indent)}"


@dataclass(slots=True)
class _Reader:
    """Reads the schemas of one function."""

    definitions: dict[str, Any] = field(default_factory=dict)
    """Of `$defs`, as far as they were met."""
    refers_to_root: bool = False

    def read(self, schema: Any) -> _Type:
        """Any schema. Raises ValueError and others for one that has no such form."""
        if isinstance(schema, bool):
            return _fixed("any" if schema else "null")
        if "$ref" in schema:
            return _fixed(self._name_of(schema["$ref"]), schema)
        if "anyOf" in schema:
            types = [self.read(each) for each in schema["anyOf"]]
            return _Type(lambda indent: " | ".join(each.text(indent) for each in types), _described(schema))
        if "enum" in schema:
            _check_enum(schema)
            shown = (f'"{each}"' if isinstance(each, str) else str(each) for each in schema["enum"])
            return _fixed(" | ".join(shown), schema)
        if "type" not in schema:
            if schema == {}:
                return _fixed("any")
            raise ValueError("a schema needs a type")
        kind = schema["type"]
        if isinstance(kind, list):
            return _fixed(" | ".join(_UNION_NAMES[each] for each in kind), schema)
        if kind == "object":
            properties, others = self.read_object(schema)
            return _Type(lambda indent: _object_text(properties, others, indent), _described(schema))
        if kind == "array":
            return self._array(schema)
        constraints = _constraints(schema, _CONSTRAINTS.get(kind, ()))
        return _fixed("number" if kind == "integer" else kind, schema, constraints)

    def read_object(self, schema: dict[str, Any]) -> tuple[list[_Property], _Type | None]:
        """Its properties in their order, and the type of those that it does not name; None if not said."""
        self.definitions.update(schema.get("$defs") or {})
        rest = schema.get("additionalProperties")
        others = None
        if isinstance(rest, dict):
            others = self.read(rest)
        elif rest is not None:
            others = _fixed({True: "any", False: "never"}[rest])
        required = set(schema.get("required", ()))
        properties = [
            _Property(
                name,
                self.read(each),
                name not in required,
                each.get("default") if isinstance(each, dict) else None,
            )
            for name, each in schema.get("properties", {}).items()
        ]
        return properties, others

    def _array(self, schema: dict[str, Any]) -> _Type:
        item = self.read(schema["items"]) if schema.get("items") else _fixed("any")

        def text(indent: str) -> str:
            inner = indent + _INDENT
            comment = item.comment(inner)
            if not comment:
                return f"Array<{item.text(indent)}>"
            return f"Array<\n{comment}{inner}{item.text(inner)}\n{indent}>"

        return _Type(text, _described(schema), _constraints(schema, ("maxItems", "minItems")))

    def _name_of(self, reference: str) -> str:
        if reference == "#":
            self.refers_to_root = True
            return "parameters"
        name = reference.split("/")[-1]
        if not reference.startswith("#/$defs/") or not isinstance(self.definitions.get(name), dict):
            raise ValueError(f"{reference} leads nowhere")
        return name


def _function(function: dict[str, Any]) -> str:
    """A function's types, description and signature."""
    # 1. All that its parameters refer to, before what they refer to is read itself.
    reader = _Reader()
    properties, others = reader.read_object(function.get("parameters") or {})
    lines = []
    argument = _object_text(properties, others, "")
    if reader.refers_to_root:
        argument = "parameters"
        inner = ",\n".join(each.text(_INDENT) for each in properties)
        lines.append(f"interface parameters {{\n{inner}\n}}" if inner else "interface parameters {}")

    # 2. Named types, then the function.
    for name, schema in dict(reader.definitions).items():
        described = reader.read(schema).text("")
        if schema.get("description"):
            lines.append(_comment(schema["description"]))
        lines.append(f"interface {name} {described}")
    if function.get("description"):
        lines.append(_comment(function["description"]))
    lines.append(f"type {function.get('name', 'function')} = (_: {argument}) => any;")
    return "\n".join(lines)


def _object_text(properties: list[_Property], others: _Type | None, indent: str) -> str:
    inner = indent + _INDENT
    ordered = sorted(properties, key=lambda each: (each.is_optional, each.name))
    texts = [each.text(inner) for each in ordered]
    if others is not None:
        texts.append(f"{inner}[k: string]: {others.text(inner)}")
    return "{\n" + ",\n".join(texts) + f"\n{indent}}}" if texts else "{}"


def _fixed(text: str, schema: dict[str, Any] | None = None, constraints: tuple[str, ...] = ()) -> _Type:
    return _Type(lambda indent: text, _described(schema or {}), constraints)


def _described(schema: dict[str, Any]) -> str:
    description: str = schema.get("description", "")
    return description


def _constraints(schema: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"{name}: {schema[name]}" for name in names if name in schema)


def _comment(description: str, indent: str = "") -> str:
    return "\n".join(f"{indent}// {line}" if line else "" for line in description.split("\n"))


def _check_enum(schema: dict[str, Any]) -> None:
    """Raises ValueError unless all values are of the type that the schema states, if it states one."""
    kind = schema.get("type", "")
    if isinstance(kind, list):
        others = [each for each in kind if each != "null"]
        if not kind or len(kind) > 2 or len(others) == 2:
            raise ValueError("values of several types")
        kind = others[0] if others else "null"
    allowed = _ENUM_TYPES.get(kind, (object,))
    if not all(value is None or isinstance(value, allowed) for value in schema["enum"]):
        raise ValueError(f"not all values of an enum are of type {kind}")
