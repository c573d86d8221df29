"""Dry runs in a forked process, sound and with faults planted in what they build."""

from collections.abc import Callable, Sequence
from typing import Any

from tests.helpers.ranks import RankContext


def dry_dict(context: RankContext, arguments: Sequence[str]) -> dict[str, Any]:
    """What the dry run of these overrides finds, as `--json` prints it."""
    from k25_train.compose.resolve import compose
    from parallel.megatron.platform import use_platform

    use_platform("meta")
    from k25_train.dryrun.dry_run import dry_run
    from k25_train.dryrun.report import as_dict
    from k25_train.plan.pipeline import layout_of

    config = compose(arguments)
    return as_dict(config, dry_run(config, layout_of(config)))


def dry_dict_with(
    context: RankContext, arguments: Sequence[str], plant: Callable[[], None]
) -> dict[str, Any]:
    """The same once `plant` has put a fault into this process."""
    plant()
    return dry_dict(context, arguments)


def wrap(owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Let the function `owner.name` return what `change` makes of its result."""
    original = getattr(owner, name)

    def changed(*args: Any, **kwargs: Any) -> Any:
        return change(original(*args, **kwargs))

    setattr(owner, name, changed)
