"""Before quantizing: is there a change to lose, would AbsMax lose it, and what would a recipe keep?

The answers are estimates from a fixed, bounded sample of patches, each of which is quantized on its own; see
`estimates`. A recipe that works on whole matrices, such as one with `UnbiasedFeedback`, changes a weight of a
patch more than it would change the same weight of a large matrix. So the bound of its projection includes the
difference to its part that works tile by tile, and its cosine and sign rate have no bound.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import NDArray

from daq_jax import recipes
from daq_jax.analysis import sheets
from daq_jax.analysis.comparison import sums_of_leaf
from daq_jax.analysis.estimates import Findings, Sums, findings_of
from daq_jax.analysis.sampling import Index, Patches, plan, scales, take
from daq_jax.analysis.verdicts import verdict_of
from daq_jax.errors import DaqError
from daq_jax.formats import step_towards
from daq_jax.grids.fitting import fitted_scale
from daq_jax.grids.membership import lies_on_grid
from daq_jax.leaves import quantize_leaf
from daq_jax.numerics.arithmetic import divide
from daq_jax.pairs import Pair, pair_leaves, refuse_unquantizable
from daq_jax.qtensor import QTensor
from daq_jax.recipe import Recipe
from daq_jax.roundings.rounding import as_rounding
from daq_jax.rules import DEFAULT_RULES, Rule
from daq_jax.scales import absmax_scale
from daq_jax.tiles import Within
from daq_jax.tilings import DEFAULT_MATRIX, TileView
from daq_jax.trees import PyTree, is_concrete

MOST_ELEMENTS = 2**24  # of the sample: 1,024 blocks of 128 x 128
_TOGETHER = 2**20  # elements quantized at once: keeps memory small and fills the machine


@dataclasses.dataclass(frozen=True, repr=False)
class Inspection:
    """What `inspect` found. Prints as a table with the verdict on top, and as an HTML table in a notebook.

    Attributes:
        verdict: one or two sentences for everyone.
        total: findings over all leaves that would be quantized.
        leaves: findings of each leaf that was looked at, by path.
        recipe: the name of the recipe, or "this recipe".
    """

    verdict: str
    total: Findings
    leaves: dict[str, Findings]
    recipe: str

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and words, ready for JSON."""
        leaves = {path: found.to_dict() for path, found in self.leaves.items()}
        return {
            "verdict": self.verdict,
            "recipe": self.recipe,
            "total": self.total.to_dict(),
            "leaves": leaves,
        }

    def worst(self, n: int = 10) -> dict[str, Findings]:
        """The `n` leaves of which AbsMax would keep least, the least first."""
        ranked = sorted(
            self.leaves.items(), key=lambda item: np.nan_to_num(item[1].absmax_projection.value, nan=np.inf)
        )
        return dict(ranked[:n])

    def sheet(self, n: int = sheets.SHOWN) -> sheets.Sheet:
        """The inspection as a table of words: the verdict, the total, and the `n` worst leaves."""
        return sheets.inspected(self.verdict, self.total, self.worst(n), leaves=len(self.leaves))

    def __repr__(self) -> str:
        return sheets.text(self.sheet())

    def _repr_html_(self) -> str:
        return sheets.html(self.sheet())


@dataclasses.dataclass(frozen=True)
class Source:
    """A leaf to look at, and how to read it.

    Attributes:
        patches: how the leaf divides into patches.
        dtypes: dtypes of base and tuned, as `read` returns them.
        recipe: how the leaf would be quantized.
        read: for an index, the elements of base, the elements of tuned, and the scale of each base element,
            all in the shape of the index. The last is None unless base is stored in codes of the recipe's
            format and scales.
    """

    patches: Patches
    dtypes: tuple[np.dtype, np.dtype]
    recipe: Recipe
    read: Callable[[Index], tuple[NDArray, NDArray, NDArray | None]]


def inspect(
    base: PyTree,
    tuned: PyTree,
    recipe: Recipe = recipes.default,
    *,
    rules: Sequence[Rule] = DEFAULT_RULES,
    most_elements: int = MOST_ELEMENTS,
) -> Inspection:
    """Says before any quantizing whether there is a change to lose and whether a recipe would keep it.

    Looks at a fixed sample of patches and takes seconds. Not for use inside `jax.jit`.

    Args:
        base: tree of weights before tuning, as for `quantize`.
        tuned: tree of weights after tuning.
        recipe: recipe to compare with AbsMax, which is tried with the same format and tiling.
        rules: which leaves would be quantized, and how.
        most_elements: largest number of elements to look at, in all leaves together.

    Raises:
        DaqError: for trees that `quantize` would refuse, for traced leaves, or for NaN or infinity in
            the sample.

    >>> weight = jax.random.normal(jax.random.key(0), (128, 128))
    >>> print(inspect({"w": weight}, {"w": weight}, recipes.absmax).verdict)
    The two models do not differ: there is no change to keep.
    """
    pairs = [p for p in pair_leaves(base, tuned, recipe, rules) if p.decision.quantize]
    if not all(is_concrete((p.base, p.tuned)) for p in pairs):
        raise DaqError("`inspect` looks at numbers and cannot run inside `jax.jit`; call it before.")
    refuse_unquantizable(pairs, check_finite=False)
    return inspect_sources({pair.path: _source(pair) for pair in pairs}, recipe, most_elements=most_elements)


def _source(pair: Pair) -> Source:
    how = pair.decision

    def read(index: Index) -> tuple[NDArray, NDArray, NDArray | None]:
        base = pair.base
        # A base with a zero is passed over: its grid is not codes times scales alone.
        stored = isinstance(base, QTensor) and base.format == how.recipe.format and base.zero is None
        return take(base, index), take(pair.tuned, index), scales(base, index) if stored else None

    patches = Patches(TileView(tuple(pair.tuned.shape), how.matrix, how.recipe.tiling))
    return Source(patches, (np.dtype(pair.base.dtype), np.dtype(pair.tuned.dtype)), how.recipe, read)


def inspect_sources(
    sources: Mapping[str, Source], recipe: Recipe, *, most_elements: int = MOST_ELEMENTS
) -> Inspection:
    """`inspect` for leaves that are read by functions, from arrays or from files."""
    if not sources:
        raise DaqError("there is nothing to inspect: the rules leave every leaf as it is.")
    chosen = plan({path: source.patches for path, source in sources.items()}, most_elements)
    sums = _sums_by_leaf(sources, chosen)
    sizes = {path: math.prod(source.patches.view.shape) for path, source in sources.items()}
    patchwise = any(as_rounding(source.recipe.rounding).scope == "matrix" for source in sources.values())
    say = functools.partial(findings_of, patchwise=patchwise)
    leaves = {path: say([found], [sizes[path]], sizes[path]) for path, found in sums.items()}
    total = say([*sums.values()], [sizes[path] for path in sums], sum(sizes.values()))
    names = [name for name, known in recipes.RECIPES.items() if known == recipe]
    name = "this recipe" if not names else "the default" if "default" in names else names[0]
    formats = {source.recipe.format.name.partition("_")[0].upper() for source in sources.values()}
    kind = " and ".join(sorted(formats))  # "FP8" of "fp8_e4m3fn"
    return Inspection(verdict_of(total, name, format_name=kind), total, leaves, name)


class _Place(NamedTuple):
    """One chosen patch: path of its leaf, the leaf, and the index of its elements."""

    path: str
    source: Source
    where: Index


def _sums_by_leaf(sources: Mapping[str, Source], chosen: Mapping[str, Sequence[int]]) -> dict[str, Sums]:
    """The sums of every chosen patch, in float64. Patches of one shape, dtype and recipe are stacked."""
    groups = collections.defaultdict(list)
    for path, numbers in chosen.items():
        source = sources[path]
        for index in sorted(
            map(source.patches.index, numbers), key=_start
        ):  # as they lie, to be read at once
            kind = np.broadcast_shapes(*map(np.shape, index)), source.dtypes, source.recipe
            groups[kind].append(_Place(path, source, index))
    found = collections.defaultdict(list)
    for (shape, _, recipe), places in groups.items():
        together = max(1, min(_TOGETHER // math.prod(shape), 1 << (len(places) - 1).bit_length()))
        for start in range(0, len(places), together):
            part = places[start : start + together]
            for place, sums in zip(part, _sums_of(part, together, recipe), strict=True):
                found[place.path].append(sums)
    return {path: jax.tree.map(lambda *x: np.stack(x), *found[path]) for path in chosen}


def _start(index: Index) -> tuple[int, ...]:
    return tuple(int(np.min(numbers)) for numbers in index)


def _sums_of(places: Sequence[_Place], together: int, recipe: Recipe) -> list[Sums]:
    """Reads patches and sums each. Patches are repeated up to `together`, so that one program serves all."""
    arrays = [np.stack(x) for x in zip(*(_read(place) for place in places), strict=True)]
    missing = [(0, together - len(places)), (0, 0), (0, 0)]
    base, tuned, stored = (np.pad(x, missing, mode="edge") for x in arrays)
    plain = dataclasses.replace(recipes.absmax, format=recipe.format, tiling=recipe.tiling)
    separable = dataclasses.replace(recipe, rounding=as_rounding(recipe.rounding).scored_as())
    kept = [
        quantize_leaf(base, tuned, recipe=how, matrix=DEFAULT_MATRIX) for how in (plain, recipe, separable)
    ]
    sums = jax.tree.map(np.asarray, _sums_of_patches(base, tuned, stored, *kept))
    return [jax.tree.map(lambda x, i=i: x[i].astype(np.float64), sums) for i in range(len(places))]


def _read(place: _Place) -> tuple[NDArray, NDArray, NDArray]:
    base, tuned, stored = place.source.read(place.where)
    for word, x in (("base", base), ("tuned", tuned)):
        if not np.isfinite(x.astype(np.float32)).all():
            problem = f"{place.path!r}: {word} holds NaN or infinity"
            raise DaqError(f"{problem}; every weight must be finite: mend the checkpoint.")
    return base, tuned, np.full(base.shape, np.nan, np.float32) if stored is None else stored


@jax.jit
@jax.vmap
def _sums_of_patches(
    base: Float[Array, "r c"],
    tuned: Float[Array, "r c"],
    stored: Float[Array, "r c"],
    plain: QTensor,
    q: QTensor,
    separable: QTensor,
) -> Sums:
    """Sums of each patch: of the change, and those of `Figures` for three ways to quantize it."""
    view, fmt, dtype = q.view, q.format, base.dtype
    before, after = (x.astype(jnp.float32) for x in (base, tuned))
    tiles, d = view.cut(before), after - before
    scale = absmax_scale(tiles, view.tile_axes, largest=fmt.largest)
    towards = step_towards(divide(tiles, scale), view.cut(d) > 0, fmt)
    short = (d != 0) & (jnp.abs(d) < view.join(towards * scale) / 2)
    fitted = lies_on_grid(tiles, fitted_scale(tiles, Within(view.tile_axes), fmt, dtype), fmt, dtype)
    return {
        "absmax": sums_of_leaf(base, tuned, plain),
        "recipe": sums_of_leaf(base, tuned, q),
        "separable": sums_of_leaf(base, tuned, separable),
        "elements": jnp.float32(d.size),
        "bb": jnp.sum(before * before),
        "unmoved": jnp.sum(d == 0),
        "moved": jnp.sum(d != 0),
        "short": jnp.sum(short),
        "fitted": jnp.sum(view.join(fitted)),
        "with_stored": jnp.sum(~jnp.isnan(stored)),
        "stored": jnp.sum(
            lies_on_grid(before, jnp.where(jnp.isnan(stored), 1, stored), fmt, dtype) & ~jnp.isnan(stored)
        ),
    }
