"""The comparison of arXiv:2603.22324: what it compares, and that it judges as the demo does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq
from benchmarks import paper
from daq_jax.demo import model
from daq_jax.demo.study import Pair

TINY = model.ModelSize(layers=1, width=16, heads=2, context=8)


def test_every_search_of_the_paper_is_there_over_every_range():
    found = paper.recipes()
    assert found["sign", "0.8 to 1.5"] == daq.recipes.paper_sign
    assert found["cosine", "0.8 to 1.5"] == daq.recipes.paper_cosine
    assert found["mse", "0.8 to 1.5"] == daq.recipes.mse
    assert len(found) == 2 + len(paper.METRICS) * len(paper.RANGES)
    assert found["AbsMax", "1"] == daq.recipes.absmax
    assert found["ours", paper.ON_GRID] == daq.recipes.default


def test_behaviour_is_that_of_the_demo():
    pair = Pair(*(model.make_params(TINY, jax.random.key(i)) for i in range(2)))
    other = model.make_params(TINY, jax.random.key(2))
    texts = [jnp.asarray(np.random.default_rng(i).integers(0, 256, 33), jnp.uint8) for i in range(2)]
    windows = [model.cut_windows(text, TINY.context) for text in texts]
    found = paper.behaviour(pair, other, windows, TINY)
    general, style = (model.mean_loss(other, text, size=TINY) for text in texts)
    kl = model.mean_divergence(pair.tuned, other, texts[1], size=TINY)
    wanted = {"kl": float(kl), "style": float(style), "general": float(general)}
    assert found == pytest.approx(wanted, rel=1e-5)
