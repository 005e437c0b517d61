"""Folders quantized: the same bits as in memory, what servers need to be told, and what is refused."""

import dataclasses
import io
import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console

import daq_jax as daq
from daq_jax import cli
from daq_jax.io.hf.folders import open_folder
from daq_jax.io.hf.layouts import LAYOUTS
from daq_jax.scales import InDtype, PowerOfTwo
from tests.hf_folders import BF16, CONFIG, in_shards, llama, normal, spread, to_fp8, tuned_from, write_folder

ABSMAX = daq.recipes.absmax
SMALL = daq.Recipe(search=daq.Grid(0.9, 1.3, 4))
ONE_LEVEL = [name for name in LAYOUTS if "nvfp4" not in name and name not in ("gpt-oss", "deepseek-v4")]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = llama()
    tuned = write_folder(folder / "tuned", in_shards(tuned_from(base), 3))
    return write_folder(folder / "base", [base]), tuned


def read_all(path: pathlib.Path) -> dict:
    folder = open_folder(path)
    found = {name: folder.read(name) for name in folder.tensors}
    folder.close()
    return found


def stored_bytes(path: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def config_of(path: pathlib.Path) -> dict:
    return json.loads((path / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize(
    ("layout", "recipe"),
    [(layout, ABSMAX) for layout in ONE_LEVEL]
    + [pytest.param(layout, SMALL, marks=pytest.mark.slow) for layout in ONE_LEVEL],
)
def test_folders_get_the_codes_and_scales_that_arrays_get(layout, recipe, pair, tmp_path):
    how = LAYOUTS[layout]
    report = daq.quantize_folder(*pair, tmp_path / "out", recipe, format=layout, memory_gb=2)
    recipe = dataclasses.replace(recipe, format=how.format, tiling=how.tiling)
    if how.narrow_scales:
        recipe = dataclasses.replace(recipe, scales=InDtype("bfloat16"))
    if layout in ("mxfp4", "mxfp8", "fp8-block-ue8m0"):
        recipe = dataclasses.replace(recipe, scales=PowerOfTwo())
    base, tuned, found = read_all(pair[0]), read_all(pair[1]), read_all(tmp_path / "out")
    rules = [daq.use("_proj", matrix=((1,), (0,))), daq.keep("")]
    wanted = daq.quantize(base, tuned, recipe, rules=rules)
    assert found.keys() == wanted.keys()
    assert sum(isinstance(x, daq.QTensor) for x in found.values()) == 14
    for name, x in wanted.items():
        pairs = [(found[name], x)]
        if isinstance(x, daq.QTensor):
            pairs = [(found[name].codes, x.codes), (found[name].scale, x.scale)]
        for a, b in pairs:
            np.testing.assert_array_equal(a, b, err_msg=name)
    total = daq.compare(base, tuned, wanted).total.to_dict()
    assert report["total"].pop("counts") == total.pop("counts")
    assert report["total"] == pytest.approx(total, rel=1e-6)
    assert report["leaves"].keys() == {n for n, x in wanted.items() if isinstance(x, daq.QTensor)}
    written = json.loads((tmp_path / "out" / "daq_report.json").read_text())
    assert written["leaves"] == report["leaves"]


def test_index_and_skip_lists_name_everything_in_full(pair, tmp_path):
    daq.quantize_folder(*pair, tmp_path / "out", ABSMAX, memory_gb=2)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    headers = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert header.pop("__metadata__") == {"format": "pt"}
        headers |= {n: (path.name, h["data_offsets"][1] - h["data_offsets"][0]) for n, h in header.items()}
    assert index["weight_map"] == {name: file for name, (file, _) in headers.items()}
    assert index["metadata"]["total_size"] == sum(size for _, size in headers.values())
    config = config_of(tmp_path / "out")
    assert config["modules_to_not_convert"] == config["ignored_layers"] == ["lm_head", "model.embed_tokens"]
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])
    assert not (tmp_path / "out" / ".daq").exists()


@pytest.mark.parametrize("stored", [np.float32, pytest.param(np.float16, marks=pytest.mark.slow)], ids=str)
def test_base_and_tuned_may_have_other_dtypes_than_one_another(stored, tmp_path):
    base = {"a_proj.weight": (0.02 * normal(0, 128, 256)).astype(stored)}
    tuned = {"a_proj.weight": (base["a_proj.weight"] + 1e-3 * normal(1, 128, 256)).astype(BF16)}
    folders = write_folder(tmp_path / "b", [base]), write_folder(tmp_path / "t", [tuned])
    report = daq.quantize_folder(*folders, tmp_path / "out", ABSMAX, memory_gb=2)
    d = tuned["a_proj.weight"].astype(np.float64) - base["a_proj.weight"]
    found = read_all(tmp_path / "out")["a_proj.weight"].dequantize(np.float32)
    q = np.asarray(found).astype(np.float64) - base["a_proj.weight"]
    assert report["total"]["projection"] == pytest.approx((d * q).sum() / (d * d).sum(), rel=1e-4)


def fp8_folder(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    coded = {}
    for name, x in tensors.items():
        coded[name], coded[f"{name}_scale_inv"] = to_fp8(x)
    config = CONFIG | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    return write_folder(path, [coded], config)


def test_an_fp8_base_is_dequantized_and_its_scale_is_offered_to_the_search(tmp_path):
    base = {"a_proj.weight": 0.02 * normal(0, 128, 256)}
    before = fp8_folder(tmp_path / "b", base)
    codes, scale = to_fp8(base["a_proj.weight"])
    weights = codes.astype(np.float32) * spread(scale, codes.shape)
    weights[0, 0] *= 1.4  # so that AbsMax would leave the grid of the base
    tuned = {"a_proj.weight": weights}
    after = write_folder(tmp_path / "t", [tuned], {"torch_dtype": "float32"})
    recipe = daq.Recipe(metric=daq.neg_mse, search=daq.Grid(1.0, 1.01, 2))
    daq.quantize_folder(before, after, tmp_path / "out", recipe, memory_gb=2)
    np.testing.assert_array_equal(read_all(tmp_path / "out")["a_proj.weight"].scale.T[:, 1:], scale[:, 1:])


@pytest.mark.slow
def test_an_fp8_tuned_model_is_dequantized_where_it_is_kept(tmp_path):
    tuned = {"a_proj.weight": normal(0, 128, 256), "lm_head.weight": normal(1, 130, 256)}
    after = fp8_folder(tmp_path / "t", tuned)
    before = write_folder(tmp_path / "b", [{"a_proj.weight": tuned["a_proj.weight"].astype(BF16)}])
    daq.quantize_folder(before, after, tmp_path / "out", ABSMAX, memory_gb=2, base_dtype="float32")
    codes, scale = to_fp8(tuned["lm_head.weight"])
    found = read_all(tmp_path / "out")
    expected = codes.astype(np.float32) * spread(scale, codes.shape)
    np.testing.assert_array_equal(found["lm_head.weight"], expected)
    assert config_of(tmp_path / "out")["ignored_layers"] == ["lm_head"]
    # A grid that holds a weight exactly gives it back, and the largest code of each block is the largest.
    np.testing.assert_array_equal(found["a_proj.weight"].codes, to_fp8(tuned["a_proj.weight"])[0])


def plan_of(tmp_path, tensors, config=None, **options) -> dict:
    for word in ("b", "t"):
        write_folder(tmp_path / word, [tensors], config)
    folders = tmp_path / "b", tmp_path / "t", tmp_path / "out"
    return daq.quantize_folder(*folders, ABSMAX, memory_gb=2, plan_only=True, **options)


def zeros(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name.replace("__", "."): np.zeros(shape, BF16) for name, shape in shapes.items()}


def test_siblings_that_servers_fuse_are_quantized_together_or_not_at_all(tmp_path):
    shape, odd = (128, 128), (100, 128)
    tensors = {f"l.{i}.self_attn.{w}_proj.weight": np.zeros(shape, BF16) for i in (0, 1) for w in "qkvo"}
    tensors["l.1.self_attn.v_proj.weight"] = np.zeros(odd, BF16)
    tensors |= {
        f"l.0.mlp.experts.{e}.{w}_proj.weight": np.zeros(shape, BF16) for e in (0, 1) for w in ("up", "down")
    }
    tensors["l.0.mlp.experts.1.down_proj.weight"] = np.zeros((128, 100), BF16)
    found = plan_of(tmp_path, tensors)
    assert set(found["quantized"]) == {
        *(f"l.0.self_attn.{w}_proj.weight" for w in "qkvo"),
        "l.1.self_attn.o_proj.weight",
    }
    assert "not a multiple of 128 x 128: 100 x 128" in found["kept"]["l.1.self_attn.v_proj.weight"]
    assert (
        "a weight that is kept: l.1.self_attn.v_proj.weight" in found["kept"]["l.1.self_attn.q_proj.weight"]
    )
    assert len([name for name in found["kept"] if "experts" in name]) == 4


def test_channels_need_no_multiples_of_128(tmp_path):
    assert plan_of(tmp_path, zeros(a_proj__weight=(100, 60)), format="fp8-channel")["quantized"]


def test_packed_int4_needs_whole_groups_of_inputs_and_has_no_form_for_fused_experts(tmp_path):
    tensors = zeros(
        l__up_proj__weight=(100, 256),
        l__o_proj__weight=(100, 256),
        l__down_proj__weight=(128, 320),
        l__q_proj__weight=(128, 320),
        l__k_proj__weight=(128, 256),
        l__mlp__experts__down_proj=(2, 128, 128),
    )
    one = plan_of(tmp_path / "1", tensors, format="int4-group")
    assert set(one["quantized"]) == {"l.up_proj.weight", "l.o_proj.weight"}
    assert one["kept"] == {
        "l.down_proj.weight": "no whole number of groups of 128: 320 inputs",
        "l.q_proj.weight": "no whole number of groups of 128: 320 inputs",
        "l.k_proj.weight": "servers fuse it with a weight that is kept: l.q_proj.weight",
        "l.mlp.experts.down_proj": "fused experts, which int4-group has no form for",
    }
    four = plan_of(tmp_path / "4", tensors, format="int4-group", tp=4)
    assert set(four["quantized"]) == {"l.up_proj.weight"}
    assert "on each device: 256 inputs over 4 devices" in four["kept"]["l.o_proj.weight"]


def test_packed_int4_scales_are_numbers_of_the_dtype_that_servers_hold_them_in(pair, tmp_path):
    daq.quantize_folder(*pair, tmp_path / "out", ABSMAX, format="int4-group", memory_gb=2)
    config = config_of(tmp_path / "out")
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head", "model.embed_tokens"]
    for x in read_all(tmp_path / "out").values():
        if isinstance(x, daq.QTensor):
            scale = np.asarray(x.scale)
            np.testing.assert_array_equal(scale, scale.astype(BF16).astype(np.float32))


@pytest.mark.parametrize("recipe", sorted(daq.recipes.DENSITY_RECIPES))
def test_zeros_that_are_real_numbers_are_refused_before_any_folder_is_read(recipe, tmp_path, capsys):
    missing = [str(tmp_path / word) for word in ("no base", "no tuned", "out")]
    assert cli.main(["quantize", *missing, "--format", "int4-group", "--recipe", recipe]) == 1
    err = capsys.readouterr().err
    assert "gives each group a zero that is a real number, and the files of servers hold whole" in err
    assert err.count("\n") == 1
    symmetric = daq.DensityRecipe(format=daq.int4, centre=None, shift=False)
    with pytest.raises(ValueError, match="fitted to the inputs of layers, which folders do not have"):
        daq.quantize_folder(*missing, symmetric, format="int4-group")
    assert list(tmp_path.iterdir()) == []


def test_routers_norms_embeddings_and_heads_are_kept(tmp_path):
    names = (
        "m.embed_tokens",
        "m.l.0.mlp.gate",
        "lm_head",
        "score",
        "m.l.0.input_layernorm",
        "m.l.0.mlp.up_proj",
    )
    tensors = {f"{name}.weight": np.zeros((128, 128), BF16) for name in names} | {
        "m.conv.weight": np.zeros((4, 4, 4))
    }
    assert list(plan_of(tmp_path, tensors)["quantized"]) == ["m.l.0.mlp.up_proj.weight"]


def test_weights_that_cannot_be_divided_among_devices_are_kept(tmp_path):
    tensors = zeros(
        l__o_proj__weight=(128, 256),
        l__down_proj__weight=(128, 384),
        l__up_proj__weight=(256, 128),
        l__k_proj__weight=(256, 128),
    )
    whole = plan_of(tmp_path / "1", tensors)
    assert len(whole["quantized"]) == 4
    two = plan_of(tmp_path / "2", tensors, tp=2)
    assert two["kept"] == {
        "l.down_proj.weight": "not a multiple of 128 on each device: 384 inputs over 2 devices"
    }
    four = plan_of(tmp_path / "4", tensors, tp=4)  # two heads of keys: each is on two devices
    assert list(four["quantized"]) == ["l.k_proj.weight"]


def test_a_tied_head_is_stored_once_and_named_in_the_skip_list(tmp_path):
    tensors = zeros(
        model__embed_tokens__weight=(256, 128), lm_head__weight=(256, 128), a_proj__weight=(128, 128)
    )
    for word in ("b", "t"):
        write_folder(tmp_path / word, [tensors], CONFIG | {"tie_word_embeddings": True})
    found = daq.quantize_folder(tmp_path / "b", tmp_path / "t", tmp_path / "out", ABSMAX, memory_gb=2)
    assert "lm_head.weight" in found["left_out"]
    assert "lm_head.weight" not in read_all(tmp_path / "out")
    assert config_of(tmp_path / "out")["ignored_layers"] == ["lm_head", "model.embed_tokens"]


def test_fused_experts_are_quantized_matrix_by_matrix(tmp_path):
    base = {
        f"l.0.mlp.experts.{w}": 0.02 * normal(i, 3, 256, 128)
        for i, w in enumerate(("gate_up_proj", "down_proj"))
    }
    base = {name: x.astype(BF16) for name, x in base.items()}
    tuned = tuned_from(base)
    folders = write_folder(tmp_path / "b", [base]), write_folder(tmp_path / "t", [tuned])
    daq.quantize_folder(*folders, tmp_path / "out", ABSMAX, memory_gb=2)
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["l.0.mlp.experts.gate_up_proj_scale_inv"]["shape"] == [3, 2, 1]
    found = read_all(tmp_path / "out")
    wanted = daq.quantize(base, tuned, ABSMAX, rules=[daq.use("", matrix=((-1,), (-2,)))])
    for name, q in wanted.items():
        np.testing.assert_array_equal(found[name].codes, q.codes)
        np.testing.assert_array_equal(found[name].scale, q.scale)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fp8-block", "int4-group"])
def test_a_matrix_too_large_for_the_memory_is_quantized_in_bands_or_refused(layout, tmp_path):
    base = {"a_proj.weight": (0.02 * normal(0, 1024, 2048)).astype(BF16)}
    folders = write_folder(tmp_path / "b", [base]), write_folder(tmp_path / "t", [tuned_from(base)])
    whole = daq.quantize_folder(*folders, tmp_path / "whole", SMALL, format=layout, memory_gb=2)
    little = whole["memory_bytes"] / 1e9  # for one matrix, but not for the next that would be read meanwhile
    report = daq.quantize_folder(*folders, tmp_path / "bands", SMALL, format=layout, memory_gb=little)
    assert report["rows"]["a_proj.weight"] < 1024
    files = [tmp_path / word / "model.safetensors" for word in ("whole", "bands")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(
        ValueError, match=r"'a_proj\.weight' is 1024 x 2048, which takes .* raise it \(--memory"
    ):
        daq.quantize_folder(
            *folders, tmp_path / "no", daq.Recipe(rounding=daq.UnbiasedSubspace(rank=4)), memory_gb=little
        )


@pytest.mark.slow
def test_bands_cut_no_tile_of_a_base_that_is_stored_in_blocks(tmp_path):
    weight = (0.02 * normal(0, 1024, 2048)).astype(BF16)
    tuned = write_folder(tmp_path / "t", [tuned_from({"a_proj.weight": weight})])
    plain = write_folder(tmp_path / "plain", [{"a_proj.weight": weight}])
    base = tmp_path / "b"
    daq.quantize_folder(plain, plain, base, ABSMAX, format="fp8-block", memory_gb=2)
    how = {"format": "int8-channel"}
    whole = daq.quantize_folder(base, tuned, tmp_path / "whole", SMALL, memory_gb=2, **how)
    little = whole["memory_bytes"] / 1e9
    report = daq.quantize_folder(base, tuned, tmp_path / "bands", SMALL, memory_gb=little, **how)
    assert report["rows"]["a_proj.weight"] < 1024
    assert report["rows"]["a_proj.weight"] % 128 == 0
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "bands")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_weights_without_a_base_are_all_named_or_take_absmax(tmp_path):
    tuned = {f"{w}_proj.weight": (0.02 * normal(i, 128, 128)).astype(BF16) for i, w in enumerate("abc")}
    base = {"a_proj.weight": tuned["a_proj.weight"], "b_proj.weight": np.zeros((128, 64), BF16)}
    folders = write_folder(tmp_path / "b", [base]), write_folder(tmp_path / "t", [tuned])
    with pytest.raises(
        ValueError, match=r"2 weights.*'b_proj\.weight' is \(128, 64\).*'c_proj\.weight' is missing"
    ):
        daq.quantize_folder(*folders, tmp_path / "out", SMALL, memory_gb=2)
    assert not (tmp_path / "out").exists()
    report = daq.quantize_folder(*folders, tmp_path / "out", SMALL, memory_gb=2, missing_base="absmax")
    codes, scale = to_fp8(tuned["c_proj.weight"])
    found = read_all(tmp_path / "out")["c_proj.weight"]
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.scale, scale)
    assert list(report["leaves"]) == ["a_proj.weight"]


@pytest.mark.parametrize("where", ["b", "t"])
def test_nan_is_refused_by_name(where, tmp_path):
    tensors = {"a_proj.weight": np.ones((128, 128), BF16)}
    for word in ("b", "t"):
        mine = {"a_proj.weight": tensors["a_proj.weight"].copy()}
        mine["a_proj.weight"][3, 4] = np.nan if word == where else 1
        write_folder(tmp_path / word, [mine])
    with pytest.raises(ValueError, match=r"tensor 'a_proj\.weight' holds NaN or infinity"):
        daq.quantize_folder(tmp_path / "b", tmp_path / "t", tmp_path / "out", SMALL, memory_gb=2)


@pytest.mark.slow
def test_targets_pick_formats_and_scales_and_say_what_servers_do(pair, tmp_path):
    words = {}
    for target in ("hopper", "blackwell", "tpu"):
        console = Console(file=io.StringIO(), width=300)
        plan = daq.quantize_folder(*pair, tmp_path, ABSMAX, target=target, plan_only=True, console=console)
        words[target] = plan["format"], console.file.getvalue()
    assert [layout for layout, _ in words.values()] == ["fp8-block", "fp8-channel", "fp8-channel"]
    assert "tpu-inference" in words["tpu"][1]
    out = tmp_path / "out"
    daq.quantize_folder(*pair, out, SMALL, target="blackwell", format="fp8-block", memory_gb=2)
    for x in read_all(out).values():
        if isinstance(x, daq.QTensor):
            assert (np.frexp(np.asarray(x.scale))[0] == 0.5).all()


def test_side_files_come_along_and_code_only_if_asked(pair, tmp_path):
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "modeling_own.py",
        "old.bin",
        "1_Pooling/config.json",
    ):
        (pair[1] / name).parent.mkdir(exist_ok=True)
        (pair[1] / name).write_text("{}")
    daq.quantize_folder(*pair, tmp_path / "out", ABSMAX, memory_gb=2)
    daq.quantize_folder(*pair, tmp_path / "code", ABSMAX, memory_gb=2, custom_code=True)
    found = {w: set(stored_bytes(tmp_path / w)) for w in ("out", "code")}
    assert {"tokenizer.json", "chat_template.jinja", "1_Pooling/config.json"} <= found["out"]
    assert found["code"] - found["out"] == {"modeling_own.py"}
    assert "old.bin" not in found["out"]


def test_weights_of_modules_of_a_sentence_transformer_come_along_and_others_are_named(pair, tmp_path):
    for name in ("2_Dense", "vae"):
        write_folder(pair[1] / name, [{"linear.weight": np.ones((4, 4), np.float32)}], {})
    modules = [{"idx": 0, "path": ""}, {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.Dense"}]
    (pair[1] / "modules.json").write_text(json.dumps(modules))
    report = daq.quantize_folder(*pair, tmp_path / "out", ABSMAX, memory_gb=2)
    file = "2_Dense/model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (pair[1] / file).read_bytes()
    assert "in a folder inside" in report["left_out"]["vae/model.safetensors"]


@pytest.mark.parametrize(
    ("files", "listed", "words"),
    [
        (
            ["model-1.safetensors", "model-2.safetensors"],
            None,
            "holds model-1.safetensors and 1 more, but no",
        ),
        (["consolidated.safetensors"], None, "rename it model.safetensors"),
        (["model-1.safetensors", "model-2.safetensors"], 0, ""),
        (["model-1.safetensors", "model-2.safetensors"], 1, "does not list 'b.x_proj.weight', nor 0 others"),
    ],
)
def test_shards_are_read_whole_by_their_index_or_refused_with_a_way_out(files, listed, words, tmp_path):
    names = {files[0]: ["a.x_proj.weight", "b.x_proj.weight"], files[-1]: ["c.x_proj.weight"]}
    paths = [tmp_path / "b", tmp_path / "t"]
    for path in paths:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(CONFIG))
        for file in files:
            tensors = {n: np.ones((128, 128), BF16) for n in names[file]}
            safetensors.numpy.save_file(tensors, path / file)
        index = {n: file for file in files for n in names[file] if not (listed and n.startswith("b"))}
        if listed is not None:
            (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    if words:
        with pytest.raises(daq.DaqError, match=words):
            daq.quantize_folder(*paths, tmp_path / "out", ABSMAX, memory_gb=2)
    else:
        assert len(daq.quantize_folder(*paths, tmp_path / "out", ABSMAX, memory_gb=2)["quantized"]) == 3


def test_a_plan_writes_nothing_and_shows_what_will_be(pair, tmp_path, capsys):
    words = ["quantize", *map(str, pair), str(tmp_path / "out"), "--plan", "--memory", "2"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "quantize to fp8-block" in out
    assert "model.embed_tokens.weight" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--shard", "3/2"], "`shard` must be"),
        (["--shard", "x"], "`--shard` must be I/N"),
        (["--memory", "0.1"], "the memory given is 0.1 GB"),
        (["--memory", "-1"], "`memory_gb` must be above 0"),
        (["--tp", "0"], "`tp` must be"),
    ],
)
def test_the_command_fails_with_one_line_and_status_1(words, expected, pair, tmp_path, capsys):
    assert cli.main(["quantize", *map(str, pair), str(tmp_path / "out"), *words]) == 1
    err = capsys.readouterr().err
    assert expected in err
    assert err.count("\n") == 1


def test_the_command_prints_one_json_object(pair, tmp_path, capsys):
    words = [
        "quantize",
        *map(str, pair),
        str(tmp_path / "out"),
        "--recipe",
        "absmax",
        "--json",
        "--memory",
        "2",
    ]
    assert cli.main(words) == 0
    assert json.loads(capsys.readouterr().out)["total"]["projection"] > 0
