"""What `quantize` would do with each leaf of a tree, shown before any work.

A plan is made of the pairs that `quantize` itself works on, so the two cannot differ. It needs shapes and
dtypes alone: arrays, `jax.ShapeDtypeStruct`s and models from `nnx.eval_shape` will all do.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from daq_jax import recipes
from daq_jax.analysis import sheets
from daq_jax.pairs import Pair, planned_pairs, refuse_unquantizable
from daq_jax.recipe import Recipe
from daq_jax.rules import DEFAULT_RULES, Decision, Rule
from daq_jax.tilings import TileView
from daq_jax.trees import PyTree

_COLUMNS = (
    sheets.Column("shape", "shape", "{}", "shape of the leaf"),
    sheets.Column("dtype", "dtype", "{}", "dtype of the leaf"),
    sheets.Column("axes", "in > out", "{}", "input axes and output axes; all other axes count matrices"),
    sheets.Column("matrices", "matrices", "{}", "number of matrices x rows (inputs) x columns (outputs)"),
    sheets.Column("format", "format", "{}", "number format of the codes"),
    sheets.Column("tile", "tile", "{}", "rows x columns that share a scale"),
    sheets.Column("scales", "scales", "{}", "shape of the scales"),
    sheets.Column("bytes_before", "bytes before", "{:,}", "bytes of the leaf"),
    sheets.Column(
        "bytes_after", "after", "{:,}", "bytes of the codes and scales, or of the leaf if it is kept"
    ),
    sheets.Column("why", "decided by", "{}", "the rule, or what is known of the leaf"),
)


@dataclasses.dataclass(frozen=True)
class PlannedLeaf:
    """What is done with one leaf.

    Attributes:
        path: path of the leaf.
        shape: shape of the leaf; `()` for a leaf that is no array.
        dtype: name of the dtype of the leaf, or of the type of a leaf that is no array.
        decision: what the rules say of the leaf.
        bytes_before: bytes of the leaf.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    decision: Decision
    bytes_before: int

    @property
    def quantized(self) -> bool:
        """Whether the leaf is quantized. If not, it is kept as it is."""
        return self.decision.quantize

    @property
    def why(self) -> str:
        """What decided: the purpose of a ready rule, a rule of one's own, or what is known of the leaf."""
        return self.decision.why

    @property
    def rule(self) -> str | None:
        """Pattern of the rule that decided; None where no rule did."""
        return self.decision.rule.pattern if self.decision.rule else None

    @property
    def recipe(self) -> Recipe | None:
        """How the leaf is quantized; None for a kept leaf."""
        return self.decision.recipe if self.quantized else None

    @property
    def view(self) -> TileView | None:
        """How the leaf is cut into tiles; None for a kept leaf."""
        how = self.decision
        return TileView(self.shape, how.matrix, how.recipe.tiling) if self.quantized else None

    @property
    def bytes_after(self) -> int:
        """Bytes of the codes and scales, or of the kept leaf."""
        if self.view is None:
            return self.bytes_before
        codes = np.dtype(jnp.dtype(self.decision.recipe.format.dtype))
        return math.prod(self.shape) * codes.itemsize + 4 * math.prod(self.view.grid)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Input axes, counted from the front; empty for a kept leaf."""
        return self.view.axes[1] if self.view else ()

    @property
    def outputs(self) -> tuple[int, ...]:
        """Output axes, counted from the front; empty for a kept leaf."""
        return self.view.axes[2] if self.view else ()

    @property
    def matrices(self) -> int:
        """Number of matrices that the leaf holds; 0 for a kept leaf."""
        return math.prod(self.view.batch) if self.view else 0

    @property
    def rows(self) -> int:
        """R, inputs of each matrix; 0 for a kept leaf."""
        return self.view.rows if self.view else 0

    @property
    def columns(self) -> int:
        """C, outputs of each matrix; 0 for a kept leaf."""
        return self.view.columns if self.view else 0

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns that share a scale; (0, 0) for a kept leaf."""
        return self.view.tile if self.view else (0, 0)

    @property
    def scales(self) -> tuple[int, ...]:
        """Shape of the scales; empty for a kept leaf."""
        return self.view.grid if self.view else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and words, ready for JSON."""
        names = ("shape", "dtype", "quantized", "why", "rule", "inputs", "outputs", "matrices", "rows")
        names += ("columns", "tile", "scales", "bytes_before", "bytes_after")
        values = {name: getattr(self, name) for name in names}
        plain = {k: list(x) if isinstance(x, tuple) else x for k, x in values.items()}
        parts = (
            {}
            if self.recipe is None
            else {"format": self.recipe.format.name, "tiling": repr(self.recipe.tiling)}
        )
        return plain | parts

    def _cells(self) -> list[str]:
        if self.recipe is None:
            middle = ["", "kept", "", "", ""]
        else:
            axes = " > ".join(",".join(map(str, axes)) for axes in (self.inputs, self.outputs))
            matrices = f"{self.matrices} x {self.rows} x {self.columns}"
            middle = [
                axes,
                matrices,
                self.recipe.format.name,
                "x".join(map(str, self.tile)),
                str(self.scales),
            ]
        counts = [f"{self.bytes_before:,}", f"{self.bytes_after:,}"]
        return [str(self.shape), self.dtype, *middle, *counts, self.why]


@dataclasses.dataclass(frozen=True, repr=False)
class Plan:
    """What `quantize` would do with a tree. Prints as a table, and shows itself as one in a notebook.

    Leaves whose paths differ in numbers alone, and that are treated alike, share a line of the table.

    Attributes:
        leaves: what is done with each leaf, by path.
    """

    leaves: dict[str, PlannedLeaf]

    @property
    def quantized(self) -> list[str]:
        """Paths of the leaves that are quantized."""
        return [path for path, leaf in self.leaves.items() if leaf.quantized]

    @property
    def kept(self) -> list[str]:
        """Paths of the leaves that are kept as they are."""
        return [path for path, leaf in self.leaves.items() if not leaf.quantized]

    @property
    def bytes_before(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.bytes_before for leaf in self.leaves.values())

    @property
    def bytes_after(self) -> int:
        """Bytes of all leaves once they are quantized."""
        return sum(leaf.bytes_after for leaf in self.leaves.values())

    def rules(self) -> list[Rule]:
        """Rules that say the same again, a rule for each leaf, whatever later versions know of its name."""
        return [leaf.decision.as_rule(path) for path, leaf in self.leaves.items()]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and words, ready for JSON."""
        return {
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "leaves": {path: leaf.to_dict() for path, leaf in self.leaves.items()},
        }

    def sheet(self) -> sheets.Sheet:
        """The plan as a table of words: the total, then leaves in the order of the tree."""
        alike: dict[tuple[str, ...], list[PlannedLeaf]] = collections.defaultdict(list)
        for leaf in self.leaves.values():
            alike[(re.sub(r"\d+", "*", leaf.path), *leaf._cells())].append(leaf)
        total = [""] * 7 + [f"{self.bytes_before:,}", f"{self.bytes_after:,}", ""]
        rows = [(sheets.TOTALS[0], total)]
        for (pattern, *cells), leaves in alike.items():
            rows.append((f"{pattern} ({len(leaves)} of these)" if leaves[1:] else leaves[0].path, cells))
        after = f"{len(self.quantized)} leaves are quantized, {len(self.kept)} are kept."
        return sheets.Sheet([], list(_COLUMNS), rows, [after])

    def __repr__(self) -> str:
        return sheets.text(self.sheet())

    def _repr_html_(self) -> str:
        return sheets.html(self.sheet())


def plan(
    base: PyTree,
    tuned: PyTree | None = None,
    recipe: Recipe = recipes.default,
    *,
    rules: Sequence[Rule] = DEFAULT_RULES,
) -> Plan:
    """What `quantize(base, tuned, recipe, rules=rules)` would do with each leaf. Computes nothing.

    Args:
        base: tree of weights before tuning: arrays, `jax.ShapeDtypeStruct`s, or a model from
            `nnx.eval_shape`.
        tuned: tree of weights after tuning; None for a tree like `base`.
        recipe: how leaves are quantized whose rule does not say.
        rules: which leaves are quantized, in place of `DEFAULT_RULES`.

    Returns:
        One entry for each leaf, in the order of `tuned`. Bytes are those in memory, where a code of 4 bits
        takes a byte.

    Raises:
        DaqError: as `quantize` does, but for NaN and infinity, which are not looked for.

    >>> shape = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16)
    >>> plan({"up": {"kernel": shape}}).leaves["up/kernel"].scales
    (32, 8)
    """
    pairs = planned_pairs(base, base if tuned is None else tuned, recipe, rules)
    refuse_unquantizable(pairs, check_finite=False)
    return Plan({pair.path: _planned(pair) for pair in pairs})


def _planned(pair: Pair) -> PlannedLeaf:
    leaf = pair.tuned
    is_array = hasattr(leaf, "dtype")
    shape = tuple(int(n) for n in leaf.shape) if is_array else ()
    dtype = str(leaf.dtype) if is_array else type(leaf).__name__
    return PlannedLeaf(pair.path, shape, dtype, pair.decision, sum(map(_bytes, jax.tree.leaves(leaf))))


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize if hasattr(x, "dtype") else 0
