"""How a paged scoring call is shared out: whole numbers only, so that an engine may plan it on the host."""

from collections.abc import Sequence

SPLIT = 256
"""Keys of one item of work; rows of logits have room for one more block of as many."""


def paged_schedule(lengths: Sequence[int], new_tokens: int, workers: int, split: int = SPLIT) -> list[tuple[int, int]]:
    """Where each of some equal workers begins: DeepGEMM's schedule of a paged call, as integers.

    A sequence is cut into ⌈length / split⌉ items, each to be done for every *atom* of at most two new tokens; items are
    numbered sequence by sequence and atom by atom. All workers get as many items, the last ones one more where they do
    not divide.

    Args:
        lengths: Keys of each sequence, as its last new token sees them.
        new_tokens: New tokens N per sequence.
        workers: How many share the work.
        split: Keys of one item.

    Returns:
        ``workers + 1`` pairs (atom, item within it): where each worker begins, then the end, (atoms in all, 0).
    """
    atoms = -(-new_tokens // 2) if new_tokens > 1 else 1
    items = [-(-length // split) for length in lengths]
    each, extra = divmod(sum(items) * atoms, workers)
    starts, sequence, before = [], 0, 0
    for worker in range(workers):
        at = worker * each + max(0, worker - (workers - extra))
        while sequence < len(items) and before + items[sequence] * atoms <= at:
            before += items[sequence] * atoms
            sequence += 1
        atom, item = divmod(at - before, items[sequence]) if sequence < len(items) else (0, 0)
        starts.append((sequence * atoms + atom, item))
    return [*starts, (len(items) * atoms, 0)]
