"""Attention stays inside documents, positions restart with each, and the largest logits are right."""

import pytest
import torch
from torch import Tensor

from tests.helpers.ranks import RankContext, RankError, run_ranks
from tests.helpers.tiny_model import LENGTHS, build_random_model, documents, modules_of, random_tokens

pytestmark = pytest.mark.distributed


def logits_after_changing_a_document(context: RankContext) -> tuple[Tensor, Tensor, Tensor]:
    model = build_random_model(context, num_dense_layers=3).eval()
    tokens = random_tokens(64)
    changed = tokens.clone()
    changed[21:54] = (tokens[21:54] + 1) % 240
    whole = model(tokens, documents())
    alone = model(tokens[54:], documents((10,)))
    return whole.detach(), model(changed, documents()).detach(), alone.detach()


def test_documents_do_not_see_each_other() -> None:
    whole, changed, alone = run_ranks(logits_after_changing_a_document, 1)[0]
    differs = (whole != changed).any(1)
    assert not differs[:21].any()
    assert not differs[54:].any()
    assert differs[21:54].all()
    torch.testing.assert_close(whole[54:], alone, rtol=1e-5, atol=1e-6)


def gradients_of_one_documents_loss(context: RankContext) -> Tensor:
    model = build_random_model(context).eval()
    embedded = []
    model.language_model.embedding.register_forward_hook(
        lambda _module, _args, output: embedded.append(output) or output.retain_grad()
    )
    model(random_tokens(64), documents())[21:54].square().sum().backward()
    return embedded[0].grad.squeeze(1)


def test_the_loss_of_a_document_reaches_its_own_tokens_only() -> None:
    gradients = run_ranks(gradients_of_one_documents_loss, 1)[0]
    assert gradients[21:54].abs().amax(1).min() > 0
    assert gradients[:21].abs().max() == 0
    assert gradients[54:].abs().max() == 0


def queries_and_keys_of_equal_tokens(context: RankContext) -> tuple[Tensor, Tensor]:
    [attention, *_] = modules_of(build_random_model(context), "PackedLatentAttention")
    hidden = torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(1)).expand(64, 1, 64)
    query, key, *_ = attention.get_query_key_value_tensors(hidden, packed_seq_params=documents())
    return query.detach(), key.detach()


def test_rotary_positions_restart_with_every_document() -> None:
    for rows in run_ranks(queries_and_keys_of_equal_tokens, 1)[0]:
        longest = rows[21:54]
        assert torch.equal(rows[:20], longest[:20])
        assert torch.equal(rows[20:21], longest[:1])
        assert torch.equal(rows[54:], longest[:10])
        assert not torch.equal(longest[0], longest[1])


def tables_of_rotations(context: RankContext) -> int:
    model = build_random_model(context).eval()
    [attention, *_] = modules_of(model, "PackedLatentAttention")
    tables = type(attention.rotary_pos_emb).forward
    before = tables.cache_info().currsize
    for longest in (10, 20, 40, 64):
        model(random_tokens(64), documents((64 - longest, longest) if longest < 64 else (64,)))
    return tables.cache_info().currsize - before


def test_one_table_of_rotations_is_kept_for_documents_of_all_lengths() -> None:
    assert run_ranks(tables_of_rotations, 1)[0] == 1


def dense_max_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Reference: query and key [H, L, Q] -> [H]."""
    logits = query.double() @ key.double().transpose(1, 2) * scale
    later = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return logits.masked_fill(later, -torch.inf).amax((1, 2)).float()


def differences_of_max_logits(_context: RankContext) -> list[float]:
    from k25_train.model.max_logits import max_logits_per_head

    differences = []
    for length in (1, 255, 256, 257, 700, 4700):
        generator = torch.Generator().manual_seed(length)
        query, key = torch.randn(2, 3, length, 8, generator=generator)
        # Large products of a query with a later key must not count, in its own block or in another one.
        key[:, -1] = 100 * query[:, 0]
        found = max_logits_per_head(query, key, 0.3)
        differences.append((found - dense_max_logits(query, key, 0.3)).abs().max().item())
    return differences


def test_max_logits_equal_a_dense_reference_over_any_number_of_blocks() -> None:
    assert max(run_ranks(differences_of_max_logits, 1)[0]) < 1e-4


def recorded_max_logits(context: RankContext) -> tuple[list[Tensor], Tensor | None]:
    model = build_random_model(context)
    [core, *_] = modules_of(model, "DocumentAttention")
    seen: list[tuple[Tensor, Tensor]] = []
    core.register_forward_hook(lambda _module, arguments, _output: seen.append(arguments[:2]))
    with torch.no_grad():
        model(random_tokens(64), documents())
        unasked = core.max_logits
        core.record_max_logits = True
        model(random_tokens(64, seed=1), documents())
        first = core.max_logits
        model(random_tokens(64, seed=2), documents())
        # What an evaluation sees does not count.
        model.eval()(random_tokens(64, seed=3), documents((64,)))
    expected = [
        torch.stack(
            [
                dense_max_logits(q.transpose(0, 1), k.transpose(0, 1), core.softmax_scale)
                for q, k in zip(query.split(LENGTHS), key.split(LENGTHS), strict=True)
            ]
        ).amax(0)
        for query, key in seen[1:3]
    ]
    return [first - expected[0], core.max_logits - torch.maximum(*expected)], unasked


def test_max_logits_are_recorded_on_request_over_documents_and_passes() -> None:
    differences, unasked = run_ranks(recorded_max_logits, 1)[0]
    assert unasked is None
    assert [difference.shape for difference in differences] == [(4,), (4,)]
    assert max(difference.abs().max().item() for difference in differences) < 1e-5


def run_without_documents(context: RankContext) -> None:
    build_random_model(context)(random_tokens(64), None)


def test_attention_without_documents_is_refused() -> None:
    with pytest.raises(RankError, match=r"needs packed_seq_params=PackedDocuments\.of"):
        run_ranks(run_without_documents, 1)
