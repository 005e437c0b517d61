"""Every quantized leaf of the trees of JAX libraries is seen as the library contracts it: told by gradients.

A linear layer's gradient is a sum of outer products, inputs times what arrives at the outputs, one for each
of T tokens. Another loss of the same run changes the second factor alone. So gradients of several losses side
by side have rank T at most with the inputs as rows, and a larger one in any other view. The layers are
re-created here from the einsums that the libraries run.
"""

import math
import re
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import daq_jax as daq

# D features, F hidden, H heads, K heads of keys, k head size, V tokens, E experts, L layers, B blocks of
# layers, G gates, P and M features of projections. All sizes differ and exceed T: no two can be mixed up.
SIZES = {"D": 24, "F": 28, "H": 6, "K": 4, "k": 8, "V": 61, "E": 5, "L": 7, "B": 9, "G": 3, "P": 10, "M": 48}
T = 2

# Of each leaf the axes of its shape, and what the library does with it: inputs > outputs, others are stacks.
# None: it is no matrix, or decides too much to be quantized.
ATTENTION = {"query/kernel": ("D.Hk", "D>Hk"), "key/kernel": ("D.Kk", "D>Kk"), "out/kernel": ("H.kD", "Hk>D")}
DENSE = {"wi_0/kernel": ("D.F", "D>F"), "wi_1/kernel": ("D.F", "D>F"), "wo/kernel": ("F.D", "F>D")}


def within(block, leaves, stack=""):
    """Leaves of a block; a dot in a shape is where stacks stand."""
    return {f"{block}/{path}": (axes.replace(".", stack), does) for path, (axes, does) in leaves.items()}


def maxtext(stack):
    """A decoder of MaxText, with layers stacked on the axes after the first."""
    layer = {
        **within("self_attention", ATTENTION, stack),
        **within("mlp", DENSE, stack),
        "norm/scale": (f"D{stack}", None),
        "MoeBlock_0/gate/kernel": (f"D{stack}E", None),
        "MoeBlock_0/wi_0": (f"E{stack}DF", "D>F"),
        "MoeBlock_0/wo": (f"E{stack}FD", "F>D"),
    }
    top = {"token_embedder/embedding": ("VD", None), "decoder/logits_dense/kernel": ("DV", None)}
    return {**top, **within("decoder/layers", layer)}


MAXTEXT_OTHERS = {
    "gpt3/mlp/wi/kernel": ("DLF", "D>F"),
    "gpt3/self_attention/qkv_proj/kernel": ("DLGHk", "D>Hk"),
    "fused/self_attention/qkv_proj/kernel": ("DLHk", "D>Hk"),
    "fused/mlp/wi/kernel": ("DLGF", "D>F"),
    "fused/mlp/wo/kernel": ("FLD", "F>D"),
    "fused/norm/scale": ("DL", None),
    "mla/self_attention/wq_a/kernel": ("DLP", "D>P"),
    "mla/self_attention/wkv_b/kernel": ("PLHk", "P>Hk"),
    "qwen3_next/global_layer/attention/attention/out/kernel": ("MLD", "M>D"),
    "qwen3_next/local_layers/attention/in_proj_qkvz/kernel": ("DLBF", "D>F"),
    "qwen3_next/local_layers/attention/out_proj/kernel": ("FLBD", "F>D"),
    "qwen3_next/local_layers/attention/conv1d/kernel": ("KLB1F", None),
    "qwen3_next/local_layers/attention/A_log": ("HLB", None),
    "qwen3_next/local_layers/mlp/shared_expert_gate/kernel": ("DLB1", None),
    "gpt_oss/layers_0/GptOssMlp/gate/kernel": ("DLE", None),
    "gpt_oss/layers_0/GptOssAttention/sinks": ("HL", None),
    "gemma4/local_layers/layer_scalar": ("1LB", None),
    "gemma4/moe_block/wi_0/kernel": ("DL0", None),
}
TUNIX = {
    "embedder/input_embedding": ("VD", None),
    "layers/0/input_layernorm/w": ("D", None),
    "layers/0/attn/q_proj/w": ("DHk", "D>Hk"),
    "layers/0/attn/k_proj/w": ("DKk", "D>Kk"),
    "layers/0/attn/o_proj/w": ("HkD", "Hk>D"),
    "layers/0/mlp/gate_proj/kernel": ("DF", "D>F"),
    "layers/1/mlp/router/kernel": ("DE", None),
    "layers/1/mlp/gate_proj": ("EDF", "D>F"),
    "layers/1/mlp/down_proj": ("EFD", "F>D"),
    "lm_head/w": ("DV", None),
    "gemma/attn/q_einsum/w": ("HDk", "D>Hk"),
    "gemma/attn/kv_einsum/w": ("GKDk", "D>Kk"),
    "gemma/attn/attn_vec_einsum/w": ("HkD", "Hk>D"),
    "gemma/per_layer_input_gate/w": ("DP", "D>P"),
    "gemma/moe/gating_einsum": ("EGFD", "D>F"),
    "gemma/moe/linear": ("EFD", "F>D"),
    "gemma/moe/router_logits": ("DE", None),
}
GEMMA = {
    "embedder/input_embedding": ("VD", None),
    "layer_0/attn/q_einsum/w": ("HDk", "D>Hk"),
    "layer_0/attn/kv_einsum/w": ("GKDk", "D>Kk"),
    "layer_0/attn/attn_vec_einsum/w": ("HkD", "Hk>D"),
    "layer_0/mlp/gating_einsum": ("GFD", "D>F"),
    "layer_0/mlp/linear": ("FD", "F>D"),
    "layer_1/mlp/gating_einsum": ("GDF", "D>F"),
    "layer_1/mlp/linear": ("FD", "F>D"),
    "layer_0/pre_ffw_norm/scale": ("D", None),
    "layer_0/altup/prediction_coefs": ("KKK", None),
    "layer_0/altup/correction_coefs": ("KK", None),
    "layer_0/altup/modality_router/w": ("DK", None),
    "layer_0/laurel/linear_left/w": ("DP", "D>P"),
    "layer_0/laurel/linear_right/w": ("PD", "P>D"),
}
LLAMA = {
    "self_attn/q_proj/weight": ("MD", "D>M"),
    "self_attn/o_proj/weight": ("DM", "M>D"),
    "mlp/gate_proj/weight": ("FD", "D>F"),
    "mlp/down_proj/weight": ("DF", "F>D"),
    "mlp/gate/weight": ("ED", None),
    "input_layernorm/weight": ("D", None),
    "linear_attn/conv1d/weight": ("M1K", None),
    "linear_attn/A_log": ("H", None),
}
HF = {
    "model/embed_tokens/weight": ("VD", None),
    "lm_head/weight": ("VD", None),
    "score/weight": ("ED", None),
    **within("model/layers/0", LLAMA),
    "transformer/h/0/attn/c_attn/weight": ("DM", "D>M"),
    "transformer/wpe/weight": ("PD", None),
    "patch/conv/weight": ("FGKP", "GKP>F"),
    "encoder/layer/0/output/dense/weight": ("DF", "F>D"),
}
DOTTED = {path.replace("/", "."): leaf for path, leaf in HF.items()}
KERAS = {
    "tok/embeddings": ("VD", None),
    "mha/query/kernel": ("DHk", "D>Hk"),
    "mha/attention_output/kernel": ("HkD", "Hk>D"),
    "separable/depthwise_kernel": ("GDK", None),
    "separable/pointwise_kernel": ("1DF", "D>F"),
    "lstm/lstm_cell/recurrent_kernel": ("FM", "F>M"),
    "predictions/kernel": ("DV", "D>V"),
}
STACKED = {  # by vmap, on the first axis
    "layers/norm/scale": ("LD", None),
    "layers/attn/query/kernel": ("LDHk", "D>Hk"),
    "layers/attn/out/kernel": ("LHkD", "Hk>D"),
    "layers/mixer/A_log": ("LH", None),
    "layers/mixer/D": ("LH", None),
    "layers/moe/choose/kernel": ("LDE", None),
    "layers/moe/up": ("LEDF", "D>F"),
}
VALUES = {f"{path}/value": leaf for path, leaf in TUNIX.items()}
TREES = {
    "maxtext": (maxtext(""), "MAXTEXT_RULES"),
    "maxtext scanned": (maxtext("L"), "MAXTEXT_RULES"),
    "maxtext scanned twice": (maxtext("LB"), "MAXTEXT_RULES"),
    "maxtext scanned, default rules": (maxtext("L"), "DEFAULT_RULES"),
    "maxtext, other blocks": (MAXTEXT_OTHERS, "MAXTEXT_RULES"),
    "tunix": (TUNIX, "TUNIX_RULES"),
    "tunix on disk": (VALUES, "TUNIX_RULES"),
    "gemma": (GEMMA, "GEMMA_RULES"),
    "hugging face": (HF, "HF_RULES"),
    "hugging face, flat": (DOTTED, "HF_RULES"),
    "keras": (KERAS, "KERAS_RULES"),
    "stacked": (STACKED, "DEFAULT_RULES"),
}


def sizes(axes):
    return tuple(int(a) if a.isdigit() else SIZES[a] for a in axes)


def gradients(path, axes, does):
    """Gradients of three losses of a linear layer in its weight, for T random tokens."""
    letters = [c if c != "1" else "i" for c in axes]
    inputs, outputs = does.split(">")
    stack = "".join(c for c in letters if c not in inputs + outputs)
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    of = {**SIZES, "i": 1}
    x = rng.normal(size=(T, *(of[c] for c in stack + inputs)))
    arriving = (rng.normal(size=(T, *(of[c] for c in stack + outputs))) for _ in range(3))
    return [np.einsum(f"t{stack}{inputs},t{stack}{outputs}->{''.join(letters)}", x, g) for g in arriving]


def rank_ratio(grads, rows, columns):
    """Largest ratio of the (T + 1)-th singular value to the first one, over the matrices of a view."""
    shape = grads[0].shape
    batch = [a for a in range(len(shape)) if a not in rows + columns]
    size = [math.prod(shape[a] for a in axes) for axes in (rows, columns)]
    beside = np.concatenate([g.transpose(*batch, *rows, *columns).reshape(-1, *size) for g in grads], axis=-1)
    s = np.linalg.svd(beside, compute_uv=False)
    return (s[:, T] / s[:, 0]).max() if s.shape[-1] > T else 1.0


def plan_of(tree, rules):
    leaves = {path: jax.ShapeDtypeStruct(sizes(axes), jnp.bfloat16) for path, (axes, _) in tree.items()}
    return daq.plan(leaves, recipe=daq.recipes.absmax, rules=rules)


@pytest.mark.parametrize("name", TREES)
def test_every_quantized_leaf_is_seen_as_its_library_contracts_it(name):
    tree, rules = TREES[name]
    found = {}
    for path, leaf in plan_of(tree, getattr(daq, rules)).leaves.items():
        axes, does = tree[path]
        if not leaf.quantized or does is None:
            found[path] = leaf.quantized == (does is not None)
        else:
            grads = gradients(path, axes, does)
            found[path] = bool(rank_ratio(grads, leaf.inputs, leaf.outputs) < 1e-6)
    assert [path for path, right in found.items() if not right] == []


def test_the_gradients_tell_a_transposed_view_and_heads_on_the_wrong_side():
    grads = gradients("q", "HDk", "D>Hk")
    assert rank_ratio(grads, (1,), (0, 2)) < 1e-6
    assert rank_ratio(grads, (1,), (2,)) < 1e-6  # finer
    assert min(rank_ratio(grads, *view) for view in (((0, 2), (1,)), ((0, 1), (2,)), ((0,), (1, 2)))) > 1e-3


def test_heads_share_the_scales_of_their_matrix():
    plan = plan_of(TREES["maxtext scanned"][0], daq.MAXTEXT_RULES)
    leaf = plan.leaves["decoder/layers/self_attention/out/kernel"]
    assert (leaf.inputs, leaf.outputs, leaf.matrices) == ((0, 2), (3,), SIZES["L"])


# --- Where shapes leave two readings ------------------------------------------------------------------------

DOUBTFUL = {
    "gemma without linear": ({"mlp/gating_einsum": "GFD"}, "mlp/gating_einsum", daq.GEMMA_RULES),
    "gemma, square": (
        {"mlp/gating_einsum": "GDD", "mlp/linear": "DD"},
        "mlp/gating_einsum",
        daq.DEFAULT_RULES,
    ),
    "weights of PyTorch": ({"layers.0.fc1.weight": "FD"}, "layers.0.fc1.weight", daq.DEFAULT_RULES),
    "a stack of weights": ({"mlp/up/weight": "LFD"}, "mlp/up/weight", daq.DEFAULT_RULES),
    "axes of one length": ({"mix/kernel": "KKK"}, "mix/kernel", daq.DEFAULT_RULES),
    "heads by another name": ({"a/into/kernel": "DHk", "b": "D"}, "a/into/kernel", daq.DEFAULT_RULES),
    "heads out of them": (
        {"a/into/kernel": "DHk", "a/from/kernel": "HkD", "b": "D"},
        "a/from/kernel",
        daq.DEFAULT_RULES,
    ),
}


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_leaf_with_two_readings_is_named(name):
    tree, path, rules = DOUBTFUL[name]
    tree = {p: (axes, None) for p, axes in tree.items()}
    with pytest.warns(daq.AmbiguousMatrixWarning) as told:
        plan_of(tree, rules)
    assert any(repr(path) in str(w.message) for w in told)
    own = [daq.use("gating|weight|kernel", matrix=((-1,), (-2,)))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_of(tree, own)  # the caller has said it


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("vector", ["mlp/router/bias", "mlp/per_expert_scale"])
def test_a_vector_with_a_number_for_each_expert_speaks_for_their_stack(vector):
    plan = plan_of({"mlp/up/kernel": ("EDF", None), vector: ("E", None)}, daq.DEFAULT_RULES)
    assert plan.leaves["mlp/up/kernel"].matrices == SIZES["E"]


def test_leaves_that_differ_in_numbers_are_named_once_with_the_rules_for_them():
    tree = {f"layers.{i}.self_attn.q_proj.weight": ("MD", None) for i in range(3)}
    with pytest.warns(daq.AmbiguousMatrixWarning) as told:
        plan_of(tree, daq.DEFAULT_RULES)
    (message,) = [str(w.message) for w in told]
    assert re.search(r"'layers\.0\.self_attn\.q_proj\.weight' \(48, 24\) \(and 2 like it\)", message)
    assert "daq.HF_RULES" in message


@pytest.mark.filterwarnings("error")
def test_layers_stacked_on_the_second_axis_are_not_taken_for_matrices_of_few_rows():
    shapes = {"layers/norm/scale": (48, 2), "layers/wi/kernel": (48, 2, 28), "layers/wo/kernel": (28, 2, 48)}
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    plan = daq.plan(leaves, rules=daq.MAXTEXT_RULES)
    assert plan.leaves["layers/wo/kernel"].decision.matrix == ((-3,), (-1,))


def test_a_bias_tells_the_outputs_of_a_weight():
    tree = {"fc/weight": ("FD", None), "fc/bias": ("F", None), "gpt2/weight": ("FD", None)}
    tree["gpt2/bias"] = ("D", None)
    plan = plan_of(tree, daq.DEFAULT_RULES)
    assert (plan.leaves["fc/weight"].inputs, plan.leaves["gpt2/weight"].inputs) == ((1,), (0,))


@pytest.mark.parametrize("turned", [False, True])
def test_experts_tell_their_orientation_beside_each_other(turned):
    tree = {"experts/gate_up_proj": (2, 8, 24), "experts/down_proj": (2, 12, 8)}
    if turned:
        tree = {path: (e, b, a) for path, (e, a, b) in tree.items()}
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in tree.items()}
    plan = daq.plan(leaves)
    assert {leaf.inputs for leaf in plan.leaves.values()} == {(2,) if turned else (1,)}
    assert plan.leaves["experts/gate_up_proj"].rows == 8


def test_rules_of_ones_own_stand_above_what_shapes_tell():
    tree = {"moe/choose/kernel": ("DE", None), "moe/up": ("EDF", None), "empty": ("D0", None)}
    assert plan_of(tree, daq.DEFAULT_RULES).quantized == ["moe/up"]
    assert plan_of(tree, [daq.use("choose"), daq.keep("up")]).quantized == ["moe/choose/kernel"]
    with pytest.raises(daq.DaqError, match="'empty': it is empty"):
        plan_of(tree, [daq.use("empty")])


def test_square_heads_are_no_stack_of_layers():
    tree = {"attn/query/kernel": (24, 8, 8), "attn/query/bias": (8, 8), "attn/query_norm/scale": (8,)}
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for path, shape in tree.items()}
    plan = daq.plan(leaves)
    assert plan.leaves["attn/query/kernel"].outputs == (1, 2)
