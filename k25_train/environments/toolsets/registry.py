"""Toolsets by name; those of other packages come by entry points.

[project.entry-points."k25_train.toolsets"]
dice = "my_package.dice:make_dice"
"""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from k25_train.environments.toolsets.base import MakeToolset, Toolset
from k25_train.environments.toolsets.browser import make_browser
from k25_train.environments.toolsets.files import make_files
from k25_train.environments.toolsets.mcp_server import make_mcp
from k25_train.environments.toolsets.python import make_python
from k25_train.environments.toolsets.search.tools import make_search
from k25_train.environments.toolsets.shell import make_shell
from k25_train.environments.toolsets.zoom import make_zoom
from k25_train.errors import ConfigError

GROUP = "k25_train.toolsets"
TOOLSETS: dict[str, MakeToolset] = {
    "shell": make_shell,
    "files": make_files,
    "python": make_python,
    "search": make_search,
    "browser": make_browser,
    "mcp": make_mcp,
    "zoom": make_zoom,
}
"""Name -> what makes it from its options."""


def make_toolset(name: str, options: Mapping[str, Any]) -> Toolset:
    """The toolset of that name. Raises ConfigError for a name that is not known, and for its options."""
    make = TOOLSETS.get(name) or _plug_in(name)
    if make is None:
        raise ConfigError(
            f"toolset {name!r}: there is none\n  -> use one of {', '.join(TOOLSETS)}, or install the package "
            f"that has it (entry points of the group {GROUP})"
        )
    return make(options)


@cache
def _plug_in(name: str) -> MakeToolset | None:
    """What an installed package declares; None if none does."""
    return next((each.load() for each in entry_points(group=GROUP, name=name)), None)
