"""Which leaves of a tree are quantized together, by one program.

Roundings of whole matrices take many small steps, in which one matrix leaves most of a GPU idle: there leaves
of one kind go as a batch. Everywhere else each leaf goes by itself.
"""

import collections
import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from daq_jax.leaves import multiplies_on_gpu, quantize_alike, quantize_and_look
from daq_jax.numerics.sharding import sharding_of
from daq_jax.pairs import Pair
from daq_jax.qtensor import QTensor, codes_of
from daq_jax.roundings.rounding import as_rounding

_MOST_TOGETHER = 300_000_000  # elements of a batch of weights


def plan_batches(pairs: Sequence[Pair]) -> list[list[int]]:
    """The batches of a tree: positions in `pairs` of the leaves that are quantized at once.

    All batches of a kind have one size, so that one program does for them: the last repeats its last pair.
    """
    alike = collections.defaultdict[tuple[Any, ...], list[int]](list)
    for i, pair in enumerate(pairs):
        if pair.decision.quantize:
            most = better_together(pair)
            alike[(1, i) if most == 1 else (most, *_kind(pair))].append(i)
    batches = []
    for (most, *_), some in alike.items():
        count = -(-len(some) // most)
        size = -(-len(some) // count)
        some += some[-1:] * (count * size - len(some))
        batches += [some[i : i + size] for i in range(0, len(some), size)]
    return sorted(batches)


def better_together(pair: Pair) -> int:
    """How many leaves like this one are best quantized by one program."""
    rounding = as_rounding(pair.decision.recipe.rounding)
    if rounding.draws:  # each leaf has a stream of its own, and a batch has none
        return 1
    if not multiplies_on_gpu(pair.tuned, rounding) or sharding_of(codes_of(pair.tuned)):
        return 1
    return max(1, _MOST_TOGETHER // max(1, math.prod(np.shape(pair.tuned))))


def _kind(pair: Pair) -> tuple[Any, ...]:
    """The same for pairs that one program takes as a batch."""
    leaves, structure = jax.tree.flatten((pair.base, pair.tuned))
    places = (frozenset(x.devices()) if isinstance(x, jax.Array) else None for x in leaves)
    shapes = ((x.shape, x.dtype) for x in leaves)
    return pair.decision.recipe, pair.decision.matrix, structure, *shapes, *places


def quantize_batch(pairs: Sequence[Pair]) -> tuple[list[QTensor], jax.Array]:
    """Quantizes the pairs of a batch; also returns whether all of them are finite."""
    how = pairs[0].decision
    if len(pairs) > 1:
        bases, tuneds = [pair.base for pair in pairs], [pair.tuned for pair in pairs]
        return quantize_alike(bases, tuneds, recipe=how.recipe, matrix=how.matrix)
    (pair,), stream = pairs, zlib.crc32(pairs[0].path.encode())
    q, finite = quantize_and_look(pair.base, pair.tuned, recipe=how.recipe, matrix=how.matrix, stream=stream)
    return [q], finite
