"""The whole story, small: a base that shipped in FP8, a tune, and what two ways of rounding leave of it.

Trains a byte-level model on Lincoln, rounds it to FP8 as a model that ships in FP8 is, and tunes it on
Macbeth. Then it asks of each recipe how far the quantized model's predictions are from the tuned model's
(KL), and how much of what tuning gained is left. Takes about a minute on two CPU cores. `daq-jax demo` does
the same at length, and `python -m benchmarks behaviour --size gpu` with 25M parameters and every recipe.
"""

import jax

import daq_jax as daq
from daq_jax.demo.study import GRIDS, Study, make_pairs, measure
from daq_jax.demo.texts import load_text

study = Study(base_steps=400, tune_steps=100)
lincoln, macbeth = (load_text(name, held_out=study.held_out) for name in ("lincoln", "macbeth"))
fp8 = {"FP8": GRIDS["FP8"]}
pair = make_pairs(study, fp8, lincoln, macbeth, jax.random.key(0), lambda *progress: None)["FP8"]
recipes = {"AbsMax": daq.recipes.absmax, "default": daq.recipes.default}
found = measure(recipes, "FP8", pair, study, lincoln, macbeth, lambda *progress: None)

print(f"Tuning moved the weights by {found.relative_change:.2%}.")
gained = found.base.second_loss - found.tuned.second_loss
for row in found.recipes:
    kept = (found.base.second_loss - row.second_loss) / gained
    print(f"{row.name}: projection {row.projection:.2f}, {kept:.0%} of the gain, KL {row.divergence:.1e}")

absmax, default = found.recipes
assert default.divergence < absmax.divergence / 10
