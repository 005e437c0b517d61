"""Adapters on their bases: each weight is the base's plus scale * B A, held to NumPy in float64."""

import contextlib
import json

import numpy as np
import pytest

import daq_jax as daq
from daq_jax.io.hf.adapters import open_tuned
from daq_jax.io.hf.architectures import turns_experts, turns_linear_layers
from daq_jax.io.hf.folders import open_folder
from tests.adapters import (
    CONFIG,
    EXPERT_TARGETS,
    EXPERTS,
    PREFIX,
    expert_adapter,
    lora,
    merged,
    product,
    write_adapter,
)
from tests.hf_folders import BF16, E4M3, llama, normal, spread, to_fp8, write_folder
from tests.hf_folders import CONFIG as MODEL

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@contextlib.contextmanager
def opened(tmp_path, base, adapter, config=None, **lora_config):
    write_folder(tmp_path / "base", [base], config)
    write_adapter(tmp_path / "adapter", adapter, **lora_config)
    with (
        contextlib.closing(open_folder(tmp_path / "base")) as before,
        contextlib.closing(open_tuned(tmp_path / "adapter", before)) as after,
    ):
        yield after


def refusal(tmp_path, base, adapter, config=None, **lora_config) -> str:
    with (
        pytest.raises(daq.DaqError) as caught,
        opened(tmp_path, base, adapter, config, **lora_config),
    ):
        pass
    return str(caught.value)


def test_adapted_weights_are_sums_in_float32_and_all_others_the_bases_bytes(tmp_path):
    base, adapter = llama(), lora({Q: (128, 128), UP: (128, 128)})
    with opened(tmp_path, base, adapter) as tuned:
        assert tuned.tensors.keys() == base.keys()
        for name in (f"{Q}.weight", f"{UP}.weight"):
            found, expected = tuned.read(name), merged(base[name], product(adapter, name[:-7]), 1.5)
            np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(tuned.read(name, slice(40, 72)), expected[40:72])
            stored = np.concatenate(list(tuned.chunks(name))).view(BF16).reshape(128, 128)
            np.testing.assert_array_equal(stored, expected.astype(BF16))
        same = "model.layers.0.mlp.up_proj.weight"
        assert tuned.read(same).tobytes() == base[same].tobytes()
        assert b"".join(map(bytes, tuned.chunks(same))) == base[same].tobytes()


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, (4.0, 4.0)),
        ({"alpha_pattern": {"q_proj": 1}}, (0.25, 1.5)),
        ({"alpha_pattern": {r"layers\.[01]\.self_attn\.q_proj": 3, "q_proj": 1}}, (0.75, 1.5)),
        ({"alpha_pattern": {"1.mlp.up_proj": 2.5, "j": 9}}, (1.5, 0.625)),
    ],
)
def test_factors_by_root_and_by_pattern(config, scales, tmp_path):
    base, adapter = llama(), lora({Q: (128, 128), UP: (128, 128)})
    with opened(tmp_path, base, adapter, **config) as tuned:
        for name, scale in zip((Q, UP), scales, strict=True):
            expected = merged(base[f"{name}.weight"], product(adapter, name), scale)
            np.testing.assert_array_equal(tuned.read(f"{name}.weight"), expected)


def test_modules_may_have_ranks_of_their_own(tmp_path):
    base = llama()
    adapter = lora({Q: (128, 128)}, rank=4) | lora({UP: (128, 128)}, rank=2)
    with opened(tmp_path, base, adapter, rank_pattern={"up_proj": 2}) as tuned:
        expected = merged(base[f"{UP}.weight"], product(adapter, UP), 3.0)
        np.testing.assert_array_equal(tuned.read(f"{UP}.weight"), expected)
    assert "rank 2 but the config says 4" in refusal(tmp_path / "x", base, adapter)


def test_an_fp8_base_is_dequantized_to_float32_and_the_sum_is_not_rounded(tmp_path):
    name = f"{Q}.weight"
    codes, scale = to_fp8(0.02 * normal(0, 256, 384))
    base = {name: codes, f"{name}_scale_inv": scale}
    adapter = lora({Q: (256, 384)})
    config = MODEL | {"quantization_config": {"quant_method": "fp8"}}
    weights = codes.astype(np.float32) * spread(scale, codes.shape)
    with opened(tmp_path, base, adapter, config) as tuned:
        expected = merged(weights, product(adapter, Q), 1.5)
        np.testing.assert_array_equal(tuned.read(name), expected)
        np.testing.assert_array_equal(tuned.read(name, slice(128, 256)), expected[128:])
        assert codes.dtype == E4M3


def test_embeddings_heads_biases_and_whole_modules(tmp_path):
    base = llama() | {f"{Q}.bias": normal(3, 128).astype(BF16), f"{UP}.bias": normal(4, 128).astype(BF16)}
    table, norm = "model.embed_tokens", "model.norm.weight"
    a, b = normal(5, 4, 300), 1e-3 * normal(6, 128, 4)
    adapter = lora({Q: (128, 128)}) | {
        f"{PREFIX}{table}.lora_embedding_A": a,
        f"{PREFIX}{table}.lora_embedding_B": b.astype(np.float32),
        f"{PREFIX}{Q}.lora_B.bias": normal(8, 128),
        f"{PREFIX}{UP}.base_layer.bias": normal(9, 128),
        f"{PREFIX}lm_head.weight": normal(10, 300, 128),
        f"{PREFIX}{norm}": normal(11, 128),
    }
    config = {"bias": "all", "lora_bias": True, "modules_to_save": ["lm_head", "norm"]}
    with opened(tmp_path, base, adapter, **config) as tuned:
        wide = b.astype(np.float32).astype(np.float64) @ a.astype(np.float64)
        np.testing.assert_array_equal(
            tuned.read(f"{table}.weight"), merged(base[f"{table}.weight"], wide.T, 1.5)
        )
        expected = merged(base[f"{Q}.bias"], adapter[f"{PREFIX}{Q}.lora_B.bias"].astype(np.float64), 1.5)
        np.testing.assert_array_equal(tuned.read(f"{Q}.bias"), expected)
        for name, stored in {
            f"{UP}.bias": f"{UP}.base_layer.bias", "lm_head.weight": "lm_head.weight", norm: norm,
        }.items():  # fmt: skip
            np.testing.assert_array_equal(tuned.read(name), adapter[PREFIX + stored])
            stored_bytes = np.concatenate(list(tuned.chunks(name)))
            assert stored_bytes.tobytes() == adapter[PREFIX + stored].astype(BF16).tobytes()


@pytest.mark.parametrize("older", [False, True])
def test_stacks_of_experts(older, tmp_path):
    adapter, changes = expert_adapter(older=older)
    shapes = {"gate_up_proj": (3, 128, 96), "down_proj": (3, 96, 64)}
    base = {f"{EXPERTS}.{n}": (0.02 * normal(1, *s)).astype(BF16) for n, s in shapes.items()}
    with opened(tmp_path, base, adapter, **EXPERT_TARGETS) as tuned:
        for name, change in changes.items():
            expected = merged(base[f"{EXPERTS}.{name}"], change, 1.5)
            np.testing.assert_array_equal(tuned.read(f"{EXPERTS}.{name}"), expected)
            np.testing.assert_array_equal(tuned.read(f"{EXPERTS}.{name}", slice(1, 3)), expected[1:])


def test_stacks_of_experts_that_are_stored_in_out(tmp_path):
    """gpt-oss: inputs before outputs in the file, and down_proj is square."""
    adapter, changes = expert_adapter(hidden=96, inner=96)
    shapes = {"gate_up_proj": (3, 96, 192), "down_proj": (3, 96, 96)}
    base = {f"{EXPERTS}.{n}": (0.02 * normal(1, *s)).astype(BF16) for n, s in shapes.items()}
    with opened(tmp_path, base, adapter, MODEL | {"model_type": "gpt_oss"}, **EXPERT_TARGETS) as tuned:
        for name, change in changes.items():
            expected = merged(np.swapaxes(base[f"{EXPERTS}.{name}"], 1, 2), change, 1.5)
            np.testing.assert_array_equal(tuned.read(f"{EXPERTS}.{name}"), expected)
            stored = np.concatenate(list(tuned.chunks(f"{EXPERTS}.{name}"))).view(BF16)
            assert stored.tobytes() == np.swapaxes(expected, 1, 2).astype(BF16).tobytes()


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_a_stack_of_experts_on_a_base_that_holds_them_one_by_one(names, tmp_path):
    adapter, changes = expert_adapter()
    gate, up, down = names
    shapes = {gate: (64, 96), up: (64, 96), down: (96, 64)}
    base = {
        f"{EXPERTS}.{e}.{n}.weight": (0.02 * normal(e, *s)).astype(BF16)
        for e in range(3)
        for n, s in shapes.items()
    }
    with opened(tmp_path, base, adapter, **EXPERT_TARGETS) as tuned:
        for e in range(3):
            halves = {gate: changes["gate_up_proj"][e, :64], up: changes["gate_up_proj"][e, 64:]}
            for name, change in (halves | {down: changes["down_proj"][e]}).items():
                tensor = f"{EXPERTS}.{e}.{name}.weight"
                expected = merged(base[tensor], change, 1.5)
                np.testing.assert_array_equal(tuned.read(tensor), expected)
                np.testing.assert_array_equal(tuned.read(tensor, slice(16, 48)), expected[16:48])


def test_layers_that_are_stored_in_out(tmp_path):
    name = "transformer.h.0.attn.c_attn"
    base, adapter = {f"{name}.weight": normal(0, 96, 288)}, lora({name: (288, 96)})
    with opened(tmp_path, base, adapter, {"model_type": "gpt2"}, fan_in_fan_out=True) as tuned:
        expected = merged(base[f"{name}.weight"], product(adapter, name).T, 1.5)
        np.testing.assert_array_equal(tuned.read(f"{name}.weight"), expected)


def test_the_names_of_a_model_in_memory_may_begin_otherwise(tmp_path):
    base = {f"language_model.{n}": x for n, x in llama().items()}
    adapter = lora({Q.replace("model.", "model.language_model.", 1): (128, 128)})
    with opened(tmp_path, base, adapter) as tuned:
        assert tuned.read(f"language_model.{Q}.weight").dtype == np.float32


WRONG = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "kind": ({"peft_type": "ADALORA"}, "ADALORA"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
    "layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "unknown": ({"use_some_new_thing": 3}, "use_some_new_thing = 3"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "rank": ({"r": "8"}, "r must be a whole number"),
    "no rank": ({"r": None}, "r must be a whole number"),
    "alpha": ({"lora_alpha": float("nan")}, "lora_alpha must be"),
    "patterns": ({"alpha_pattern": [1]}, "alpha_pattern must map"),
    "no pattern": ({"alpha_pattern": {"(": 1}}, "no regular expression"),
    "long pattern": ({"rank_pattern": {"(a+)+$": 4}}, "could take too long"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_kinds_of_adapters_are_refused_by_name(kind, tmp_path):
    config, words = WRONG[kind]
    assert words in refusal(tmp_path, llama(), lora({Q: (128, 128)}), **config)


def bad_tensors() -> dict[str, tuple[dict, str]]:
    fine = lora({Q: (128, 128)})
    a, b = (f"{PREFIX}{Q}.lora_{x}.weight" for x in "AB")
    return {
        "no such module": (lora({"model.layers.9.self_attn.q_proj": (128, 128)}), "matches no tensor"),
        "other shape": (lora({Q: (128, 64)}), "fits none of"),
        "no B": ({a: fine[a]}, "has no lora_B"),
        "magnitude": (fine | {f"{PREFIX}{Q}.lora_magnitude_vector": fine[a][0]}, "kind that is not read"),
        "whole tensor": (fine | {f"{PREFIX}{UP}.weight": normal(0, 128, 128)}, "nor in modules_to_save"),
        "no such tensor": (
            fine | {f"{PREFIX}model.lm_head.weight": normal(0, 300, 128)},
            "matches no tensor",
        ),
        "longer table": (
            fine | {f"{PREFIX}lm_head.weight": normal(0, 301, 128)},
            "of the base is (300, 128)",
        ),
        "integers": (fine | {a: fine[a].astype(np.int32)}, "is I32"),
        "three axes": (fine | {b: fine[b][None]}, "fits none of"),
        "empty": (fine | {a: fine[a][:0], b: fine[b][:, :0]}, "fits none of"),
        "nothing": ({}, "changes nothing"),
    }


@pytest.mark.parametrize("kind", bad_tensors())
def test_tensors_that_fit_nothing_are_refused_by_name(kind, tmp_path):
    tensors, words = bad_tensors()[kind]
    assert words in refusal(tmp_path, llama(), tensors)


def test_tied_tables_must_change_together(tmp_path):
    table = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": normal(5, 4, 300),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": normal(6, 128, 4),
    }
    base = {n: x for n, x in llama().items() if n != "lm_head.weight"}
    tied = MODEL | {"tie_word_embeddings": True}
    assert "ties embedding and head" in refusal(tmp_path, base, table, tied)
    with opened(tmp_path / "x", base, table, tied, ensure_weight_tying=True) as tuned:
        assert tuned.read("model.embed_tokens.weight").dtype == np.float32


def test_the_base_of_an_embedding_may_lie_beside_its_factors(tmp_path):
    """As peft saves it where embeddings are targets."""
    base, table = llama(), "model.embed_tokens"
    a, b = normal(5, 4, 300), normal(6, 128, 4)
    adapter = {
        f"{PREFIX}{table}.lora_embedding_A": a,
        f"{PREFIX}{table}.lora_embedding_B": b,
        f"{PREFIX}{table}.base_layer.weight": base[f"{table}.weight"],
    }
    with opened(tmp_path, base, adapter) as tuned:
        expected = merged(base[f"{table}.weight"], (b.astype(np.float64) @ a.astype(np.float64)).T, 1.5)
        np.testing.assert_array_equal(tuned.read(f"{table}.weight"), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_named_when_they_are_met(value, tmp_path):
    adapter = lora({Q: (128, 128)})
    adapter[f"{PREFIX}{Q}.lora_A.weight"][0, 0] = value
    with opened(tmp_path, llama(), adapter) as tuned, pytest.raises(daq.DaqError, match="NaN or infinity"):
        tuned.read(f"{Q}.weight")


def test_pickles_and_missing_files_are_refused(tmp_path):
    write_folder(tmp_path / "base", [llama()])
    with contextlib.closing(open_folder(tmp_path / "base")) as base:
        path = tmp_path / "adapter"
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(CONFIG))
        with pytest.raises(daq.DaqError, match=r"has adapter_config\.json but no"):
            open_tuned(path, base)
        (path / "adapter_model.bin").write_bytes(b"pickle")
        with pytest.raises(daq.DaqError, match="never read"):
            open_tuned(path, base)
        (path / "adapter_model.safetensors").write_bytes(b"\x08" + bytes(30))
        with pytest.raises(daq.DaqError, match="adapter_model"):
            open_tuned(path, base)
        (path / "adapter_config.json").unlink()
        with pytest.raises(daq.DaqError, match="adapter_config"):
            open_tuned(path, base)


def test_the_config_of_an_adapter_beside_a_whole_model_is_left_over(tmp_path):
    write_folder(tmp_path / "base", [llama()])
    (tmp_path / "base" / "adapter_config.json").write_text(json.dumps(CONFIG))
    with contextlib.closing(open_folder(tmp_path / "base")) as base:
        with contextlib.closing(open_tuned(tmp_path / "base", base)) as tuned:
            assert tuned.tensors.keys() == base.tensors.keys()
        (tmp_path / "base" / "adapter_model.safetensors").write_bytes(b"\x08" + bytes(30))
        with pytest.raises(daq.DaqError, match="both a whole model and an adapter"):
            open_tuned(tmp_path / "base", base)


@pytest.mark.parametrize("kind", [[], {}, 1, None, ["gpt2"], {"gpt2": 1}])
def test_a_type_of_model_that_is_no_text_is_no_type_that_we_know(kind):
    assert not turns_linear_layers({"model_type": kind})
    assert not turns_experts({"model_type": kind, "text_config": kind})
    assert turns_experts({"model_type": kind, "text_config": {"model_type": "gpt_oss"}})
