"""`k25-checkpoint prune`: deletes old checkpoints of a run, as `checkpoint.keep` does while it trains."""

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from k25_train.checkpoint import folders
from k25_train.checkpoint.commands.choice import roots_of
from k25_train.checkpoint.commands.pruning import Condition, Decision, Found, decide
from k25_train.checkpoint.commands.sizes import in_units
from k25_train.checkpoint.continuity import saved_config
from k25_train.checkpoint.manifest import read_manifest
from k25_train.checkpoint.storage.kinds import Place
from k25_train.checkpoint.storage.places import place_of, storage_of
from k25_train.errors import CheckpointError, ConfigError
from k25_train.run_folder.checkpoints import CHECKPOINTS
from k25_train.run_folder.held import hold
from k25_train.run_folder.jobs import job_state
from k25_train.tables import fitting_table

_EPILOG = """\
The newest sound checkpoint always stays. Damaged and unsound ones stay unless they are named with --also.
Nothing is deleted without --yes, and nothing while a run holds its folder.
"""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "prune",
        help="delete old checkpoints of a run",
        description=(__doc__ or "").partition(":")[2].strip(),
        epilog=_EPILOG,
    )
    parser.add_argument("folder", help="run folder, or folder or s3:// URL of its checkpoints")
    parser.add_argument(
        "--keep", type=int, metavar="N", help="newest sound ones that stay (checkpoint.keep of the run)"
    )
    parser.add_argument(
        "--keep-every",
        type=int,
        metavar="N",
        help="every Nth checkpoint of the run stays; 0 for none (checkpoint.keep_every of the run)",
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME",
        help="delete this one too though it is damaged or unsound; may be repeated",
    )
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--dry-run", action="store_true", help="show what would be deleted (the default)")
    doing.add_argument("--yes", action="store_true", help="delete it")
    parser.add_argument(
        "--not-in-use",
        action="store_true",
        help="you have seen that no run writes there; for one whose run folder this machine does not see",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, console: Console) -> int:
    """Show what goes, or delete it; returns the exit status."""
    place = place_of(options.folder)
    root = root_of(place)
    keep, keep_every = _limits(place, root, options)

    def decisions() -> list[Decision]:
        found = decide(found_in(root), keep, keep_every, options.also)
        check_named(root, found, options.also)
        return found

    decided = decisions()
    if options.yes and any(each.goes for each in decided):
        with _held(run_folder_of(place, root), is_known=options.not_in_use):
            # Others may have come and gone since: what is seen under the lock counts.
            decided = decisions()
            delete(root, [each.found for each in decided if each.goes])
    if options.json:
        values = {
            "root": str(root),
            "deleted": options.yes,
            "checkpoints": [as_json(each) for each in decided],
        }
        console.print(json.dumps(values), markup=False, soft_wrap=True)
    else:
        _print(root, decided, console, is_done=options.yes)
    return 0


def root_of(place: Place) -> Place:
    """Where the checkpoints of a run are. Raises `CheckpointError` if there are none."""
    for root in roots_of(place):
        if folders.list_checkpoints(root) or folders.unsound_checkpoints(root) or _left_overs(root):
            return root
    raise CheckpointError(f"{place}: holds no checkpoints: name a run's folder, or that of its checkpoints")


def found_in(root: Place) -> list[Found]:
    """Every checkpoint of a run, and what interrupted saves left."""
    names = [*folders.list_checkpoints(root), *folders.unsound_checkpoints(root)]
    found = {folder.name: _found(folder) for folder in names}
    left = {folder.name: Found(folder.name, -1, Condition.partial, "", 0) for folder in _left_overs(root)}
    return [*found.values(), *(each for name, each in left.items() if name not in found)]


def _left_overs(root: Place) -> list[Place]:
    return storage_of(root).left_overs(root)


def _found(folder: Place) -> Found:
    step = folders.step_of(folder)
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return Found(folder.name, step, Condition.damaged, str(error), 0)
    num_bytes = sum(file.num_bytes for file in manifest.files.values())
    if not folders.is_whole(folder):
        why = "files are missing or cut short"
        return Found(folder.name, step, Condition.damaged, why, num_bytes)
    if not manifest.is_sound:
        return Found(folder.name, step, Condition.unsound, manifest.why_unsound, num_bytes)
    if folder.name.endswith(".unsound"):
        return Found(folder.name, step, Condition.unsound, "set aside", num_bytes)
    return Found(folder.name, step, Condition.sound, "", num_bytes, manifest.number)


def check_named(root: Place, decided: Sequence[Decision], named: Sequence[str]) -> None:
    """Raise `ConfigError` for an `--also` that is no damaged or unsound checkpoint there."""
    by_name = {each.found.name: each.found for each in decided}
    for name in named:
        found = by_name.get(name)
        if found is None:
            raise ConfigError(f"--also {name}: {root} holds no such checkpoint, only {', '.join(by_name)}")
        if found.condition is Condition.sound:
            raise ConfigError(
                f"--also {name}: is sound, and is not deleted by name: lower --keep, or move it away by hand"
            )


def delete(root: Place, doomed: Sequence[Found]) -> None:
    """Delete, oldest first. Raises `CheckpointError` if the storage refuses."""
    storage = storage_of(root)
    try:
        folders.point_latest(root)
        for each in doomed:
            remove = storage.remove if each.condition is Condition.partial else storage.discard
            remove(root / each.name)
    except OSError as error:
        raise CheckpointError(
            f"{root}: could not be pruned ({error}): see who may write there, and give the command again"
        ) from error


def _limits(place: Place, root: Place, options: argparse.Namespace) -> tuple[int, int]:
    """`keep` and `keep_every`: those given, or the run's own."""
    limits = {"keep": options.keep, "keep_every": options.keep_every}
    if None in limits.values():
        own = _checkpoint_section(place, root)
        for name in limits:
            limits[name] = own.get(name) if limits[name] is None else limits[name]
    keep, keep_every = limits["keep"], limits["keep_every"]
    if keep is None:
        raise ConfigError(f"--keep: must be given: no configuration in {root} says what checkpoint.keep is")
    if keep < 1 or (keep_every or 0) < 0:
        flag = "--keep" if keep < 1 else "--keep-every"
        raise ConfigError(f"{flag}: must be at least {int(keep < 1)}: the newest sound checkpoint stays")
    return int(keep), int(keep_every or 0)


def _checkpoint_section(place: Place, root: Place) -> dict[str, Any]:
    section = _config(place, root).get("checkpoint")
    return section if isinstance(section, dict) else {}


def _config(place: Place, root: Place) -> dict[str, Any]:
    """The run's configuration: in its folder, or in its newest checkpoint; empty without both."""
    run_folder = root.parent if root.name == CHECKPOINTS else None
    for folder in (place, run_folder, folders.newest_checkpoint(root)):
        if folder is not None and (folder / folders.CONFIG).exists():
            return saved_config(folder / folders.CONFIG)
    return {}


def run_folder_of(place: Place, root: Place) -> Path | None:
    """The run folder whose lock says whether a run writes these checkpoints; None if it is not known."""
    if isinstance(place, Path) and (place / folders.CONFIG).exists():
        return place
    if isinstance(root, Path) and root.name == CHECKPOINTS:
        return root.parent
    section = _config(place, root).get("run")
    named = section.get("dir") if isinstance(section, dict) else None
    return Path(named) if isinstance(named, str) and Path(named).is_dir() else None


@contextmanager
def _held(run_folder: Path | None, *, is_known: bool) -> Iterator[None]:
    """Hold the run folder, so that no run writes there meanwhile.

    Raises `LockedError` if a run does, and `ConfigError` if nobody can tell.
    """
    if run_folder is None:
        if not is_known:
            raise ConfigError(
                "the run folder of these checkpoints is not on this machine, so whether a run writes them is "
                "not known: see that none does, then give --not-in-use as well"
            )
        yield
        return
    holder = hold(run_folder, None, job_state)
    try:
        yield
    finally:
        holder.close()


def as_json(decision: Decision) -> dict[str, Any]:
    """One checkpoint of `--json`."""
    found = decision.found
    return {
        "name": found.name,
        "step": found.step if found.step >= 0 else None,
        "condition": found.condition.value,
        "why_not_sound": found.why,
        "num_bytes": found.num_bytes,
        "goes": decision.goes,
        "why": decision.why,
    }


def _print(root: Place, decided: Sequence[Decision], console: Console, *, is_done: bool) -> None:
    gone = "deleted" if is_done else "goes"
    rows = [
        {
            "checkpoint": each.found.name,
            "bytes": in_units(each.found.num_bytes) if each.found.num_bytes else "",
            "is": each.found.condition.value,
            "": gone if each.goes else "stays",
            "why": each.why + (f" ({each.found.why})" if each.found.why else ""),
        }
        for each in decided
    ]
    left = ("checkpoint", "is", "", "why")
    console.print(fitting_table(str(root), rows, console.width, left=left, wraps=("why",)))
    doomed = [each.found for each in decided if each.goes]
    if not doomed:
        console.print("nothing to delete")
        return
    what = f"{len(doomed)} of {len(decided)}, {in_units(sum(each.num_bytes for each in doomed))}"
    console.print(f"deleted {what}" if is_done else f"{what} would be deleted: give --yes to do it")
