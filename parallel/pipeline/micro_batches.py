"""How many micro-batches a schedule needs, and how the interleaved one groups them. Pure; standard library
only."""


def fewest_micro_batches(pp: int, vpp: int, *, overlaps: bool) -> int:
    """The fewest micro-batches of a step on a replica: with virtual stages each of the `pp` ranks starts on
    its own one, and `overlaps` runs one concurrently with another."""
    if vpp > 1:
        return pp
    return 2 if overlaps else 1


def micro_batch_group_size(num_micro_batches: int, pp: int) -> int:
    """Micro-batches that run through one virtual stage before the next one's turn.

    The interleaved schedule sends a group through chunk 0 of every rank, then through chunk 1, and so on. A
    group below `pp` would wait for itself, and so would a smaller one at the end: megatron-core
    (pipeline_parallel/schedules.py) requires pp <= group <= micro-batches, with a remainder of 0 or at least
    `pp`. The smallest such group keeps the fewest activations. It is `pp` if `pp` divides the number of
    micro-batches, and never more than all of them.

    Raises `ValueError` if there are fewer micro-batches than pipeline ranks.
    """
    if num_micro_batches < pp:
        raise ValueError(
            f"{num_micro_batches} micro-batches do not fill an interleaved pipeline of {pp} ranks"
        )
    sizes = range(pp, num_micro_batches + 1)
    return next(size for size in sizes if num_micro_batches % size == 0 or num_micro_batches % size >= pp)
