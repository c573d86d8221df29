"""`train.deterministic` on CUDA chooses kernels before libraries start; on the CPU it changes nothing."""

import os
from collections.abc import Iterator

import pytest
import torch

from k25_train.compose.resolve import compose
from k25_train.config.determinism import DETERMINISTIC
from k25_train.config.schema import Config
from k25_train.errors import ConfigError
from k25_train.startup.determinism import prepare_determinism

GPU = ["experiment=smoke_1gpu", "train.deterministic=true"]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process in which nothing is set, and whose settings are put back."""
    for name, *_ in DETERMINISTIC:
        # First set, so that it is gone afterwards whatever sets it in between.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


def prepare(config: Config) -> None:
    prepare_determinism(config.train, config.cluster)


def test_on_cuda_torch_refuses_other_kernels_and_libraries_find_their_variables() -> None:
    prepare(compose(GPU))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert {name: os.environ[name] for name, *_ in DETERMINISTIC} == {
        name: value for name, value, _ in DETERMINISTIC
    }


def test_a_contrary_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    with pytest.raises(ConfigError, match=r"NCCL_ALGO=NVLS: must be Ring with train\.deterministic=true"):
        prepare(compose(GPU))
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("arguments", [GPU[:1], ["experiment=smoke", "train.deterministic=true"]])
def test_without_it_and_on_the_cpu_nothing_changes(arguments: list[str]) -> None:
    prepare(compose(arguments))
    assert not torch.are_deterministic_algorithms_enabled()
    assert not any(name in os.environ for name, *_ in DETERMINISTIC)
