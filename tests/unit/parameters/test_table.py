"""A parameter is added in one place: one entry of the table."""

from dataclasses import replace

import pytest
import torch

from k25_train.compose.resolve import compose
from k25_train.config.optimizer import OptimName
from k25_train.errors import CheckpointError
from k25_train.export.released import to_hf, to_ours
from k25_train.model.weights import initial_value
from k25_train.parameters import table
from k25_train.parameters.entry import Conversion, Initial, Kind, ParameterEntry, Site, fill, pattern_of
from k25_train.parameters.megatron import TrainedParameter, iterate_parameters, layer_parameters
from k25_train.parameters.released import count_parameters, iterate_tensors
from k25_train.parameters.update_rules import rule_of

OURS = "language_model.decoder.layers.*.self_attention.linear_gate.weight"
RELEASED = tuple(f"language_model.model.layers.*.self_attn.{name}_gate.weight" for name in ("k", "v"))
GATES = ParameterEntry(
    OURS,
    RELEASED,
    ("q_lora", "hidden"),
    "gates",
    Site.layer,
    Kind("two gates", lambda *_: 2, Initial.ones),
    Conversion.join_rows,
)


def test_one_entry_is_seen_by_count_list_rule_conversion_and_initial_value(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = compose(["experiment=smoke", "optim=muonclip"])
    model, before = config.model, count_parameters(config.model)
    columns, rows, layers = model.hidden_size, model.q_lora_rank, model.num_layers
    with pytest.raises(CheckpointError, match="unexpected tensors"):
        to_hf({fill(OURS, 1): torch.ones(1)})
    entries = [*table.TABLE.entries]
    position = next(i for i, entry in enumerate(entries) if entry.site is Site.head)
    entries.insert(position, GATES)
    monkeypatch.setattr(table, "TABLE", table.ParameterTable(tuple(entries)))

    after = count_parameters(model)
    assert after.total - before.total == after.active - before.active == layers * 2 * rows * columns
    [gates] = [module for module in after.modules if module.module == "gates"]
    assert gates.num_tensors == 2 * layers
    shapes = {tensor.name: tensor.shape for tensor in iterate_tensors(model)}
    assert all(shapes[fill(name, layer)] == (rows, columns) for name in RELEASED for layer in range(layers))

    trained = [each for each in iterate_parameters(model) if "linear_gate" in each.name]
    shape = (2 * rows, columns)
    assert trained == [TrainedParameter(fill(OURS, layer), shape) for layer in range(layers)]
    assert trained[1] in layer_parameters(model, 1)
    rule = rule_of(*trained[1], config.optim, model)
    assert (rule.update, rule.num_matrices, rule.reason) == (OptimName.muonclip, 2, "two gates")

    weights = {trained[1].name: torch.randn(shape)}
    released = to_hf(weights)
    assert list(released) == [fill(name, 1) for name in RELEASED]
    assert torch.equal(to_ours(released)[trained[1].name], weights[trained[1].name])
    assert torch.equal(initial_value(trained[1].name, torch.Size(shape), 0, 0.02), torch.ones(shape))


def test_names_are_unique_and_have_the_same_numbers() -> None:
    entries = table.TABLE.entries
    released = [name for entry in entries for name in entry.released]
    assert len({entry.name for entry in entries}) == len(entries)
    assert len(set(released)) == len(released)
    for entry in entries:
        assert {name.count("*") for name in entry.released} == {entry.name.count("*")}, entry.name
        assert all(pattern_of(fill(name, 3, 7)) == name for name in (entry.name, *entry.released))


def test_layers_of_both_kinds_are_all_of_the_decoder() -> None:
    model = replace(compose(["experiment=smoke"]).model, num_layers=5, num_dense_layers=2)
    names = [parameter.name for layer in range(5) for parameter in layer_parameters(model, layer)]
    assert names == [each.name for each in iterate_parameters(model) if ".decoder.layers." in each.name]
