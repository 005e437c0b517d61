"""The verbs: `quantize` a tree of weights, and `dequantize` it."""

import collections
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer

from daq_jax import recipes
from daq_jax.analysis.relation import warn_unlikely
from daq_jax.batches import plan_batches, quantize_batch
from daq_jax.numerics.arithmetic import is_staged
from daq_jax.pairs import Pair, planned_pairs, refuse_abstract, refuse_unquantizable
from daq_jax.recipe import Recipe
from daq_jax.rules import DEFAULT_RULES, Rule
from daq_jax.trees import PyTree, is_concrete, is_qtensor, with_leaves


def quantize(
    base: PyTree,
    tuned: PyTree,
    recipe: Recipe = recipes.default,
    *,
    rules: Sequence[Rule] = DEFAULT_RULES,
    donate: bool = False,
    check_finite: bool = True,
) -> PyTree:
    """Quantizes a tuned model so that what tuning changed survives.

    Pure; works eagerly and under `jax.jit`, `jax.eval_shape` and `jax.export`, on NumPy arrays, and on
    sharded arrays, whose sharding the result keeps. Gradients through it are 0, those of codes and scales as
    constants; the straight-through estimate of a weight `w` is `w + jax.lax.stop_gradient(deq - w)`, with
    `deq = quantize(base, w).dequantize()`.

    Args:
        base: tree of weights before tuning: bfloat16, float16 or float32 arrays `[..., in, out]`, or
            QTensors, each of which stands for what it dequantizes to.
        tuned: tree of weights after tuning, of the same structure. Where its dtype is not that of `base`, the
            change is taken in float32, and the result has the dtype of `tuned`.
        recipe: how to quantize leaves whose rule does not say.
        rules: which leaves are quantized, in place of `DEFAULT_RULES`; write `[..., *daq.DEFAULT_RULES]` to
            add to those.
        donate: delete each input array as soon as its codes exist. Ignored under a trace.
        check_finite: refuse NaN and infinity. A tile that holds one gets the scale NaN, so it takes a look at
            all scales once every leaf is on its way; with `donate`, a look at both trees first. Under a trace
            there is no look.

    Returns:
        A tree like `tuned`, with a `QTensor` for each leaf that was quantized.

    Warns:
        UnlikelyPairWarning: if the two trees look swapped or unrelated, told from a corner of a few leaves;
            not under a trace.

    Raises:
        DaqError: naming every leaf at fault: other structure or shape, an empty leaf, a masked or deleted
            array, a rule that quantizes what cannot be quantized, all before any work, or NaN or infinity.

    Source: arXiv:2603.22324 for the question; see `Recipe` for the answers.

    >>> base = {"kernel": jnp.ones((128, 128))}
    >>> tuned = {"kernel": jnp.full((128, 128), 1.25)}
    >>> quantize(base, tuned)["kernel"].codes.dtype
    dtype(float8_e4m3fn)
    """
    pairs = planned_pairs(base, tuned, recipe, rules)
    refuse_abstract(pairs)
    donate = donate and not is_staged()
    later = not donate and is_concrete((base, tuned))
    refuse_unquantizable(pairs, check_finite, later=later)
    if is_concrete((base, tuned)) and not is_staged():
        chosen = [pair for pair in pairs if pair.decision.quantize]
        warn_unlikely({p.path: p.base for p in chosen}, {p.path: p.tuned for p in chosen})
    uses = collections.Counter(id(x) for x in jax.tree.leaves((base, tuned)))
    results, finite = [pair.tuned for pair in pairs], []
    for batch in plan_batches(pairs):
        found, flag = quantize_batch([pairs[i] for i in batch])
        finite.append(flag)
        for i, q in dict(zip(batch, found, strict=True)).items():  # a batch may repeat its last pair
            results[i] = q
            if donate:
                _delete(pairs[i], uses)
    if check_finite and later and is_concrete(finite) and not _are_true(finite):
        refuse_unquantizable(pairs, check_finite)
    return with_leaves(tuned, results)


@jax.jit
def _all_of(flags: Sequence[jax.Array]) -> jax.Array:
    return jnp.stack(flags).all()


def _are_true(flags: Sequence[jax.Array]) -> bool:
    """Whether all are. The host waits for one answer from each set of devices."""
    groups = collections.defaultdict(list)
    for flag in flags:
        groups[frozenset(flag.sharding.device_set)].append(flag)
    answers = [_all_of(x) if len(x) > 1 else x[0] for x in groups.values()]
    return all(jax.device_get([_towards_host(x) for x in answers]))


def _towards_host(flag: jax.Array) -> jax.Array:
    """A flag where the host reads it soonest: on a GPU in pinned memory, which took 0.25 ms off an H200's."""
    sharding = flag.sharding
    if [device.platform for device in sharding.device_set] != ["gpu"]:
        return flag
    return jax.device_put(flag, sharding.with_memory_kind("pinned_host"))


def _delete(pair: Pair, uses: collections.Counter[int]) -> None:
    """Frees the arrays of a pair, but for those that stand in other places of the trees too."""
    for x in jax.tree.leaves((pair.base, pair.tuned)):
        uses[id(x)] -= 1
        if not uses[id(x)] and isinstance(x, jax.Array) and not isinstance(x, Tracer):
            x.delete()


def dequantize(tree: PyTree, dtype: jax.typing.DTypeLike | None = None) -> PyTree:
    """Arrays again: every QTensor of a tree dequantized, everything else as it is.

    Args:
        tree: any pytree.
        dtype: of the results; None gives each leaf's original dtype.

    Raises:
        DaqError: if there is no such dtype.
    """
    return jax.tree.map(lambda x: x.dequantize(dtype) if is_qtensor(x) else x, tree, is_leaf=is_qtensor)
