"""Inspection and comparison of folders: as those of the trees they hold, whoever wrote the codes."""

import csv
import io
import json
import types

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import daq_jax as daq
from daq_jax import cli
from daq_jax.io.hf.bands import band_around, bands
from daq_jax.io.hf.folders import Folder, open_folder
from daq_jax.io.hf.layouts import LAYOUTS
from daq_jax.io.jobs.compare_folders import compare_opened, facts_of_folders
from daq_jax.io.jobs.inspect_folders import inspect_opened
from tests import oracles
from tests.cases import pair
from tests.hf_folders import CONFIG, write_folder

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
NUMBER = oracles.FORMATS["fp8_e4m3fn"]
HF = ((1,), (0,))
NAMES = [f"model.layers.{i}.self_attn.{kind}_proj.weight" for i in range(2) for kind in ("o", "q")]


def write(path, tensors, config=None):
    return write_folder(path, [tensors], CONFIG | (config or {}))


def spread(scale, shape):
    """A scale `[out / r, in / c]` repeated over `[out, in]`."""
    return scale.repeat(shape[0] // scale.shape[0], 0).repeat(shape[1] // scale.shape[1], 1)


def fp8_blocks(weight):
    """Codes and scale as transformers names them, by NumPy alone."""
    tiles = weight.astype(np.float32).reshape(weight.shape[0] // 128, 128, weight.shape[1] // 128, 128)
    scale = np.abs(tiles).max((1, 3)) / np.float32(448)
    return NUMBER.round(weight.astype(np.float32) / spread(scale, weight.shape)).astype(E4M3), scale


@pytest.fixture(scope="module")
def trees():
    """Weights `[out, in]` before and after; the base lies on the grid of FP8 blocks."""
    base, tuned = {}, {}
    for name in NAMES:
        plain, _ = pair(name, (256, 384))
        codes, scale = fp8_blocks(plain)
        base[name] = (codes.astype(np.float32) * spread(scale, codes.shape)).astype(BF16)
        change = np.random.default_rng(1).normal(0, 2e-4, plain.shape)
        tuned[name] = (base[name].astype(np.float32) + change.astype(np.float32)).astype(BF16)
    return base, tuned


@pytest.fixture(scope="module")
def folders(trees, tmp_path_factory):
    """Both as folders, with tensors that are not quantized beside them."""
    kept = {
        "model.embed_tokens.weight": pair("table", (512, 256))[0],
        "model.norm.weight": np.ones(256, BF16),
    }
    path = tmp_path_factory.mktemp("folders")
    return [write(path / word, tree | kept) for word, tree in zip(("base", "tuned"), trees, strict=True)]


def block_folder(path, tuned, config=None):
    """Codes of `tuned` in blocks, in the layout of transformers."""
    found = {}
    for name, weight in tuned.items():
        found[name], found[f"{name}_scale_inv"] = fp8_blocks(weight)
    how = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    return write(path, found, {"quantization_config": how | (config or {})})


def wanted_figures(base, tuned, out):
    """Figures by name, by NumPy in float64, from the bytes of a folder's codes and scales."""
    stored = open_folder(out)
    found, pool = {}, []
    for name in stored.tensors:
        q = stored.read(name)
        scale = np.swapaxes(np.asarray(q.scale), 0, 1)
        tile = [n // m for n, m in zip(q.shape, scale.shape, strict=True)]
        codes = np.asarray(q.codes).astype(np.float32)
        kept = codes * scale.repeat(tile[0], 0).repeat(tile[1], 1)
        pool.append([x.astype(np.float32).ravel() for x in (base[name], tuned[name], kept)])
        found[name] = oracles.figures(*pool[-1], np.zeros(1))
    stored.close()
    found["total"] = oracles.figures(*(np.concatenate(x) for x in zip(*pool, strict=True)), np.zeros(1))
    return found


def assert_figures(table, wanted):
    rows = {**table.leaves, "total": table.total}
    assert rows.keys() == wanted.keys()
    for name, row in rows.items():
        for figure in wanted[name].keys() - {"on_grid"}:  # not computed here; see test_comparison
            got, want = np.asarray(getattr(row, figure)), wanted[name][figure]
            np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=f"{name} {figure}")


# --- comparison ---


def test_figures_of_a_folder_are_those_of_float64_whatever_the_size_of_a_band(trees, folders, tmp_path):
    out = block_folder(tmp_path / "out", trees[1])
    wanted = wanted_figures(*trees, out)
    whole = daq.compare_folders(*folders, out, details=True)
    assert_figures(whole, wanted)
    assert whole.total.on_grid > 0.5
    assert sum(x.ratios.sum() for x in whole.details.values()) == 4 * 6
    told = []
    opened = [open_folder(path) for path in (*folders, out)]
    banded = compare_opened(*opened, most=1, tell=lambda total: lambda *news: told.append((total, *news)))
    for folder in opened:
        folder.close()
    assert_figures(banded, wanted)
    assert len(told) == 4 * 2  # bands of 128 rows
    assert sum(nbytes for _, _, nbytes, _ in told) == told[0][0] == 4 * 256 * 384


@pytest.mark.slow
def test_the_layout_of_the_released_program_is_read(trees, folders, tmp_path):
    # It drops `fmt`, adds a key of its own and gives scales for blocks as transformers does.
    out = block_folder(tmp_path / "out", trees[1], {"scale_search": {"enabled": True, "metric": "sign"}})
    assert_figures(daq.compare_folders(*folders, out), wanted_figures(*trees, out))


@pytest.mark.slow
@pytest.mark.parametrize("scale_dtype", [np.float32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_scales_of_channels_are_read(kind, scale_dtype, trees, folders, tmp_path):
    largest, dtype = (448, E4M3) if kind == "fp8" else (127, np.int8)
    found = {}
    for name, weight in trees[1].items():
        scale = (np.abs(weight.astype(np.float32)).max(1, keepdims=True) / largest).astype(scale_dtype)
        wide = np.clip(weight.astype(np.float32) / scale.astype(np.float32), -largest, largest)
        found[name] = np.rint(wide).astype(dtype) if kind == "int8" else NUMBER.round(wide).astype(dtype)
        found[f"{name}_scale"] = scale
    out = write(tmp_path / "out", found, {"quantization_config": {"quant_method": "compressed-tensors"}})
    assert_figures(daq.compare_folders(*folders, out), wanted_figures(*trees, out))


@pytest.mark.slow
def test_an_fp8_base_stands_for_what_it_dequantizes_to(trees, folders, tmp_path):
    base = block_folder(tmp_path / "base", trees[0])
    out = block_folder(tmp_path / "out", trees[1])
    table = daq.compare_folders(base, folders[1], out)
    assert_figures(table, wanted_figures(*trees, out))
    assert table.total.on_grid == 1.0
    found = daq.inspect_folder(base, folders[1], daq.recipes.absmax)
    assert found.total.on_stored_grid.value == 1.0
    np.testing.assert_allclose(found.total.absmax_projection.value, table.total.projection, rtol=1e-3)


def test_folders_that_do_not_fit_are_refused_in_one_line(trees, folders, tmp_path):
    out = block_folder(tmp_path / "out", trees[1] | {"model.other.weight": trees[1][NAMES[0]]})
    with pytest.raises(
        ValueError, match=r"do not fit: 'model.other.weight' is not in .*base; .* not in .*tuned"
    ):
        daq.compare_folders(*folders, out)
    other = write(tmp_path / "other", {NAMES[0]: np.zeros((128, 128), BF16)})
    with pytest.raises(ValueError, match=r"is \(256, 384\) but \(128, 128\) in"):
        daq.compare_folders(other, folders[1], block_folder(tmp_path / "one", {NAMES[0]: trees[1][NAMES[0]]}))
    with pytest.raises(ValueError, match="holds no quantized weight: no weight has a scale"):
        daq.compare_folders(*folders, folders[1])
    (tmp_path / "orbax" / "_METADATA").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"an Orbax checkpoint, .* `daq_jax.load_weights`"):
        daq.compare_folders(*folders, tmp_path / "orbax")
    packed = write(tmp_path / "packed", {"model.a.weight_packed": np.zeros((4, 4), np.int32)})
    with pytest.raises(ValueError, match="packed in another way"):
        daq.compare_folders(*folders, packed)


def test_packed_int4_is_compared_as_what_it_stands_for(trees, folders, tmp_path):
    out = tmp_path / "out"
    report = daq.quantize_folder(*folders, out, daq.recipes.absmax, format="int4-group", memory_gb=2)
    table = daq.compare_folders(*folders, out)
    assert_figures(table, wanted_packed(*trees, out))
    assert report["total"]["projection"] == pytest.approx(table.total.projection, rel=1e-6)
    assert cli.main(["compare", *map(str, folders), str(out), "--fail-under", "projection=1000"]) == 1


def wanted_packed(base, tuned, out):
    """Figures by name, in float64, from the bits of the words."""
    stored = safetensors.numpy.load_file(out / "model.safetensors")
    found, pool = {}, []
    for name in base:
        words, scale = stored[f"{name}_packed"].view(np.uint32), stored[f"{name}_scale"]
        codes = (
            np.stack([words >> 4 * i & 15 for i in range(8)], -1).reshape(base[name].shape).astype(np.float32)
        )
        kept = (codes - 8) * scale.repeat(128, 1)
        pool.append([x.astype(np.float32).ravel() for x in (base[name], tuned[name], kept)])
        found[name] = oracles.figures(*pool[-1], np.zeros(1))
    found["total"] = oracles.figures(*(np.concatenate(x) for x in zip(*pool, strict=True)), np.zeros(1))
    return found


# --- inspection ---


@pytest.mark.slow
def test_an_inspected_folder_is_as_its_tree(trees, folders):
    rules = [daq.use("", matrix=HF)]
    wanted = daq.inspect(*trees, daq.recipes.absmax, rules=rules)
    found = daq.inspect_folder(*folders, daq.recipes.absmax)
    assert found.to_dict() == wanted.to_dict()
    assert found.verdict.startswith("This base is on an FP8 grid. AbsMax would erase")
    fewer = daq.inspect_folder(*folders, daq.recipes.absmax, most_elements=2**18)
    assert fewer.total.sampled == 2**18
    estimate = fewer.total.absmax_projection
    assert abs(estimate.value - wanted.total.absmax_projection.value) <= estimate.bound


class Spied(Folder):
    """A folder that notes what is read of it."""

    def __init__(self, folder, read):
        self.path, self.tensors, self.config = folder.path, folder.tensors, folder.config
        self.dtype, self._folder, self._read = folder.dtype, folder, read

    def read(self, name, band=slice(None), dtype=None):
        self._read.append((name, band))
        return self._folder.read(name, band, dtype)

    def chunks(self, name):
        raise AssertionError

    def close(self):
        self._folder.close()


@pytest.mark.slow
def test_only_bands_that_hold_the_sample_are_read(folders):
    read = []
    before, after = (Spied(open_folder(path), read) for path in folders)
    inspect_opened(before, after, daq.recipes.absmax, LAYOUTS["fp8-block"], 1)
    before.close()
    after.close()
    assert read
    assert {name for name, _ in read} == {NAMES[0]}
    assert all(band.stop - band.start == 128 for _, band in read)


def test_weights_without_a_base_and_unknown_formats_are_refused(folders, tmp_path):
    alone = write(tmp_path / "alone", {"model.norm.weight": np.ones(256, BF16)})
    with pytest.raises(ValueError, match="4 weights of the tuned model have no partner"):
        daq.inspect_folder(alone, folders[1])
    with pytest.raises(ValueError, match="`format` must be one of fp8-block"):
        daq.inspect_folder(*folders, format="fp9")


def test_bands_cover_each_row_once_and_cut_no_tile(trees, tmp_path):
    folder = open_folder(block_folder(tmp_path / "out", {NAMES[0]: np.ones((640, 128), BF16)}))
    tensor = folder.tensors[NAMES[0]]
    found = bands(tensor.shape, tensor.band_step, most=300 * 128)
    assert found == [slice(0, 256), slice(256, 512), slice(512, 640)]
    assert bands(tensor.shape, tensor.band_step, most=1) == [slice(i, i + 128) for i in range(0, 640, 128)]
    assert band_around(130, 131, 128, 640) == slice(128, 256)
    assert band_around(600, 640, 256, 640) == slice(512, 640)
    folder.close()


# --- the commands ---


@pytest.fixture(scope="module")
def out(folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "out"
    daq.quantize_folder(*folders, path, daq.recipes.absmax, memory_gb=2)
    return path


def run(capsys, *words):
    """Exit status, stdout and stderr of a command."""
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.mark.slow
def test_inspect_prints_its_verdict_first_or_json_alone(folders, capsys):
    status, said, _ = run(capsys, "inspect", *folders, "--recipe", "absmax")
    assert status == 0
    assert said.startswith("This base is on an FP8 grid.")
    assert "give or take" in said
    status, said, _ = run(capsys, "inspect", *folders, "--recipe", "absmax", "--json")
    assert status == 0
    assert json.loads(said)["total"]["elements"] == 4 * 256 * 384


def test_compare_prints_a_table_json_or_csv_with_the_same_figures(folders, out, capsys):
    status, table, _ = run(capsys, "compare", *folders, out)
    assert status == 0
    first = next(line for line in table.splitlines() if line.startswith((" total", " model")))
    assert first.startswith(" total")
    _, said, _ = run(capsys, "compare", *folders, out, "--json")
    plain = json.loads(said)
    assert list(plain["leaves"]) == NAMES
    _, said, _ = run(capsys, "compare", *folders, out, "--csv")
    rows = list(csv.DictReader(io.StringIO(said)))
    assert [row["leaf"] for row in rows] == ["total", *NAMES]
    assert float(rows[0]["projection"]) == plain["total"]["projection"]
    assert float(rows[1]["mse"]) == plain["leaves"][NAMES[0]]["mse"]


def test_a_gate_passes_or_fails_by_the_totals(folders, out, capsys):
    total = daq.compare_folders(*folders, out).total
    just = f"projection={total.projection - 1e-6},cosine={total.cosine - 1e-6}"
    assert run(capsys, "compare", *folders, out, "--fail-under", just)[0] == 0
    over = f"projection={total.projection + 1e-6},cosine=0"
    status, said, err = run(capsys, "compare", *folders, out, "--fail-under", over)
    assert status == 1
    assert "total" in said  # the table is there to see why
    assert err.splitlines()[-1].startswith("daq-jax: the gate is not met: projection is ")
    assert "cosine" not in err.splitlines()[-1]
    assert "lost (least in " in err  # `out` is of another recipe than the default
    assert "Quantize with the default recipe" in err
    assert err.endswith("and compare the predictions.\n")


@pytest.mark.parametrize("figure", ["mse", "lost", "flipped"])
def test_a_gate_on_a_figure_of_which_less_is_better_is_a_ceiling(figure, folders, out, capsys):
    found = getattr(daq.compare_folders(*folders, out).total, figure)
    assert found > 0
    assert run(capsys, "compare", *folders, out, "--fail-under", f"{figure}={1.01 * found}")[0] == 0
    status, _, err = run(capsys, "compare", *folders, out, "--fail-under", f"{figure}={0.99 * found}")
    assert status == 1
    assert f"{figure} is " in err
    assert "needed at most" in err


@pytest.mark.slow
def test_a_figure_without_meaning_meets_no_gate(folders, tmp_path, capsys):
    same, still = [folders[0], folders[0]], tmp_path / "still"
    daq.quantize_folder(*same, still, daq.recipes.absmax, memory_gb=2)
    status, _, err = run(capsys, "compare", *same, still, "--fail-under", "projection=0")
    assert status == 1
    assert "projection is nan, needed at least 0" in err


@pytest.mark.parametrize(
    "words", [["--fail-under", "projektion=1"], ["--fail-under", "cosine=x"], ["--json", "--csv"]]
)
def test_words_that_make_no_sense_are_status_2_before_any_work(words, capsys):
    status, said, err = run(capsys, "compare", "nowhere", "nowhere", "nowhere", *words)
    assert (status, said) == (2, "")
    assert err.startswith("daq-jax: `--")


def test_a_missing_folder_is_status_1_and_one_line(folders, capsys):
    status, said, err = run(capsys, "inspect", folders[0], "nowhere")
    assert (status, said) == (1, "")
    assert err.count("\n") == 1
    assert "nowhere" in err


@pytest.mark.slow
def test_html_writes_a_page_with_every_weight(folders, out, tmp_path, capsys):
    assert run(capsys, "compare", *folders, out, "--html", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert all(name in page for name in NAMES)
    assert page.count("data:image/png;base64,") == 4


# --- codes that other libraries wrote ---


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
def test_what_transformers_quantizes_is_compared(trees, folders, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    how = transformers.FineGrainedFP8Config()
    quantize = Fp8Quantize(types.SimpleNamespace(quantization_config=how))
    weights = {name: torch.from_numpy(x.view(np.int16)).view(torch.bfloat16) for name, x in trees[1].items()}
    path = tmp_path / "out"
    path.mkdir()
    save_file(quantize.convert(weights), path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps({"quantization_config": how.to_dict()}, default=str))
    table = daq.compare_folders(*folders, path)
    assert_figures(table, wanted_figures(*trees, path))
    assert 0.3 < table.total.projection < 0.9


@pytest.mark.peers
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("kind", "strategy"), [("float", "channel"), ("int", "channel"), ("float", "block")])
def test_what_compressed_tensors_compresses_is_compared(kind, strategy, trees, folders, tmp_path):
    torch = pytest.importorskip("torch")
    ct = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import FloatQuantizationCompressor, IntQuantizationCompressor
    from safetensors.torch import save_file

    blocks = {"block_structure": [128, 128]} if strategy == "block" else {}
    args = ct.quantization.QuantizationArgs(
        num_bits=8, type=kind, strategy=strategy, symmetric=True, **blocks
    )
    scheme = ct.quantization.QuantizationScheme(targets=["Linear"], weights=args)
    by = FloatQuantizationCompressor if kind == "float" else IntQuantizationCompressor
    found = {}
    for name, x in trees[1].items():
        weight = torch.from_numpy(x.astype(np.float32))
        tiles = weight.reshape(2, 128, 3, 128) if strategy == "block" else weight.reshape(256, 1, 1, 384)
        scale = tiles.abs().amax((1, 3)) / (448 if kind == "float" else 127)
        for part, tensor in by.compress({"weight": weight, "weight_scale": scale}, scheme).items():
            found[f"{name.removesuffix('.weight')}.{part}"] = tensor.contiguous()
    path = tmp_path / "out"
    path.mkdir()
    save_file(found, path / "model.safetensors", {"format": "pt"})
    how = {"quant_method": "compressed-tensors", "config_groups": {"group_0": scheme.model_dump(mode="json")}}
    (path / "config.json").write_text(json.dumps({"quantization_config": how}))
    table = daq.compare_folders(*folders, path)
    assert len(table.leaves) == 4
    assert_figures(table, wanted_figures(*trees, path))


@pytest.mark.parametrize(
    "report", ["", "[" * 10**5, "[]", '{"origin": 3}', '{"origin": null}', '{"origin": ["recipe"]}']
)
def test_a_page_says_nothing_of_a_report_that_is_not_ours(report, tmp_path):
    (tmp_path / "daq_report.json").write_text(report)
    assert facts_of_folders("b", "t", tmp_path) == {"base": "b", "tuned": "t", "quantized": str(tmp_path)}
