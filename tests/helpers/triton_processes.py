"""Processes that import Triton, which decides while it is imported whether it interprets or compiles."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor


def set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def process(variables: dict[str, str]) -> ProcessPoolExecutor:
    """A process that imports Triton under these environment variables."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=set_environment, initargs=(variables,))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])
