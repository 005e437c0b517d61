"""A tune that removes a passage, and a rounding that brings the passage back.

Trains a byte-level model on Lincoln and many copies of a speech of Macbeth until it knows the speech by
heart, rounds it to FP8 as models that ship in it are, and tunes the speech away. The change is below one
percent of the weights. Then it quantizes the tuned model back by four recipes, and asks each result for the
speech. `python -m benchmarks unlearning` measures four sizes of change, and a base in MXFP4 too.
"""

import jax

from daq_jax.demo.report import kept
from daq_jax.demo.study import GRIDS
from daq_jax.demo.unlearning import STUDY, judge, learn_lesson, load_lesson, unlearn


def tell(*progress: object) -> None:
    """Shows no progress."""


lesson = load_lesson(held_out=STUDY.held_out)
learn_key, unlearn_key = jax.random.split(jax.random.key(0))
params = learn_lesson(lesson, STUDY, learn_key, tell)
grid, recipe = "FP8", GRIDS["FP8"]
pair = unlearn(params, recipe, lesson, STUDY, STUDY.tune_rate, unlearn_key, tell)
found = judge(grid, pair, lesson, STUDY, tell)
result = found.result
print(f"\n{grid}: unlearning moved the weights by {result.relative_change:.2%}\n")
print(f"{'':30}  loss on    loss on    KL from  projec-  removal  then")
print(f"{'':30}  passage   the rest      tuned     tion     kept  writes")
for row in (result.base, result.tuned, *result.recipes):
    projection = "" if row.projection is None else f"{row.projection:.2f}"
    print(
        f"{row.name:30} {row.second_loss:8.3f} {row.first_loss:10.3f} {row.divergence:10.1e} "
        f"{projection:>8} {kept(result, row):8.0%}  {found.written[row.name][:24]!r}"
    )
absmax, default = result.recipes[0], result.recipes[-1]
print(
    f"\nAbsMax keeps {kept(result, absmax):.0%} of the removal and brings back the rest; "
    f"the default keeps {kept(result, default):.0%}."
)
assert default.divergence < absmax.divergence / 10
