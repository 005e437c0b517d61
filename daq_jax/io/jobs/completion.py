"""The last step: once every file of tensors is there, what makes a folder of them a checkpoint.

Side files, report and index come first and the config last: without it no loader takes the folder for a
model.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from daq_jax.analysis.figures import Figures, pool
from daq_jax.io.hf.folders import INDEX, SINGLE, Folder
from daq_jax.io.hf.tensor_files import write_text
from daq_jax.io.jobs.journal import REPORT, Journal
from daq_jax.io.jobs.planning import Plan

CONFIG = "config.json"
_SIDE_FILES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".bpe")
_CODE = ".py"
_WRITTEN_HERE = (CONFIG, INDEX, REPORT)


def side_files(folder: Path, custom_code: bool) -> list[Path]:
    """Files beside the weights that a loader needs, one level deep: tokenizer, chat template, other configs.

    Args:
        folder: of the tuned model.
        custom_code: whether Python files are among them.
    """
    suffixes = (*_SIDE_FILES, _CODE) if custom_code else _SIDE_FILES
    found = [*folder.glob("*"), *folder.glob("[!.]*/*")]
    files = [p.relative_to(folder) for p in found if p.suffix in suffixes and p.is_file()]
    indexes = (".safetensors.index.json", ".bin.index.json")
    return sorted(p for p in files if str(p) not in _WRITTEN_HERE and not p.name.endswith(indexes))


def complete(
    journal: Journal, plan: Plan, tuned: Folder, summary: Mapping[str, Any], custom_code: bool
) -> dict[str, Any]:
    """Completes the folder if all of its files are finished; whoever of several processes comes last does so.

    Returns:
        `summary`, with the comparison and sums of all files if they are finished.
    """
    with journal.alone("completion", wait=True) as needed:
        if not needed:
            return json.loads((journal.out / REPORT).read_text())
        records = {shard.file: journal.record(shard.file) for shard in plan.shards}
        if any(record is None for record in records.values()):
            return dict(summary)
        report = _report(journal, records, summary)
        journal.close(lambda: _write(journal.out, plan, tuned, report, custom_code))
        return report


def _report(journal: Journal, records: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    leaves = {n: Figures.from_sums(s) for record in records.values() for n, s in record["figures"].items()}
    total = pool(leaves.values()) if leaves else None
    return {
        "fingerprint": journal.key,
        **summary,
        "total": None if total is None else total.to_dict(),
        "leaves": {name: figures.to_dict() for name, figures in leaves.items()},
        "crc32": {name: word for record in records.values() for name, word in record["crc32"].items()},
    }


def _write(out: Path, plan: Plan, tuned: Folder, report: Mapping[str, Any], custom_code: bool) -> None:
    for path in side_files(tuned.path, custom_code):
        (out / path).parent.mkdir(exist_ok=True)
        shutil.copyfile(tuned.path / path, out / path)
    write_text(out / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")
    if [shard.file for shard in plan.shards] != [SINGLE]:
        write_text(out / INDEX, json.dumps(_index(plan), indent=2) + "\n")
    config = {k: v for k, v in tuned.config.items() if k not in ("quantization_config", "compression_config")}
    config["quantization_config"] = plan.layout.config(plan.skipped)
    write_text(out / CONFIG, json.dumps(config, indent=2) + "\n")


def _index(plan: Plan) -> dict[str, Any]:
    sizes = [spec.nbytes for shard in plan.shards for spec in shard.outputs.values()]
    files = {name: shard.file for shard in plan.shards for name in shard.outputs}
    return {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(files.items()))}
