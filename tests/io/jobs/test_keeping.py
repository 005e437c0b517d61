"""What is a linear layer, by name, by size and by the user's word; and what a config lists as skipped."""

import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest

import daq_jax as daq
from daq_jax import cli
from daq_jax.io.hf.compressed_tensors import compressed_config
from daq_jax.io.hf.skip_lists import skip_list
from tests.hf_folders import BF16, CONFIG, llama, tuned_from, write_folder

ABSMAX = daq.recipes.absmax
UP = "model.layers.0.mlp.up_proj.weight"


def plan_of(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], config: dict, **options: Any) -> dict:
    tensors = {name: np.zeros(shape, BF16) for name, shape in shapes.items()}
    base, tuned = (write_folder(path / word, [tensors], CONFIG | config) for word in ("b", "t"))
    how: dict[str, Any] = {"memory_gb": 2, "plan_only": True, "format": "fp8-channel"} | options
    return daq.quantize_folder(base, tuned, path / "out", ABSMAX, **how)


def test_rows_or_columns_as_many_as_words_are_an_embedding_or_a_head(tmp_path):
    shapes = {
        "model.shared.weight": (320, 128),
        "cls.predictions.decoder.weight": (320, 128),
        "classes.weight": (128, 320),
        "model.layers.0.mlp.up_proj.weight": (320, 128),  # a layer of as many outputs by chance
        "model.projection.weight": (128, 128),
    }
    found = plan_of(tmp_path, shapes, {"text_config": {"vocab_size": 320}})
    assert list(found["quantized"]) == [UP, "model.projection.weight"]
    assert "320 rows or columns are its words" in found["kept"]["classes.weight"]


def test_words_are_counted_by_the_table_where_the_config_names_no_number(tmp_path):
    shapes = {"emb.embed_tokens.weight": (320, 128), "output_head_x.weight": (320, 128), UP: (128, 128)}
    assert list(plan_of(tmp_path, shapes, {})["quantized"]) == [UP]


def test_embeddings_and_heads_outside_of_layers_are_kept_by_name_whatever_their_size(tmp_path):
    names = ("shared", "model.shared", "cls.predictions.decoder", "lm_head.decoder", "proj_out", "to_logits")
    shapes = {f"{name}.weight": (384, 128) for name in names} | {UP: (128, 128)}
    shapes |= {"model.layers.0.mlp.shared.weight": (128, 128)}
    found = plan_of(tmp_path, shapes, {})
    assert list(found["quantized"]) == ["model.layers.0.mlp.shared.weight", UP]


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])
def test_rows_as_many_as_experts_are_a_router(key, tmp_path):
    shapes = {
        "model.layers.0.mlp.chooser.weight": (64, 128),
        "model.layers.0.mlp.experts.0.up.weight": (64, 128),
        "model.layers.0.self_attn.k_proj.weight": (64, 128),  # of as many outputs by chance
    }
    found = plan_of(tmp_path, shapes, {key: 64})
    assert found["kept"] == {"model.layers.0.mlp.chooser.weight": "router: 64 rows are its experts"}


def test_gates_of_routers_and_of_shared_experts_are_kept_by_name(tmp_path):
    gates = (
        "layers.0.ffn.gate",
        "model.layers.0.mlp.gate.wg",
        "model.layers.0.mlp.shared_expert_gate",
        "model.layers.0.feed_forward.gate",
        "backbone.layers.0.mixer.gate",
        "model.layers.0.moe.gating",
        "model.layers.0.mlp.gate.linear",
        "model.layers.0.mlp.switch",
    )
    shapes = {f"{name}.weight": (256, 128) for name in gates} | {
        "model.layers.0.mlp.gate_proj.weight": (256, 128),
        "model.layers.0.mlp.one.weight": (1, 128),
    }
    found = plan_of(tmp_path, shapes, {})
    assert list(found["quantized"]) == ["model.layers.0.mlp.gate_proj.weight"]


@pytest.mark.parametrize(
    "tower",
    [
        "vision_tower.vision_model.encoder",
        "model.visual.blocks",
        "audio_tower",
        "multi_modal_projector",
        "model.connector",
        "model.embed_vision",
        "thinker.audio_encoder",
        "model.vision",
        "audio",
        "model.sam_model",
        "qformer.encoder",
        "perceiver_resampler",
        "model.mm_encoder",
    ],
)
def test_towers_and_projectors_are_kept_beside_a_text_model_unless_asked_for(tower, tmp_path):
    inner = f"{tower}.layers.0.fc1.weight"
    shapes = {inner: (128, 128), "language_model.model.layers.0.mlp.up_proj.weight": (128, 128)}
    found = plan_of(tmp_path / "1", shapes, {})
    assert found["kept"] == {inner: "in a vision or audio tower, or a projector"}
    if "embed" not in tower:
        asked = plan_of(tmp_path / "2", shapes, {}, only=["fc1"])
        assert list(asked["quantized"]) == [inner]
    if "tower" in tower:
        alone = plan_of(tmp_path / "3", {inner: (128, 128)}, {})
        assert list(alone["quantized"]) == [inner]


@pytest.mark.parametrize(
    ("kind", "turned"),
    [("gpt2", True), ("imagegpt", True), ("decision_transformer", True), ("gpt_bigcode", False)],
)
def test_layers_stored_in_out_are_kept(kind, turned, tmp_path):
    shapes = {"h.0.mlp.c_fc.weight": (128, 256)}
    if turned:
        with pytest.raises(ValueError, match=r"no tensor of it can be quantized.*stored \[in, out\]"):
            plan_of(tmp_path, shapes, {"model_type": kind})
    else:
        assert plan_of(tmp_path, shapes, {"model_type": kind})["quantized"]


def test_a_skip_list_has_the_head_and_the_names_of_both_loaders():
    assert skip_list(["model.embed_tokens.weight"], {}) == ["lm_head", "model.embed_tokens"]
    stored = [
        "language_model.lm_head.weight",
        "language_model.model.layers.0.mlp.down_proj.weight",
        "vision_tower.layers.0.fc1.weight",
        "model.layers.1.mlp.gate.weight",
    ]
    found = skip_list(stored, {"text_config": {}})
    loaded = {
        "lm_head",
        "model.language_model.layers.0.mlp.down_proj",
        "model.vision_tower.layers.0.fc1",
        "model.language_model.layers.1.mlp.gate",
    }
    assert loaded | {name.removesuffix(".weight") for name in stored} <= set(found)
    assert found == sorted(set(found))


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("model.layers.1.mlp.experts.down_proj", ["model.layers.1.mlp.experts.0.down_proj"]),
        ("model.layers.1.mlp.experts.0.down_proj.weight", []),
    ],
)
def test_single_experts_of_a_stack_that_is_kept_are_ignored_and_no_others(stored, asked):
    ignored = compressed_config("int-quantized", skip_list([stored], {}), weights={})["ignore"]
    patterns = [name.removeprefix("re:") for name in ignored if name.startswith("re:")]
    others = ["model.layers.11.mlp.experts.0.down_proj", "model.layers.1.mlp.down_proj"]
    renamed = [name.replace("model.", "language_model.model.") for name in asked]
    for name in asked + renamed:
        assert any(re.match(pattern, name) for pattern in patterns)
    assert not any(re.match(pattern, name) for pattern in patterns for name in others)
    assert bool(patterns) == bool(asked)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_called_tied_is_left_out_only_if_it_is_the_embedding(same, tmp_path):
    base = llama()
    tuned = tuned_from(base)
    if same:
        tuned["lm_head.weight"] = tuned["model.embed_tokens.weight"]
    config = CONFIG | {"tie_word_embeddings": True}
    folders = write_folder(tmp_path / "b", [base], config), write_folder(tmp_path / "t", [tuned], config)
    report = daq.quantize_folder(*folders, tmp_path / "out", ABSMAX, memory_gb=2)
    assert ("lm_head.weight" in report["left_out"]) == same
    assert ("lm_head.weight" in report["kept"]) != same


def test_a_single_file_beside_other_shards_is_refused(tmp_path):
    folder = write_folder(tmp_path / "f", [llama(layers=1)])
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": dict.fromkeys(llama(layers=1), "model-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    other = write_folder(tmp_path / "g", [llama(layers=1)])
    assert daq.quantize_folder(folder, other, tmp_path / "out", ABSMAX, memory_gb=2, plan_only=True)
    (folder / "model.safetensors").write_bytes((folder / "model-1.safetensors").read_bytes())
    for pair in ((folder, other), (other, folder)):
        with pytest.raises(ValueError, match=r"holds model\.safetensors and, .* other shards"):
            daq.quantize_folder(*pair, tmp_path / "out", ABSMAX, memory_gb=2)


SHAPES = {f"model.layers.{i}.mlp.{w}_proj.weight": (128, 128) for i in range(2) for w in ("up", "down")}


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (
            {"keep": ["layers.0"]},
            {"model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"},
        ),
        ({"keep": [r"re:.*\.down_proj", "0.mlp.up"]}, {"model.layers.1.mlp.up_proj.weight"}),
        ({"only": ["down"], "keep": ["layers.1"]}, {"model.layers.0.mlp.down_proj.weight"}),
    ],
)
def test_patterns_say_what_is_kept_and_each_tensor_has_its_reason(options, left, tmp_path):
    found = plan_of(tmp_path, SHAPES | {"model.norm.weight": (128,)}, {}, **options)
    assert set(found["quantized"]) == left
    assert set(found["quantized"]) | set(found["kept"]) == {*SHAPES, "model.norm.weight"}
    reasons = {why.partition(":")[0] for name, why in found["kept"].items() if name in SHAPES}
    assert reasons <= {"by --keep", "not named by --only"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep": ["layer.0"], "only": ["layers", "x"]}, r"match no weight: --keep 'layer\.0'; --only 'x'"),
        ({"keep": ["re:layers"]}, "match no weight"),
        ({"keep": ["("]}, "is not a regular expression"),
        ({"only": "layers"}, "must be a sequence of patterns"),
        ({"keep": ["layers.0"], "format": "as-base"}, "--keep"),
    ],
)
def test_patterns_without_meaning_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        plan_of(tmp_path, SHAPES, {}, **options)


def test_the_command_takes_several_patterns(tmp_path, capsys):
    for word in ("b", "t"):
        write_folder(tmp_path / word, [{n: np.zeros(s, BF16) for n, s in SHAPES.items()}])
    words = [str(tmp_path / word) for word in ("b", "t", "out")]
    more = ["--keep", "0.mlp.up", "--keep", "1.mlp.up", "--only", "mlp"]
    assert cli.main(["quantize", *words, "--plan", "--json", "--memory", "2", *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["quantized"]) == [n for n in SHAPES if "down" in n]
    assert found["keep"] == ["0.mlp.up", "1.mlp.up"]


def test_inspect_looks_at_what_patterns_leave(tmp_path, capsys):
    base = llama(layers=1)
    folders = write_folder(tmp_path / "base", [base]), write_folder(tmp_path / "tuned", [tuned_from(base)])
    chosen = daq.inspect_folder(*folders, ABSMAX, only=["mlp"], keep=["re:.*down_proj"])
    assert chosen.leaves.keys() == {UP, UP.replace("up_proj", "gate_proj")}
    words = ["inspect", *map(str, folders), "--recipe", "absmax", "--only", "mlp", "--keep", "down_proj"]
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == chosen.to_dict()
    assert cli.main(["inspect", *map(str, folders), "--keep", "nothing"]) == 1
    assert "match no weight" in capsys.readouterr().err


LIST = "decoder.transformer.h."


@pytest.mark.parametrize(
    ("biases", "turned"),
    [
        ({"attn.c_attn": 384, "attn.c_proj": 128, "mlp.c_fc": 512}, True),
        ({"attn.c_attn": 128, "mlp.c_fc": 128}, False),
        ({"attn.c_attn": 384, "mlp.c_fc": 128}, False),  # of one list, which tell nothing
        ({"attn.c_proj": 128}, False),
        ({}, False),
    ],
)
def test_biases_tell_layers_that_are_stored_in_out_whatever_the_type(biases, turned, tmp_path):
    shapes = {"attn.c_attn": (128, 384), "attn.c_proj": (128, 128), "mlp.c_fc": (128, 512)}
    decoder = {f"{LIST}0.{name}.weight": shape for name, shape in shapes.items()}
    encoder = {f"encoder.layer.0.{x}.weight": (256, 128) for x in ("query", "key")}
    tensors = decoder | encoder | {f"{LIST}0.{name}.bias": (n,) for name, n in biases.items()}
    tensors |= {"encoder.layer.0.query.bias": (256,)}
    found = plan_of(tmp_path, tensors, {"model_type": "of_ones_own"})
    assert set(found["quantized"]) == set(encoder) | (set() if turned else set(decoder))
    told = {name for name, why in found["kept"].items() if "stored [in, out]" in why}
    assert told == (set(decoder) if turned else set())


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("width", [128, 256])
def test_shapes_tell_stacks_of_experts_that_are_stored_in_out_whatever_the_type(turned, width, tmp_path):
    up, down = (2, 256, width), (2, width, 128)
    experts = "model.layers.0.mlp.experts."
    shapes = {
        f"{experts}gate_up_proj": (2, up[2], up[1]) if turned else up,
        f"{experts}down_proj": (2, down[2], down[1]) if turned else down,
    }
    found = plan_of(tmp_path, shapes | {UP: (128, 128)}, {"model_type": "of_ones_own"}, format="fp8-block")
    assert set(found["quantized"]) == ({UP} if turned else {UP, *shapes})
    assert {n for n, why in found["kept"].items() if "experts stored" in why} == (
        set(shapes) if turned else set()
    )


@pytest.mark.parametrize("how", ["awq", ["awq"], 4])
def test_a_config_of_quantization_that_is_a_word_is_refused(how, tmp_path):
    with pytest.raises(daq.DaqError, match=r"quantized by .*(awq|4).*, which is not read"):
        plan_of(tmp_path, {UP: (128, 128)}, {"text_config": {"quantization_config": how}})


@pytest.mark.parametrize(
    "name",
    [
        "_orig_mod.model.layers.0.mlp.up_proj.weight",
        "model.layers.0._fsdp_wrapped_module.mlp.up_proj.weight",
        "module.model.layers.0.mlp.up_proj.weight",
        "base_model.model.model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.lora_A.default.weight",
    ],
)
def test_names_inside_a_wrapper_of_training_are_refused(name, tmp_path):
    base = write_folder(tmp_path / "base", [{UP: np.ones((128, 128), BF16)}])
    tuned = write_folder(tmp_path / "tuned", [{name: np.ones((128, 128), BF16)}])
    with pytest.raises(daq.DaqError, match="inside a wrapper of training"):
        daq.quantize_folder(base, tuned, tmp_path / "out", ABSMAX, format="fp8-channel")
    with pytest.raises(daq.DaqError, match="inside a wrapper of training"):
        daq.inspect_folder(base, tuned, ABSMAX)


def test_a_layer_called_module_inside_a_model_is_no_wrapper(tmp_path):
    shapes = {UP: (128, 128), "module.layers.0.up_proj.weight": (128, 128)}
    assert set(plan_of(tmp_path, shapes, {})["quantized"]) == set(shapes)


@pytest.mark.parametrize(
    ("dtype", "ends", "words"),
    [
        (BF16, ("_scale",), "is BF16 with a scale"),
        (BF16, ("_scale_inv",), "is BF16 with a scale"),
        (np.int8, ("_scale",), ""),
        (np.int8, ("_scale", "_zp"), "weight_zp', which no known coding has"),
        (np.int8, ("_scale", "_scale_2"), "weight_scale_2', which no known coding has"),
    ],
)
def test_what_stands_beside_a_weight_is_read_or_refused(dtype, ends, words, tmp_path):
    tensors = {f"{UP}{end}": np.ones((128, 1), np.float32) for end in ends}
    paths = [write_folder(tmp_path / x, [tensors | {UP: np.ones((128, 128), dtype)}]) for x in "bt"]
    out, how = tmp_path / "out", {"format": "fp8-channel", "plan_only": True, "memory_gb": 2}
    if not words:
        assert list(daq.quantize_folder(*paths, out, ABSMAX, **how)["quantized"]) == [UP]
        return
    with pytest.raises(daq.DaqError, match=words):
        daq.quantize_folder(*paths, out, ABSMAX, **how)


def test_groups_of_int4_are_whole_even_where_a_weight_has_fewer_inputs(tmp_path):
    shapes = {"model.layers.0.mixer.dt_proj.weight": (128, 48), UP: (128, 128)}
    kept = plan_of(tmp_path, shapes, {}, format="int4-group")["kept"]
    assert kept == {"model.layers.0.mixer.dt_proj.weight": "no whole number of groups of 128: 48 inputs"}


def test_llama_4_is_refused_where_transformers_would_look_for_single_experts(tmp_path):
    shapes = {"model.layers.0.feed_forward.experts.gate_up_proj": (2, 128, 256), UP: (128, 128)}
    config = {"model_type": "llama4_text"}
    with pytest.raises(daq.DaqError, match="use --format fp8-block"):
        plan_of(tmp_path / "channel", shapes, config)
    found = plan_of(tmp_path / "block", shapes, config, format="fp8-block")
    assert list(found["quantized"]) == [UP]


def test_the_plan_says_that_transformers_does_not_load_experts_in_int8(tmp_path):
    shapes = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (128, 128) for i in range(2)}
    shapes |= {f"model.layers.0.mlp.experts.{i}.gate_proj.weight": (128, 128) for i in range(2)}
    words = "transformers does not load experts"
    assert words in plan_of(tmp_path / "int8", shapes, {}, format="int8-channel")["server"]
    assert words not in plan_of(tmp_path / "fp8", shapes, {})["server"]
    assert words not in plan_of(tmp_path / "dense", {UP: (128, 128)}, {}, format="int8-channel")["server"]


@pytest.mark.parametrize(
    ("kind", "stack", "format", "told"),
    [
        ("hy_v4", True, "fp8-block", True),
        ("zaya", True, "fp8-channel", True),
        ("hy_v4", False, "fp8-block", False),
        ("olmo_hybrid", False, "int4-group", True),
        ("kimi_linear", False, "mxfp4", True),
        ("kimi_linear", False, "fp8-channel", False),
        ("kimi_linear", False, "fp8-block", False),
        ("llama", True, "fp8-block", False),
    ],
)
def test_the_plan_says_which_models_transformers_does_not_load(kind, stack, format, told, tmp_path):
    """As `python -m benchmarks architectures` finds with transformers 5.24."""
    shapes = {UP: (128, 128)} | ({"model.layers.1.mlp.experts.down_proj": (2, 128, 128)} if stack else {})
    found = plan_of(tmp_path, shapes, {"model_type": kind}, format=format)
    assert ("transformers does not load models of this type" in found["server"]) == told


@pytest.mark.parametrize("inside", [False, True])
def test_what_a_name_hides_is_known_for_the_model_type(tmp_path, inside):
    codebook = "quantizer.quantizers.0.codebook.weight"
    query = "funnel.encoder.blocks.0.1.attention.q_head.weight"
    shapes = {codebook: (128, 128), query: (128, 128), "model." + query: (128, 128), UP: (128, 128)}

    def quantized(model_type: str) -> set[str]:
        config = {"text_config": {"model_type": model_type}} if inside else {"model_type": model_type}
        found = plan_of(tmp_path / model_type, shapes, config)
        for name, why in found["kept"].items():
            assert why in ("embedding, norm, head or router", "embedding, by its class in transformers"), name
        return set(found["quantized"])

    assert quantized("dac") == {UP}
    assert quantized("funnel") == {UP, codebook, query, "model." + query}
    assert quantized("llama") == {UP, codebook}


def test_a_model_type_that_is_no_word_is_one_of_which_nothing_is_known(tmp_path):
    config = {"model_type": ["funnel"], "text_config": {"model_type": {}}}
    assert list(plan_of(tmp_path, {UP: (128, 128)}, config)["quantized"]) == [UP]
