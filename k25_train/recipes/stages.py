"""`python -m k25_train.recipes.stages [chain=smoke] [STAGE.KEY=VALUE …]`: train a chain of stages.

    chain=NAME|FILE.yaml     of conf/chain; smoke unless it is given
    dir=FOLDER               where the stages' run folders are made, instead of where the chain says
    --from STAGE             train this stage and all that follow again; their run folders are removed
    --explain [--png FILE]   print the schedule of the whole chain, and draw it; nothing is trained
    --commands               print the commands that submit the stages to SLURM, one after another, and what
                             has to be filled in before, as comments

Stages that are finished are skipped, one that was interrupted goes on from its newest checkpoint. At the end
a table, and a picture of all losses, are written to the chain's folder.
"""

import argparse
import resource
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from k25_train.compose.command_line import read_arguments
from k25_train.compose.filled import open_places
from k25_train.entry import run_command
from k25_train.errors import ConfigError
from k25_train.recipes.chain import Chain, load_chain
from k25_train.recipes.closing import write_results
from k25_train.recipes.composed import Composed, check_runnable, compose_chain
from k25_train.recipes.explain import draw, explain
from k25_train.recipes.needle_stages import search_needles
from k25_train.recipes.running import check_order, remove_from, run_stage

DEFAULT_CHAIN = "smoke"


def main() -> None:
    """Run the command with the process's arguments."""
    run_command(_run, output_goes_on=True)


def _run() -> None:
    options = _options()
    _check(options)
    settings = list(options.settings)
    names = [each.removeprefix("chain=") for each in settings if each.startswith("chain=")]
    chain = load_chain(
        names[-1] if names else DEFAULT_CHAIN, [each for each in settings if not each.startswith("chain=")]
    )
    stages = compose_chain(chain)
    if options.explain:
        named = [(each.stage.name, each.config) for each in stages]
        print(explain(named), end="")
        if options.png is not None:
            draw(named, options.png, f"Chain {chain.name}, stage by stage")
            print(f"picture: {options.png}")
    elif options.commands:
        for line in (*to_fill_in(stages), *commands(stages)):
            print(line)
    else:
        train(chain, stages, options.first)


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not go together, before anything is read. Raises ConfigError."""
    if options.explain and options.commands:
        raise ConfigError("--explain, --commands: each prints something else\n  -> give one of them")
    if options.first is not None and (options.explain or options.commands):
        raise ConfigError(
            "--from: is for training\n  -> leave it out to explain a chain, or to print commands"
        )
    if options.png is None:
        return
    if not options.explain:
        raise ConfigError("--png: is for --explain\n  -> the losses of a chain are drawn when it has run")
    if not options.png.parent.is_dir():
        raise ConfigError(f"--png {options.png}: {options.png.parent} is no folder\n  -> make it first")


def train(chain: Chain, stages: Sequence[Composed], first: str | None) -> None:
    """Train what is not finished yet, look for needles, and write the results.

    Raises ConfigError for stages that have to be completed first, or do not follow from each other, and
    StageError where one does not reach its end.
    """
    check_runnable(stages)
    if first is not None:
        remove_from(stages, first, say)
    check_order(stages)
    started_s = time.monotonic()
    for number, stage in enumerate(stages, start=1):
        run_stage(stage, number, len(stages), say)
        search_needles(chain, stage, say)
    write_results(chain, stages, Console(soft_wrap=True))
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_min = (children.ru_utime + children.ru_stime) / 60
    say(f"{(time.monotonic() - started_s) / 60:.1f} minutes, {cpu_min:.1f} of which the processors computed")


def commands(stages: Sequence[Composed]) -> list[str]:
    """A line for each stage, to be given once the stage before has ended: the submission of its job."""
    return [shlex.join(["python", "-m", "launch.slurm", *stage.arguments]) for stage in stages]


def to_fill_in(stages: Sequence[Composed]) -> list[str]:
    """Comments, a line for each value that a user has to fill in before the stage's command is given."""
    return [
        f"# {each.stage.name}: {key}={value} has to be filled in"
        for each in stages
        for key, value in open_places(each.config).items()
    ]


def say(line: str) -> None:
    """Print a line at once, before what a child process prints."""
    print(line, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m k25_train.recipes.stages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="STAGE.KEY=VALUE", help="settings of stages")
    parser.add_argument("--from", dest="first", metavar="STAGE", help="train it and all that follow again")
    parser.add_argument("--explain", action="store_true", help="print the schedule of the whole chain")
    parser.add_argument("--png", type=Path, metavar="FILE", help="with --explain: draw it")
    parser.add_argument("--commands", action="store_true", help="print the commands that submit the stages")
    options = read_arguments(parser)
    options.settings = options.overrides
    return options


if __name__ == "__main__":
    main()
