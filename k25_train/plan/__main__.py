"""Print what a configuration amounts to, without torch and before a GPU hour is spent.

    python -m k25_train.plan experiment=k25_pretrain_4k [SECTION.KEY=VALUE ...] [VIEW] [--json]

Printed are the model's parameters by module, total and active, the pipeline layout, and what ranks send in a
step. Views: --optimizer is the rule by which each parameter is updated, and the optimizer's state on each
rank; --activations what is saved of each layer and done with it, and what a rank of each stage has to hold;
--time where the time of a step goes, next to the model's FLOPs.
"""

import argparse
import json
from dataclasses import asdict

from rich.console import Console
from rich.measure import Measurement

from k25_train.compose.command_line import read_arguments
from k25_train.compose.resolve import compose
from k25_train.entry import run_command
from k25_train.parameters.released import count_parameters
from k25_train.plan.memory.kernels import kernel_line
from k25_train.plan.memory.stage import fullest, stage_memories
from k25_train.plan.optimizer import parameter_kinds
from k25_train.plan.pipeline import PipelinePlan, plan_pipeline
from k25_train.plan.report.communication import communication_table, dispatcher_table
from k25_train.plan.report.memory import (
    item_table,
    memory_as_dict,
    memory_lines,
    packed_by_part,
    part_table,
    stage_table,
)
from k25_train.plan.report.optimizer import optimizer_as_dict, rule_lines, state_lines, time_lines
from k25_train.plan.report.parameters import parameter_summary, parameter_table
from k25_train.plan.report.time import budget_as_dict, budget_table
from k25_train.plan.time.budget import StepBudget
from k25_train.plan.time.communication import communication

ANY_WIDTH = Console(width=1000)
BUDGET_WIDTH = 100
"""Columns in which the budget of a step can be read."""


def main() -> None:
    """Run the command with the process's arguments."""
    run_command(_run)


def _run() -> None:
    parser = argparse.ArgumentParser(
        prog="k25-plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="hydra overrides, as for k25-train")
    views = parser.add_mutually_exclusive_group()
    views.add_argument("--optimizer", action="store_true", help="print rules and state of the optimizer")
    views.add_argument("--activations", action="store_true", help="print activations and memory by stage")
    views.add_argument("--time", action="store_true", help="print where the time of a step goes")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = read_arguments(parser)
    pipeline = plan_pipeline(compose(arguments.overrides))
    print_view = print_overview
    if arguments.optimizer:
        print_view = print_optimizer
    elif arguments.activations:
        print_view = print_activations
    elif arguments.time:
        print_view = print_time
    print_view(pipeline, as_json=arguments.json)


def print_overview(pipeline: PipelinePlan, *, as_json: bool) -> None:
    """Print parameters, layout and what ranks send."""
    config, layout = pipeline.config, pipeline.layout.to_megatron()
    counts = count_parameters(config.model)
    if as_json:
        plan = {
            "model": config.model.name,
            "parameters": asdict(counts),
            "layout": layout,
            "communication": {kind: asdict(volume) for kind, volume in communication(config).items()},
        }
        print(json.dumps(plan, indent=2))
        return
    console, sizes = Console(), config.parallelism
    console.print(parameter_table(config.model.name, counts))
    console.print(parameter_summary(counts), soft_wrap=True, highlight=False)
    line = f"\nlayout over pp {sizes.pp} x vpp {sizes.vpp}: {layout}"
    console.print(line, soft_wrap=True, highlight=False)
    console.print(communication_table(config))
    if config.parallelism.ep > config.cluster.gpus_per_node:
        console.print(dispatcher_table(config))


def print_optimizer(pipeline: PipelinePlan, *, as_json: bool) -> None:
    """Print the rule of every parameter and the bytes of its state."""
    if as_json:
        print(json.dumps(optimizer_as_dict(pipeline), indent=2))
        return
    rules, states = rule_lines(parameter_kinds(pipeline.config)), state_lines(pipeline)
    print(*rules, "", *states, "", *time_lines(pipeline), sep="\n")


def print_activations(pipeline: PipelinePlan, *, as_json: bool) -> None:
    """Print the saved tensors of each part of the model, and the memory of each stage."""
    config, memories = pipeline.config, stage_memories(pipeline)
    if as_json:
        print(json.dumps(memory_as_dict(config, memories), indent=2))
        return
    tables = [part_table(config, part, tensors) for part, tensors in packed_by_part(config).items()]
    tables += [stage_table(config, memories), item_table(config, fullest(memories))]
    # Rich would cut numbers short where there is no terminal, or a narrow one.
    console = Console(
        width=max(Measurement.get(ANY_WIDTH, ANY_WIDTH.options, each).maximum for each in tables)
    )
    for table in tables:
        console.print(table)
    console.print(kernel_line(config), soft_wrap=True, highlight=False)
    for line in memory_lines(pipeline, memories):
        console.print(line, soft_wrap=True, highlight=False)


def print_time(pipeline: PipelinePlan, *, as_json: bool) -> None:
    """Print the budget of a step."""
    budget = StepBudget(pipeline)
    if as_json:
        print(json.dumps(budget_as_dict(budget), indent=2))
        return
    # Its last column wraps; where there is no terminal, or a narrow one, numbers would be cut short.
    console = Console()
    Console(width=max(console.width, BUDGET_WIDTH)).print(budget_table(budget))


if __name__ == "__main__":
    main()
