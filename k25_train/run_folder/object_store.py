"""Whether a node can use the object store that checkpoints go to."""

from typing import Any


def trouble_with(url: str, name: str) -> str | None:
    """Write, list, read and delete an object below a URL; what is wrong, or None.

    Args:
        url: `checkpoint.dir`.
        name: of the object; no other node's.
    """
    fs: Any
    try:
        # Clients of object stores are imported where there is one.
        import fsspec  # type: ignore[import-untyped]

        fs, folder = fsspec.core.url_to_fs(url, use_listings_cache=False)
        path = f"{folder.rstrip('/')}/{name}"
        fs.pipe_file(path, name.encode())
        try:
            listed = [each.rstrip("/").rsplit("/", 1)[-1] for each in fs.ls(folder, detail=False)]
            if name not in listed:
                return "does not list what was written there a moment ago"
            if fs.cat_file(path) != name.encode():
                return "gives back something else than was written"
        finally:
            fs.rm_file(path)
    except Exception as error:  # clients have errors of their own for everything
        return f"cannot be used ({type(error).__name__}: {error})"
    return None
