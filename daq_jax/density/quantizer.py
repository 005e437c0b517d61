"""Density-aware quantization: 4-bit codes, finest where the weights are dense, chosen by a layer's output.

Stage 1 (`centring`) chooses the affine map of each group of weights from the weights alone. Stage 2
(`adjustment`) moves the map by the loss of the layer's output. Rounding by the output (`output_rounding`)
then chooses codes by that loss. Source: arXiv:2410.12187 for the two stages; the rounding is not part of it.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array

from daq_jax.density.centring import align
from daq_jax.density.grams import Grams
from daq_jax.density.group_layout import GroupLayout
from daq_jax.density.groups import AffineMap, Groups, Loss
from daq_jax.density.output_rounding import LossBlocks, round_by_output
from daq_jax.density.recipe import DensityRecipe, density
from daq_jax.errors import DaqError, refuse
from daq_jax.metrics import Metric
from daq_jax.numerics.machine import Machine
from daq_jax.numerics.sharding import run_sharded, sharding_of
from daq_jax.pairs import Pair, pair_leaves, refuse_abstract, refuse_unquantizable, warn_unused
from daq_jax.qtensor import QTensor
from daq_jax.recipe import Recipe
from daq_jax.rules import DEFAULT_RULES, NAMED_RULES, Rule
from daq_jax.tilings import Matrix, TileView, scale_sharding
from daq_jax.trees import PyTree, with_leaves

_IN_CACHE = 2**18  # weights that a CPU works on at a time
_NAMED = 8  # leaves that a warning names
_NARROWEST = 64  # outputs: fewer leave vector lanes empty


class UncalibratedWarning(UserWarning):
    """The calibrated model multiplied nothing with some of the weights, which are therefore kept."""


def quantize_density(
    params: PyTree,
    grams: Grams | None = None,
    recipe: DensityRecipe = density,
    *,
    base: PyTree | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
    check_finite: bool = True,
) -> PyTree:
    """Quantizes the weights of a model, usually to 4 bits, with a small effect on the outputs of its layers.

    Pure. Works eagerly and under `jax.jit`, on NumPy arrays and on sharded arrays. The result is sharded like
    the input. The result of a layer depends on that layer alone.

    Args:
        params: tree of weights: bfloat16, float16 or float32 arrays `[..., in, out]`.
        grams: from `calibrate`; None for no calibration data: then the loss is the squared error of weights.
        recipe: how the weights are quantized.
        base: weights before tuning, a tree like `params`; only for a recipe with a `metric`.
        rules: which leaves are quantized, in place of `DEFAULT_RULES`.
        check_finite: look for NaN and infinity first.

    Returns:
        A tree like `params`, with a `QTensor` that has a `zero` for each leaf that was quantized. A leaf that
        the calibrated model multiplied nothing with, such as a table of positions, is kept, and an
        `UncalibratedWarning` names it.

    Raises:
        DaqError: before any work, naming every leaf at fault: what `quantize` refuses, a kernel with Gram
            matrices of another group size, and, where the model multiplied nothing with a leaf, one that a
            `use` of your own names, or all leaves if there is no other.

    Source: arXiv:2410.12187, and see `DensityRecipe`.

    >>> weight = jax.random.normal(jax.random.key(0), (128, 8)) + 1
    >>> q = quantize_density({"kernel": weight})["kernel"]
    >>> q.codes.shape, q.scale.shape, q.zero.shape
    ((128, 8), (1, 8), (1, 8))
    """
    _refuse_mismatch(recipe, base)
    pairs = pair_leaves(params if base is None else base, params, Recipe(), rules)
    warn_unused(pairs, rules)
    refuse_abstract(pairs)
    refuse_unquantizable(pairs, check_finite)
    unused = _unused(pairs, grams)
    pairs = [_kept(p) if p.path in unused else p for p in pairs]
    _refuse_uncalibrated(pairs, grams, recipe)
    if unused:
        _warn_of(unused)
    return with_leaves(
        params, [_quantize_leaf(p, grams, recipe) if p.decision.quantize else p.tuned for p in pairs]
    )


def _refuse_mismatch(recipe: DensityRecipe, base: PyTree | None) -> None:
    if (recipe.metric is None) != (base is None):
        raise DaqError(
            "a metric of the change needs a base, and a base serves nothing else: "
            f"`recipe.metric` is {recipe.metric} and `base` is {'not ' if base is None else ''}given."
        )


def _view(pair: Pair, recipe: DensityRecipe) -> TileView:
    return TileView(tuple(pair.tuned.shape), pair.decision.matrix, recipe.tiling)


def _unused(pairs: Sequence[Pair], grams: Grams | None) -> dict[str, float]:
    """Leaves to keep, as the calibrated model multiplied nothing with them: shares of the weights, by path.

    A leaf that a rule of the caller's own wants quantized is not among them. Nor is any, if the model
    multiplied nothing with all leaves: then the model or the tree is another one.
    """
    wanted = [p for p in pairs if p.decision.quantize]
    known = {kernel.path for kernel in grams.inputs} if grams else set()
    if known.isdisjoint(p.path for p in wanted):
        return {}
    total = sum(math.prod(p.tuned.shape) for p in wanted)
    return {
        p.path: math.prod(p.tuned.shape) / total
        for p in wanted
        if p.path not in known and (p.decision.rule is None or p.decision.rule in NAMED_RULES)
    }


def _kept(pair: Pair) -> Pair:
    return dataclasses.replace(pair, decision=dataclasses.replace(pair.decision, quantize=False))


def _warn_of(unused: dict[str, float]) -> None:
    more = f" and {len(unused) - _NAMED} more" if len(unused) > _NAMED else ""
    names = ", ".join(map(repr, list(unused)[:_NAMED]))
    warnings.warn(
        f"{names}{more}, {sum(unused.values()):.1%} of the weights to quantize, are kept as they are: the "
        "calibrated model multiplied nothing with them, or did so in a loop or with a batch axis. "
        "quantize_density without `grams` quantizes them; keep(...) before the other rules says that they "
        "are to be kept",
        UncalibratedWarning,
        stacklevel=3,
    )


def _refuse_uncalibrated(pairs: Sequence[Pair], grams: Grams | None, recipe: DensityRecipe) -> None:
    """Raises one DaqError that names every leaf that is to be quantized and whose inputs are not known."""
    row = recipe.loss == "row"
    if grams is None:
        if row:
            raise DaqError("a loss over the whole row needs Gram matrices: pass calibrate(..., joint=True).")
        return
    problems = [
        f"{p.path!r}: {why}."
        for p in pairs
        if p.decision.quantize and (why := grams.problem(p.path, _view(p, recipe), recipe.group, row=row))
    ]
    if problems:
        refuse(
            f"{len(problems)} of the leaves cannot be quantized by the output of their layers",
            problems,
            "Calibrate with the model and the group size that are to be quantized, or keep these leaves by "
            "a rule: put keep('^PATH$') before your other rules.",
        )


def _quantize_leaf(pair: Pair, grams: Grams | None, recipe: DensityRecipe) -> QTensor:
    gram = None if grams is None else grams.products[pair.path]
    base = None if recipe.metric is None else pair.base
    how = _How(recipe, pair.decision.matrix, sharding_of(pair.tuned), Machine.of(pair.tuned).one_device)
    return _quantize(pair.tuned, base, gram, how=how)


@dataclasses.dataclass(frozen=True)
class _How:
    """What shapes the compiled program, beside the arrays."""

    recipe: DensityRecipe
    matrix: Matrix
    sharding: NamedSharding | None
    one_device: bool


@functools.partial(jax.jit, static_argnames="how")
def _quantize(weight: Array, base: Array | None, gram: Array | None, *, how: _How) -> QTensor:
    weight, base, gram = lax.stop_gradient((weight, base, gram))  # as in `quantize`
    recipe = how.recipe
    view = TileView(tuple(weight.shape), how.matrix, recipe.tiling)

    layout = GroupLayout(view)

    def run(weight: Array, base: Array | None, gram: Array | None) -> tuple[Array, Array, Array]:
        group_grams, blocks = _damped(layout, gram, recipe)

        def place(weight: Array, base: Array | None) -> tuple[Array, AffineMap]:
            groups = Groups(weight, jnp.asarray(layout.real), group_grams, recipe.format, recipe.shift)
            values, affine = _place(groups, blocks, base, recipe)
            return recipe.format.encode(values), affine

        before = None if base is None else layout.cut(base)
        codes, affine = _by_columns(place, layout.cut(weight), before, split=how.one_device)
        scale, zero = (x.reshape(view.grid) for x in affine)
        return layout.join(codes), scale, zero

    of_scale = scale_sharding(how.sharding, view)
    codes, scale, zero = run_sharded(run, (how.sharding, of_scale, of_scale))(weight, base, gram)
    dtype, zero = np.dtype(weight.dtype), zero if recipe.shift else None
    return QTensor(codes, scale, recipe.format, recipe.tiling, dtype, how.matrix, zero)


def _damped(
    layout: GroupLayout, gram: Array | None, recipe: DensityRecipe
) -> tuple[Array, LossBlocks | None]:
    """Gram matrix of each group, and the blocks of the recipe's loss, both with a damped diagonal."""

    def damped(gram: Array, inputs: np.ndarray) -> Array:
        mean = jnp.trace(gram, axis1=-2, axis2=-1) / jnp.asarray(inputs, jnp.float32)
        return gram + recipe.damping * mean[..., None, None] * jnp.eye(gram.shape[-1], dtype=jnp.float32)

    groups = damped(layout.group_grams(gram), layout.real.sum((1, 2)))
    if not recipe.sweeps:
        return groups, None
    if recipe.loss == "group" or gram is None:
        return groups, LossBlocks.of(groups)
    return groups, LossBlocks.of(damped(layout.row_gram(gram)[None], layout.real.sum(keepdims=True)[0, 0]))


def _by_columns(place: Callable[..., Any], weight: Array, base: Array | None, *, split: bool) -> Any:
    """`place` on all outputs of all matrices, with results joined over the outputs.

    Args:
        place: of weights `[N, n, C]` and their bases, which may be None, to arrays that end with the outputs.
        weight: `[B, N, n, C]` float32.
        base: `[B, N, n, C]` float32, or None.
        split: whether a CPU may take some outputs at a time, so that they stay in its cache.
    """
    batch, count, size, columns = weight.shape

    def in_parts(width: int, *matrices: Array | None) -> Any:
        parts = -(-columns // width)

        def cut(x: Array) -> Array:
            x = jnp.pad(x, [(0, 0), (0, 0), (0, 0), (0, parts * width - columns)])
            x = jnp.moveaxis(x.reshape(batch, count, size, parts, width), 3, 1)
            return x.reshape(-1, count, size, width)

        def join(x: Array) -> Array:
            x = x.reshape(batch, parts, *x.shape[1:])
            x = jnp.moveaxis(x, 1, -2)
            return x.reshape(*x.shape[:-2], parts * width)[..., :columns]

        done = lax.map(lambda parts: place(*parts), jax.tree.map(cut, matrices))
        return jax.tree.map(join, done)

    whole = functools.partial(in_parts, columns)
    if not split:
        return whole(weight, base)
    width = min(columns, max(_NARROWEST, _IN_CACHE // (count * size)))
    return lax.platform_dependent(weight, base, cpu=functools.partial(in_parts, width), default=whole)


def _place(
    groups: Groups, blocks: LossBlocks | None, base: Array | None, recipe: DensityRecipe
) -> tuple[Array, AffineMap]:
    """Code values `[N, n, C]` and affine maps of one matrix, by the stages of a recipe."""
    affine = AffineMap(*align(groups.weight, groups.real, groups.format, recipe.centre, recipe.coverage))
    loss = groups.loss
    if recipe.metric is not None and base is not None:
        loss = _loss_of_change(groups, base, recipe.metric)
    if recipe.adjust is not None:
        affine = recipe.adjust(groups, loss, affine)
    if blocks is not None:
        return round_by_output(groups, blocks, affine, sweeps=recipe.sweeps)
    return groups.nearest(affine), affine


def _loss_of_change(groups: Groups, base: Array, metric: Metric) -> Loss:
    """Minus a metric of the change, for each group and output; `base` is `[N, n, C]` float32."""

    def tiles(x: Array) -> Array:
        return jnp.moveaxis(x, 1, 2).reshape(-1, x.shape[1])

    change = tiles(groups.weight - base)

    def loss(values: Array, affine: AffineMap) -> Array:
        kept = jnp.where(groups.real, affine.weights(values) - base, 0)
        return -metric(change, tiles(kept)).reshape(affine.scale.shape)

    return loss
