"""Histograms of a leaf, for the pictures of a comparison: of changes, signs and scales.

Changes are counted from a sample of the leaf's elements: `d = tuned - base` and `q = dequantized - base`, in
units of the leaf's root mean square of `d`. Scales are counted as ratios to the AbsMax scale of their tile.
So the histograms of several leaves have the same edges and may be added.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array
from numpy.typing import NDArray

from daq_jax.analysis.sampling import evenly_spread, take, weights
from daq_jax.numerics.arithmetic import divide
from daq_jax.qtensor import QTensor, as_array
from daq_jax.scales import absmax_scale

MOST = 2**16  # largest sample of a leaf, in elements
WIDTH = 4.0  # root mean squares of d: a d or q beyond is counted in the outermost bin
SIZE_EDGES = np.logspace(-8, 1, 37)  # of |d|, weight units: four bins to a factor of ten
CHANGE_EDGES = np.linspace(-WIDTH, WIDTH, 65)  # of d and q, in root mean squares of d
RATIO_EDGES = 2 ** ((np.arange(98) - 48.5) / 24)  # of scale / AbsMax scale: 24 bins an octave, 1 inside a bin


@dataclasses.dataclass(frozen=True)
class Details:
    """Histograms of one leaf, or of several added up.

    Attributes:
        looked_at: number of elements in the sample, from which `density`, `moved` and `same_sign` are made.
        density: `[64, 64]` number of elements by (d, q) in root mean squares of d, with edges `CHANGE_EDGES`.
        moved: `[36]` number of elements by |d|, with edges `SIZE_EDGES`; elements with d = 0 are in no bin.
        same_sign: `[36]` number of elements by |d| whose q has the sign of d, with edges `SIZE_EDGES`.
        ratios: `[97]` number of tiles by chosen scale / AbsMax scale, with edges `RATIO_EDGES`.
    """

    looked_at: int
    density: NDArray
    moved: NDArray
    same_sign: NDArray
    ratios: NDArray

    def __add__(self, other: "Details") -> "Details":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)}
        return Details(**sums)


def details_of(base: ArrayLike | QTensor, tuned: ArrayLike | QTensor, quantized: QTensor) -> Details:
    """Histograms of one leaf, from at most 65,536 of its elements and from all of its scales."""
    index = evenly_spread(quantized.shape, MOST)
    before, after = (take(x, index).astype(np.float32) for x in (base, tuned))
    d, q = after - before, weights(quantized, index) - before
    unit = float(np.sqrt(np.mean(np.square(d, dtype=np.float64)))) or 1.0
    inside = [np.clip(x / unit, -WIDTH, WIDTH) for x in (d, q)]
    size = np.clip(np.abs(d[d != 0]), SIZE_EDGES[0], SIZE_EDGES[-1])
    kept = np.sign(d[d != 0]) == np.sign(q[d != 0])
    ratios = np.clip(np.asarray(_ratios(tuned, quantized)), RATIO_EDGES[0], RATIO_EDGES[-1])
    return Details(
        looked_at=d.size,
        density=np.histogram2d(*inside, bins=[CHANGE_EDGES, CHANGE_EDGES])[0].astype(np.int64),
        moved=np.histogram(size, SIZE_EDGES)[0],
        same_sign=np.histogram(size[kept], SIZE_EDGES)[0],
        ratios=np.histogram(ratios, RATIO_EDGES)[0],
    )


@jax.jit
def _ratios(tuned: Array | QTensor, q: QTensor) -> Array:
    """Each scale divided by the AbsMax scale of its tile."""
    tiles = q.view.cut(jnp.asarray(as_array(tuned)))
    plain = q.view.gather(absmax_scale(tiles.astype(jnp.float32), q.view.tile_axes, largest=q.format.largest))
    return divide(q.scale, plain)
