"""Results that are at the output already: this command's, another's, or nobody's."""

from typing import Any

from k25_train.data.prepare.manifest import Output, difference, read_json
from k25_train.errors import DataError


def finished(output: Output, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a result that is there, of this plan; None if there is none.

    Raises DataError if what is there belongs to another command.
    """
    record = check_ours(output)
    if record is None:
        return None
    differs = difference(record["plan"], plan)
    if differs:
        raise DataError(
            f"{output.prefix}: holds what was made of others: {differs}. Choose another --out (a source may "
            "have several prefixes), or replace it with --restart."
        )
    for name in record["shards"]:
        for suffix in (".bin", ".idx", ".json"):
            if not (output.folder / f"{name}{suffix}").exists():
                raise DataError(
                    f"{output.folder / name}{suffix}: is missing. Bring it back, or make all of it again "
                    "with --restart."
                )
    return record


def remove(output: Output, from_shard: int) -> None:
    """Remove an earlier result, its record first, so that it never counts as whole; shards from one on."""
    output.whole.unlink(missing_ok=True)
    for path in output.shards():
        if output.number_of(path) >= from_shard:
            path.unlink()


def check_ours(output: Output) -> dict[str, Any] | None:
    """The record of a result that is there; None if there is none. Raises DataError if it is of no such
    command."""
    record = read_json(output.whole)
    if record is not None and not {"plan", "shards"} <= record.keys():
        raise DataError(f"{output.whole}: is no record of this command. Choose another --out.")
    shards = output.shards()
    if record is None and shards and not output.plan.exists():
        raise DataError(
            f"{shards[0]}: is there, without the record {output.whole.name} that this command writes. Choose "
            "another --out."
        )
    return record
