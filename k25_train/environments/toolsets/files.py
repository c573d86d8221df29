"""The toolset `files`: reads, writes, edits and lists files of the sandbox; images are shown. No options."""

from collections.abc import Mapping
from typing import Any

from k25_train.environments.environment import Tool
from k25_train.environments.sandboxes.base import WORK, SandboxSession
from k25_train.environments.toolsets.base import Place, ToolResult, declared, wrong
from k25_train.environments.toolsets.options import ToolOptions
from k25_train.environments.toolsets.shell import told

MAX_BYTES = 4 << 20
"""Longest file that is read. Our choice."""
IMAGES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8")
"""What files begin with that are shown as images."""
_PATH = {"type": "string", "minLength": 1, "description": f"Path, absolute or below {WORK}."}
_TEXT = {"type": "string"}
_LINE = {"type": "integer", "minimum": 1}
READ = declared(
    "read_file",
    "Read a file: text with the numbers of its lines, or an image.",
    {
        "path": _PATH,
        "first_line": {**_LINE, "description": "First line to show; 1 without."},
        "lines": {**_LINE, "description": "How many to show; all without."},
    },
    ("path",),
)
WRITE = declared("write_file", "Write a file, with its folders.", {"path": _PATH, "content": _TEXT},
                 ("path", "content"))  # fmt: skip
EDIT = declared(
    "edit_file",
    "Replace a text in a file, which has to be in it exactly once.",
    {"path": _PATH, "old": {"type": "string", "minLength": 1}, "new": _TEXT},
    ("path", "old", "new"),
)
LIST = declared("list_files", "List a folder; folders end with a slash.", {"path": _PATH}, ("path",))


class Files:
    """See `Toolset`."""

    declarations: tuple[Tool, ...] = (READ, WRITE, EDIT, LIST)
    needs_sandbox = True
    is_replayable = False
    files: Mapping[str, bytes] = {}

    async def open(self, place: Place) -> "_OpenFiles":
        """See `Toolset`."""
        return _OpenFiles(place.session, place.services.tool_timeout_s)


class _OpenFiles:
    declarations = Files.declarations

    def __init__(self, session: SandboxSession, limit_s: float) -> None:
        self._session = session
        self._limit_s = limit_s

    async def call(self, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Do what the tool of that name does."""
        path = str(arguments["path"])
        if "\0" in path:
            return wrong("a path has no zero bytes")
        try:
            if name == "list_files":
                command = ["/bin/ls", "-1Ap", "--", path]
                return told(await self._session.run(command, timeout_s=self._limit_s), self._limit_s)
            if name == "write_file":
                content = arguments["content"].encode(errors="replace")
                await self._session.write(path, content)
                return ToolResult(text=f"{path}: {len(content)} bytes written")
            content = await self._session.read(path, MAX_BYTES)
            if name == "edit_file":
                return await self._edit(path, content, arguments["old"], arguments["new"])
        except FileNotFoundError:
            return wrong(f"{path}: there is no such file")
        except (OSError, ValueError) as error:
            return wrong(f"{path}: {error}")
        return _shown(path, content, arguments)

    async def _edit(self, path: str, content: bytes, old: str, new: str) -> ToolResult:
        text = content.decode(errors="surrogateescape")
        if (count := text.count(old)) != 1:
            return wrong(f"{path}: the old text is in it {count} times, not once")
        changed = text.replace(old, new).encode(errors="surrogateescape")
        await self._session.write(path, changed)
        return ToolResult(text=f"{path}: {len(changed)} bytes written")

    async def close(self) -> None:
        """It holds nothing."""


def _shown(path: str, content: bytes, arguments: Mapping[str, Any]) -> ToolResult:
    if content.startswith(IMAGES):
        return ToolResult(text=f"{path}:", media=(content,))
    if b"\0" in content:
        return wrong(f"{path}: a binary file of {len(content)} bytes")
    lines = content.decode(errors="replace").splitlines()
    first = arguments.get("first_line", 1)
    shown = lines[first - 1 :][: arguments.get("lines", len(lines))]
    if not shown:
        return ToolResult(text=f"[{path} has {len(lines)} lines]")
    return ToolResult(text="\n".join(f"{first + place}\t{line}" for place, line in enumerate(shown)))


def make_files(options: Mapping[str, Any]) -> Files:
    """It has no options."""
    ToolOptions("files", options).end()
    return Files()
