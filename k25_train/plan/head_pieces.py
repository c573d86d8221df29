"""How many tokens the output head takes at a time where its logits are made again; torch-free."""

from k25_train.config.model import HEAD_PIECE_BYTES


def rows_of_head(num_tokens: int, num_words: int, element_bytes: int) -> int:
    """Tokens of a piece: as few pieces as `HEAD_PIECE_BYTES` of logits allow, alike but for the last.

    Args:
        num_tokens: of the micro-batch, on this rank.
        num_words: of the vocabulary.
        element_bytes: of a logit.
    """
    most = max(HEAD_PIECE_BYTES // (num_words * element_bytes), 1)
    num_pieces = -(-num_tokens // most)
    return -(-num_tokens // max(num_pieces, 1))
