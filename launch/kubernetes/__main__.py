"""Start a training run on Kubernetes, as a JobSet of one pod per node.

    python -m launch.kubernetes experiment=… cluster=… run.dir=/runs/… [SECTION.KEY=VALUE ...] [--dry-run]

With --dry-run it prints the manifest, with the configuration's main figures in comments, and creates nothing;
what it prints can be kept and created by other tools. The pods check nodes and fabric, train, save when they
are evicted, and are started again (launch/kubernetes/README.md).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

from k25_train.compose.command_line import read_arguments
from k25_train.compose.filled import check_filled_in, check_weights_filled_in
from k25_train.compose.trainable import compose_trainable
from k25_train.config.schema import Config
from k25_train.entry import run_command
from launch.fabric import environment
from launch.feasibility import check_memory, memory_verdict, summary
from launch.kubernetes.kubectl import create, dump
from launch.kubernetes.manifest import INSTANCE_LABEL, JOB, check_paths, manifest, name_of, section
from launch.variables import Variable


def main() -> None:
    """Run the command with the process's arguments."""
    run_command(_run, output_goes_on="--dry-run" not in sys.argv)


def _run() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m launch.kubernetes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides, as for k25-train")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest, create nothing")
    parser.add_argument("--name", help="name of the JobSet (k25- and the name of the run folder)")
    parser.add_argument(
        "--force", action="store_true", help="go on even if the plan does not fit into memory"
    )
    arguments = read_arguments(parser)
    config = compose_trainable(arguments.overrides)
    check_weights_filled_in(config.checkpoint)
    section(config)
    name = name_of(config, arguments.name)
    check_paths(config)
    variables = environment(config)
    memory = memory_verdict(config)[1] if arguments.force else check_memory(config, [config.cluster.nodes])
    config_map, job_set = manifest(config, variables, name)
    shown = [*summary_lines(config, variables), *memory]
    if arguments.dry_run:
        print(*(f"# {line}".rstrip() for line in shown), sep="\n")
        print(dump([config_map, job_set]), end="")
        return
    check_filled_in(config.data)
    print(*shown, "", sep="\n", flush=True)
    create(config_map, job_set)
    print(*follow_up(config, name), sep="\n")


def summary_lines(config: Config, variables: Sequence[Variable]) -> Iterator[str]:
    """The run's main figures, and the ranks' variables with their reasons."""
    for key, value in summary(config, [config.cluster.nodes]):
        yield f"{key:<18} {value}"
    yield f"{'image':<18} {section(config).image}"
    yield ""
    yield "variables of the ranks"
    width = max(len(f"{name}={value}") for name, value, _ in variables)
    yield from (f"  {f'{name}={value}':<{width}}  {reason}" for name, value, reason in variables)
    yield ""


def follow_up(config: Config, name: str) -> list[str]:
    """Commands to follow, stop and continue the run."""
    namespace = section(config).namespace
    kubectl = "kubectl" if namespace is None else f"kubectl --namespace={namespace}"
    first = f"job/{name}-{JOB}-0"
    return [
        f"created JobSet {name}",
        f"  state       {kubectl} get jobset,pods --selector={INSTANCE_LABEL}={name}",
        f"  follow      {kubectl} logs --follow {first}    of its first pod",
        f"  why         {kubectl} describe jobset {name}",
        f"  save, end   {kubectl} delete jobset {name}",
        "  continue    the same command, after that",
    ]


if __name__ == "__main__":
    main()
