"""Head and loss by pieces of the tokens: they train like whole logits, and hold none."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.activation_policies import EXACT_K2
from tests.helpers.live_bytes import LiveBytes
from tests.helpers.ranks import RankContext, run_ranks
from tests.helpers.runs import layout, overrides, start_run

pytestmark = pytest.mark.distributed

TOKENS, WIDTH, WORDS = 70, 24, 1000
BY_PIECES = "activation.head.logits=recompute"
ALL_AT_ONCE = [
    *layout(pp=2, vpp=2, ep=2, dp=2), "parallelism.overlap_expert_comm=true", "parallelism.delay_wgrad=true",
    "parallelism.overlap_grad_reduce=true", "parallelism.overlap_param_gather=true",
]  # fmt: skip
LAYOUTS = {
    "alone, two sequences": (1, [*layout(), "train.micro_batch_size=2"]),
    "pp2 vpp2 ep2 overlap": (4, ALL_AT_ONCE),
}


class Head(nn.Module):
    """An output head of random weights, with features and labels, of which every seventh is missing."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(WORDS, WIDTH, generator=generator).to(dtype))
        self.features = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype).requires_grad_()
        self.labels = torch.randint(WORDS, (TOKENS,), generator=generator)
        self.labels[::7] = -100
        self.weighting = torch.randn(TOKENS, generator=generator)

    def by_pieces(self) -> Tensor:
        """Losses as the model makes them by pieces."""
        from k25_train.model.head import losses_by_pieces
        from parallel.megatron.wgrad import own_weight_gradients

        wgrads = own_weight_gradients(nn.Identity(), self.weight, later=False)
        wgrads.when_accumulated.append(lambda: setattr(self.weight, "grad", None))
        return losses_by_pieces(self.features, self.weight, self.labels, wgrads)

    def whole(self) -> Tensor:
        """Losses as the model makes them of whole logits."""
        from k25_train.model.token_losses import token_losses
        from parallel.megatron.wgrad import linear, own_weight_gradients

        wgrads = own_weight_gradients(nn.Identity(), self.weight, later=False)
        wgrads.when_accumulated.append(lambda: setattr(self.weight, "grad", None))
        return token_losses(linear(self.features, self.weight, wgrads), self.labels)

    def gradients(self, losses: Callable[[], Tensor]) -> dict[str, Tensor | None]:
        """What two backward passes leave."""
        self.features.grad = self.weight.grad = None
        if hasattr(self.weight, "main_grad"):
            self.weight.main_grad.zero_()
        for _ in range(2):
            found = losses()
            found.backward(self.weighting)
        of_weight = getattr(self.weight, "main_grad", self.weight.grad)
        return {"losses": found.detach(), "features": self.features.grad, "weight": of_weight}


def set_pieces(rows: int, element_bytes: int, *, words: int = WORDS) -> None:
    """Let the head take so many rows at a time, and the loss fewer."""
    from k25_train.model import token_losses
    from k25_train.plan import head_pieces

    head_pieces.HEAD_PIECE_BYTES = rows * words * element_bytes
    token_losses.LOSS_PIECE_BYTES = max(rows // 3, 1) * words * 4


def gradients_of_heads(_context: RankContext, dtype: torch.dtype) -> list[tuple[str, Any, Any]]:
    """What it is of, by pieces, and of whole logits."""
    found = []
    for rows in (1, 32, 69, 1000):
        for keeps_sum, is_trained, takes_gradient in (
            (True, True, True), (False, True, True), (True, False, True), (True, True, False),
        ):  # fmt: skip
            head = Head(dtype)
            if keeps_sum:
                head.weight.main_grad = torch.zeros(WORDS, WIDTH)  # type: ignore[assignment]
            head.weight.requires_grad_(is_trained)
            head.features.requires_grad_(takes_gradient)
            set_pieces(rows, head.weight.element_size())
            expected, own = head.gradients(head.whole), {}
            expected = {name: None if each is None else each.clone() for name, each in expected.items()}
            own = head.gradients(head.by_pieces)
            found += [(f"{name}, {rows} rows", own[name], expected[name]) for name in own]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradients_are_those_of_whole_logits(dtype: torch.dtype) -> None:
    (found,) = run_ranks(gradients_of_heads, 1, dtype)
    for what, own, expected in found:
        if expected is None or own is None:
            assert own is expected, what
            continue
        assert own.dtype is expected.dtype
        error = float((own.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))
        # Without a sum in float32, a gradient is rounded once per pass either way.
        assert error <= (1e-3 if own.dtype is torch.bfloat16 else 1e-6), what


def most_alive(_context: RankContext, rows: int) -> tuple[int, int]:
    """The most bytes alive in two passes of a head in bfloat16, and those without a graph."""
    head = Head(torch.bfloat16)
    head.weight.main_grad = torch.zeros(WORDS, WIDTH)  # type: ignore[assignment]
    set_pieces(rows, 2)
    with LiveBytes([head.weight, head.weight.main_grad]) as training:
        head.by_pieces().backward(head.weighting)
    with torch.no_grad(), LiveBytes([head.weight]) as evaluating:
        head.by_pieces()
    return training.peak, evaluating.peak


def test_no_more_than_a_piece_of_logits_is_alive() -> None:
    rows = 10
    in_training, in_evaluation = run_ranks(most_alive, 1, rows)[0]
    piece, loss_piece = rows * WORDS * 2, rows // 3 * WORDS * 4
    # On the CPU the weight gradient's product is made before it is added, of factors in float32.
    product = 4 * (WORDS * WIDTH + rows * WORDS + rows * WIDTH)
    features = 2 * TOKENS * WIDTH * 2
    most = piece + max(4 * loss_piece, product) + features + 16 * TOKENS
    assert piece < in_training <= most
    assert piece < in_evaluation <= piece + 2 * loss_piece + features + 16 * TOKENS
    assert piece + 4 * loss_piece < TOKENS * WORDS * 2, "or whole logits would do"


# Of runs ----------------------------------------------------------------------------------------------------


def train_by_pieces(context: RankContext, arguments: Sequence[str]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step, with the head in pieces of 30 tokens; none makes whole logits."""
    run = start_run(context, arguments)
    from k25_train.training.step import train_step

    set_pieces(30, 4, words=run.config.model.vocab_size)
    for each in run.chunks:
        model = getattr(each, "module", each).language_model
        if model.post_process:
            model.compute_language_model_loss = None
    with run.data:
        results = [train_step(run, step) for step in range(1, run.config.train.steps + 1)]
    return [(result.loss, result.grad_norm) for result in results]


@pytest.mark.parametrize("name", LAYOUTS)
def test_runs_train_alike(data: Path, tmp_path: Path, name: str) -> None:
    from tests.helpers.runs import losses_of

    num_ranks, more = LAYOUTS[name]
    steps = ("train.steps=3", "optim.warmup=1", "optim.decay=1")
    whole = losses_of(overrides(data, tmp_path / "whole", *steps, *more), num_ranks)
    arguments = overrides(data, tmp_path / "pieces", *steps, *more, *EXACT_K2, BY_PIECES)
    for by_pieces in run_ranks(train_by_pieces, num_ranks, arguments):
        for found, expected in zip(by_pieces, whole, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)


def outputs(context: RankContext) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the tiny model in training, losses without a graph, and what its logits give."""
    from tests.helpers.tiny_model import build_random_model, documents, random_tokens

    model = build_random_model(context)
    set_pieces(9, 4, words=model.language_model.output_layer.weight.shape[0])
    tokens = random_tokens(64)
    inputs = {"tokens": tokens, "documents": documents(), "media_positions": torch.empty(0, dtype=torch.long)}
    training = model(**inputs, labels=tokens).detach()
    with torch.no_grad():
        evaluating, logits = model(**inputs, labels=tokens), model(**inputs)
    return training, evaluating, F.cross_entropy(logits.float(), tokens, reduction="none")


def test_evaluations_have_the_losses_of_whole_logits_and_models_still_give_them() -> None:
    training, evaluating, from_logits = run_ranks(outputs, 1)[0]
    torch.testing.assert_close(evaluating, training, rtol=1e-6, atol=0)
    torch.testing.assert_close(from_logits, training, rtol=1e-6, atol=0)
