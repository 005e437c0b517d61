"""The runner of the benchmarks, and what all of them write down."""

import importlib
import json
import sys

import pytest

from benchmarks import __main__ as runner
from benchmarks import common, tpu_kernel, workloads
from benchmarks.speed.collectives import collectives


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    return runner.main()


def test_without_a_name_the_runner_lists_all_with_a_line_each(monkeypatch, capsys):
    assert run(monkeypatch) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == list(runner.MODULES)
    assert all(len(what) > 20 for _, what in lines)


def test_an_unknown_name_is_answered_with_the_list(monkeypatch, capsys):
    assert run(monkeypatch, "nope") == 2
    said = capsys.readouterr().err
    assert "'nope'" in said
    assert "comparison_sums" in said


@pytest.mark.parametrize("name", runner.MODULES)
def test_every_benchmark_has_commands_with_a_quick_form(name, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # a benchmark begins without it
    commands = importlib.import_module(runner.MODULES[name]).COMMANDS
    for command in [()] if len(commands) == 1 else [(word,) for word in commands]:
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, name, *command, "--help")
        assert stopped.value.code == 0
        assert "--quick" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["speed", "--gpu"], "speed --gpu"),
        (["speed", "--out", "/tmp/x", "--repeats", "3"], "speed --repeats 3"),
        (["folders", "plan", "--disk=/tmp/x"], "folders plan"),
        (["density", "--weights", "w.npz", "--wheels", "dir", "--draws", "2"], "density --draws 2"),
    ],
)
def test_the_noted_command_leaves_out_paths_of_a_machine(words, kept):
    assert common.command(words) == f"python -m benchmarks {kept}"


def test_an_environment_is_json_and_says_device_versions_and_commit():
    found = json.loads(json.dumps(common.environment()))
    assert {"date", "command", "commit", "device", "cpu", "versions"} <= set(found)
    assert {"python", "daq_jax", "jax", "jaxlib", "numpy"} <= set(found["versions"])


def test_a_result_is_named_after_its_device(tmp_path):
    names = [common.named("speed", {"device": d}, tmp_path).name for d in ("NVIDIA H200", "cpu")]
    assert names == ["speed_h200.json", "speed_cpu.json"]


def test_workloads_count_their_matrices():
    experts = workloads.WORKLOADS["moe_experts"]
    assert experts.counts == {(2048, 1408): 64}
    assert experts.elements == 64 * 2048 * 1408


def test_bytes_sent_count_each_turn_of_a_loop():
    program = """
HloModule a

%body (p: (s32[])) -> (s32[]) {
  %x = f32[4,2]{1,0} all-reduce(%y), to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %g = (bf16[8]{0}, u8[2]{0}) all-gather-start(%a), dimensions={0}
}
"""
    assert collectives(program) == {"all-reduce": 3 * 32, "all-gather": 18}


def test_bytes_sent_count_what_is_inside_fusions():
    program = """
HloModule a

%fused_all-reduce (p: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(%p), channel_id=1, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %s = ((f32[8]{0}), f32[8]{0}) fusion-start(%a), kind=kCustom, calls=%fused_all-reduce
  ROOT %d = f32[8]{0} fusion-done(%s)
}
"""
    assert collectives(program) == {"all-reduce": 32}


@pytest.mark.slow
def test_the_kernel_for_tpus_has_the_codes_of_quantize():
    tpu_kernel.check()
