"""A search of one's own: ratios around AbsMax in equal factors, then two halvings of the step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import daq_jax as daq


@dataclasses.dataclass(frozen=True)
class Factors(daq.Search):
    """`2 n + 1` ratios from `1 / reach` to `reach`, then twice the two ratios half a step beside the best."""

    reach: float = 1.3
    n: int = 3

    @property
    def is_tile_local(self) -> bool:
        """The scale of a tile depends on that tile alone, so shards need not talk to one another."""
        return True

    def __call__(self, trials: daq.Trials) -> jax.Array:
        ratios = np.geomspace(1 / self.reach, self.reach, 2 * self.n + 1).astype(np.float32)
        best = trials.best(jnp.asarray(ratios))  # AbsMax itself is in the middle
        step = self.reach ** (1 / self.n)
        for _ in range(2):
            step = step**0.5
            best = trials.best(jnp.stack([best.ratio / step, best.ratio * step]), start=best)
        return best.scale


base = jax.random.normal(jax.random.key(0), (512, 512), jnp.bfloat16)
tuned = base + 0.02 * jax.random.normal(jax.random.key(1), base.shape, jnp.bfloat16)
for search in (daq.AbsMax(), Factors(), daq.CoarseToFine(0.8, 1.5, 5, 10)):
    q = daq.quantize(base, tuned, daq.Recipe(search=search))
    print(f"{search}: cosine {daq.compare(base, tuned, q).total.cosine:.4f}")
