"""Print what a configuration amounts to, without torch and before a GPU hour is spent.

    python -m k25_train.plan experiment=k25_pretrain_4k [SECTION.KEY=VALUE ...] [VIEW] [--json]

So far: the model's parameters, total and active, by module, the pipeline layout, and what ranks send in a
step. Views: --optimizer is the rule by which each parameter is updated, and the optimizer's state on each
rank; --activations what is saved of each layer and done with it, and what a rank of each stage has to hold.
"""

import argparse
import json
from dataclasses import asdict

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from k25_train.compose.command_line import exit_with
from k25_train.compose.resolve import compose
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.parameters.released import ParameterCount, count_parameters
from k25_train.plan.layout import layout_of
from k25_train.plan.memory import report
from k25_train.plan.memory.stage import stage_memories
from k25_train.plan.optimizer import as_dict, parameter_kinds, rule_lines, stage_states, state_lines
from k25_train.plan.time.communication import communication

ANY_WIDTH = Console(width=1000)


def main() -> None:
    """Run the command with the process's arguments."""
    parser = argparse.ArgumentParser(
        prog="k25-plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides, as for k25-train")
    views = parser.add_mutually_exclusive_group()
    views.add_argument("--optimizer", action="store_true", help="print rules and state of the optimizer")
    views.add_argument("--activations", action="store_true", help="print activations and memory by stage")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_intermixed_args()
    try:
        config = compose(arguments.overrides)
    except ConfigError as error:
        exit_with(error)
    if arguments.optimizer:
        print_optimizer(config, as_json=arguments.json)
        return
    if arguments.activations:
        print_activations(config, as_json=arguments.json)
        return
    counts = count_parameters(config.model)
    if arguments.json:
        plan = {
            "model": config.model.name,
            "parameters": asdict(counts),
            "layout": layout_of(config).to_megatron(),
            "communication": {kind: asdict(volume) for kind, volume in communication(config).items()},
        }
        print(json.dumps(plan, indent=2))
    else:
        console = Console()
        console.print(parameter_table(config.model.name, counts))
        console.print(summary(counts), soft_wrap=True, highlight=False)
        sizes = config.parallelism
        layout = f"\nlayout over pp {sizes.pp} x vpp {sizes.vpp}: {layout_of(config).to_megatron()}"
        console.print(layout, soft_wrap=True, highlight=False)
        console.print(communication_table(config))


def print_optimizer(config: Config, *, as_json: bool) -> None:
    """The rule of every parameter and the bytes of its state."""
    if as_json:
        print(json.dumps(as_dict(config), indent=2))
        return
    print(*rule_lines(parameter_kinds(config)), "", *state_lines(config, stage_states(config)), sep="\n")


def print_activations(config: Config, *, as_json: bool) -> None:
    """Saved tensors of each kind of layer, and the memory of each stage."""
    memories = stage_memories(config)
    if as_json:
        print(json.dumps(report.as_dict(config, memories), indent=2))
        return
    tables = [report.part_table(config, part, tensors) for part, tensors in report.parts(config).items()]
    tables.append(report.stage_table(config, memories))
    # Rich would cut numbers short where there is no terminal, or a narrow one.
    console = Console(
        width=max(Measurement.get(ANY_WIDTH, ANY_WIDTH.options, each).maximum for each in tables)
    )
    for table in tables:
        console.print(table)
    for line in report.verdict(config, memories):
        console.print(line, soft_wrap=True, highlight=False)


def parameter_table(name: str, counts: ParameterCount) -> Table:
    """Parameters by module and in sum, active ones beside all."""
    table = Table(title=f"Parameters of {name}", title_justify="left", show_footer=True)
    num_tensors = sum(module.num_tensors for module in counts.modules)
    table.add_column("module", footer="total", no_wrap=True)
    table.add_column("tensors", footer=f"{num_tensors:,}", justify="right", no_wrap=True)
    table.add_column("parameters", footer=f"{counts.total:,}", justify="right", no_wrap=True)
    table.add_column("active", footer=f"{counts.active:,}", justify="right", no_wrap=True)
    for module in counts.modules:
        numbers = (module.num_tensors, module.total, module.active)
        table.add_row(module.module, *(f"{number:,}" for number in numbers))
    return table


def communication_table(config: Config) -> Table:
    """What a rank sends in a step, on average over all ranks."""
    table = Table(title="Sent in a step", title_justify="left")
    table.add_column("kind", no_wrap=True)
    table.add_column("GB a rank", justify="right", no_wrap=True)
    for kind, volume in communication(config).items():
        table.add_row(kind, f"{volume.sent_bytes / config.world_size / 1e9:,.3f}")
    return table


def summary(counts: ParameterCount) -> str:
    """The sums in short."""
    return (
        f"language model {shorten(counts.total - counts.vision)}, vision {shorten(counts.vision)}\n"
        f"a text token uses {shorten(counts.active)}, "
        f"{shorten(counts.active_without_embedding)} without the input embedding"
    )


def shorten(number: int) -> str:
    """A count in three or more digits with its unit: 1026.4B, 471.1M, 14.9K."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


if __name__ == "__main__":
    main()
