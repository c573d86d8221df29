"""Whether a model finds needles: the words it would say where only the answers of questions have a loss.

Import this module only after `use_platform` has chosen the device: it imports megatron-core.

Shapes: T tokens that a rank holds of a micro-batch, D hidden size, V vocabulary, N answers, W words.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from k25_train.training.activations import KeepEverything
from k25_train.training.device_batch import DeviceBatch
from k25_train.training.forward import forward_micro_batch
from k25_train.training.run import Run
from parallel.megatron.replicas import complete_parameters
from parallel.megatron.schedule import ForwardOutput, run_schedule


class Listener:
    """Looks at what the last layer gives where labels count, and sums up by word how often the label is the
    first choice, and by how much it is ahead."""

    def __init__(self, head: Tensor, words: Sequence[int], device: torch.device) -> None:
        """`head`: rows [V, D] of the output layer; `words`: ids of all that may be an answer."""
        self._head = head
        self._words = torch.tensor(words, device=device)
        self.batch: DeviceBatch
        """The micro-batch whose pass comes next."""
        self.sums = torch.zeros(len(words), 3, dtype=torch.float64, device=device)
        """[W, 3]: answers, those found, and the sum of their margins."""

    def __call__(self, _module: nn.Module, _inputs: Any, hidden: Tensor) -> None:
        """Take the hidden states [T, 1, D] of the pass of `batch`."""
        at_N = self.batch.targets.loss_mask.nonzero().flatten()
        labels_N = self.batch.labels.long()[at_N]
        self.sums += scores(hidden.flatten(0, 1)[at_N], self._head, labels_N, self._words)


def scores(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, words_W: Tensor) -> Tensor:
    """[W, 3] float64 by word: answers, how many are the most likely token of all, and the sum of their
    margins, the log-probability of the answer less that of the likeliest other word. Answers that are none of
    the words do not count."""
    logits_NV = hidden_ND.float() @ head_VD.float().T
    found_N = logits_NV.argmax(dim=1) == labels_N
    is_word_NW = labels_N[:, None] == words_W
    own_N = logits_NV.gather(1, labels_N[:, None]).flatten()
    others_NW = logits_NV[:, words_W].masked_fill(is_word_NW, float("-inf"))
    margin_N = own_N - others_NW.amax(dim=1)
    columns_N3 = torch.stack([torch.ones_like(own_N), found_N.float(), margin_N], dim=1).double()
    return is_word_NW.double().T @ columns_N3


@torch.no_grad()
def needle_sums(run: Run, num_sequences: int, words: Sequence[int]) -> Tensor:
    """[W, 3] float64 on the CPU, as `scores` has it, of the held-out sequences; the same on every rank."""
    complete_parameters(run.modules)
    for module in run.modules:
        module.eval()
    inputs = run.reader.evaluation(num_sequences)
    tower = run.tower.evaluating
    tower.start(inputs.vision)
    device = run.topology.device
    total = torch.zeros(len(words), 3, dtype=torch.float64, device=device)
    forward = partial(
        forward_micro_batch, objective=run.objective, leaf=tower.leaf, activations=KeepEverything()
    )
    # The last stage listens; others have no head.
    listeners: list[Listener] = []
    if run.topology.holds_last_chunk:
        model: Any = getattr(run.chunks[-1], "module", run.chunks[-1]).language_model
        listeners.append(Listener(model.output_layer.weight, words, device))
        model.decoder.final_layernorm.register_forward_hook(listeners[0])

    def listened(batch: DeviceBatch, chunk: nn.Module, as_plan: bool) -> ForwardOutput:
        for listener in listeners:
            listener.batch = batch
        return forward(batch, chunk, as_plan)

    run_schedule(
        listened,
        run.chunks,
        inputs.micro_batches,
        run.topology,
        tokens_per_micro_batch=run.tokens_per_micro_batch,
        forward_only=True,
    )
    tower.release()
    for listener in listeners:
        total += listener.sums
    dist.all_reduce(total)
    return total.cpu()
