"""Build every distinct rank of a job without memory and without GPUs, check it, and count its bytes.

    python -m k25_train.dryrun experiment=k25_pretrain_4k [SECTION.KEY=VALUE ...] [--json]

The modules are the real ones, on tensors without data; the process groups are formed without peers. Checked
are shapes, layout, group membership, gradient buckets, optimizer shards and micro-batches of all ranks. Bytes
are those that stay from step to step; activations come on top.
"""

import argparse
import json

from rich.console import Console

from k25_train.compose.command_line import read_arguments
from k25_train.compose.resolve import describe
from k25_train.compose.trainable import compose_trainable
from k25_train.config.schema import Config
from k25_train.entry import run_command
from k25_train.errors import DryRunError

TABLE_WIDTH = 110
"""Characters of the widest row."""


def main() -> None:
    """Run the command with the process's arguments."""
    run_command(_run)


def _run() -> None:
    parser = argparse.ArgumentParser(
        prog="k25-dryrun", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides, as for k25-train")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = read_arguments(parser)
    run(compose_trainable(arguments.overrides), as_json=arguments.json)


def run(config: Config, *, as_json: bool) -> None:
    """Print what the job would be; raises `DryRunError` with everything that is wrong with it."""
    # Imported only for a sound configuration: torch takes seconds.
    from k25_train.startup.platform import prepare_platform

    prepare_platform("meta")
    # The modules below import megatron-core, which must find the platform chosen.
    from k25_train.dryrun.dry_run import dry_run
    from k25_train.dryrun.report import as_dict, note_lines, stage_table, summary_line
    from k25_train.plan.pipeline import layout_of

    result = dry_run(config, layout_of(config))
    if as_json:
        print(json.dumps(as_dict(config, result), indent=2))
    else:
        console = Console()
        # rich takes 80 columns where there is no terminal, too few for the table.
        console.width = max(console.width, TABLE_WIDTH)
        console.print(stage_table(config, result))
        lines = [*note_lines(config), *([] if result.problems else [summary_line(config, result)])]
        console.print("\n".join(lines), soft_wrap=True, highlight=False)
    if result.problems:
        raise DryRunError(describe(result.problems, "what the job would build"))


if __name__ == "__main__":
    main()
