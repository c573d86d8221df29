"""Calls that turn input into code, or write where an archive says, found by a file's syntax tree."""

import ast
from collections.abc import Iterator

_RUNS = {
    "eval": "evaluates a text",
    "exec": "runs a text",
    "compile": "makes code of a text",
    "__import__": "imports a name that is computed",
}
"""Built-in functions."""
_MODULES = {
    "pickle": "a pickle runs what it names",
    "_pickle": "a pickle runs what it names",
    "cPickle": "a pickle runs what it names",
    "dill": "a pickle runs what it names",
    "cloudpickle": "a pickle runs what it names",
    "joblib": "reads pickles",
    "shelve": "reads pickles",
    "marshal": "makes code of bytes",
    "runpy": "runs a module that is computed",
}
"""Modules of which every call counts."""
_ATTRIBUTES = {
    "system": "runs a shell",
    "popen": "runs a shell",
    "extract": "writes where an archive says",
    "extractall": "writes where an archive says",
    "unpack_archive": "writes where an archive says",
    "import_module": "imports a name that is computed",
    "all_gather_object": "pickles between ranks",
    "broadcast_object_list": "pickles between ranks",
    "gather_object": "pickles between ranks",
    "scatter_object_list": "pickles between ranks",
    "recv_object_list": "pickles between ranks",
    "unsafe_load": "makes objects that a YAML tag names",
    "full_load": "makes objects that a YAML tag names",
}
"""Methods and functions of modules, by their last name."""


def dangerous_calls(source: str) -> Iterator[tuple[str, str]]:
    """Call, such as `pickle.loads`, and why it is dangerous, for each in a source text."""
    tree = ast.parse(source)
    names = dict(_imported_names(tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _dotted(node.func, names)
        reason = _reason(name, node)
        if reason:
            yield name, reason


def _reason(name: str, call: ast.Call) -> str:
    """Why a call is dangerous; empty if it is not."""
    first, _, last = name.partition(".")[0], "", name.rpartition(".")[2]
    options = {option.arg: option.value for option in call.keywords}
    if name in _RUNS:
        return _RUNS[name]
    if first in _MODULES and "." in name:
        return _MODULES[first]
    if last in _ATTRIBUTES and "." in name:
        return _ATTRIBUTES[last]
    if _is_true(options.get("shell")):
        return "runs a shell"
    if name == "torch.load" and not _is_true(options.get("weights_only")):
        return "reads a pickle: weights_only=True does not"
    if last == "load" and first in ("np", "numpy") and _is_true(options.get("allow_pickle")):
        return "reads a pickle"
    if name in ("yaml.load", "yaml.load_all"):
        loader = options.get("Loader") or (call.args[1] if len(call.args) > 1 else None)
        is_safe = loader is not None and _dotted(loader, {}).endswith(("SafeLoader", "BaseLoader"))
        return "" if is_safe else "makes objects that a YAML tag names"
    return ""


def _imported_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name in the file -> dotted name of what it is imported from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((each.asname, each.name) for each in node.names if each.asname)
        elif isinstance(node, ast.ImportFrom):
            yield from ((each.asname or each.name, f"{node.module}.{each.name}") for each in node.names)


def _dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`a.b.c` of an expression, with imported names in full; a call or an index counts as `()`."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return "()"


def _is_true(value: ast.expr | None) -> bool:
    """Whether an option is given and is not plainly off."""
    return value is not None and not (isinstance(value, ast.Constant) and not value.value)
