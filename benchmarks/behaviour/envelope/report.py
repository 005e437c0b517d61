"""Markdown tables of the results: `python -m benchmarks.behaviour.envelope.report > benchmarks/results/behaviour/envelope.md`."""

import json
from pathlib import Path

HERE = Path(__file__).parents[2] / "results" / "behaviour"


def table(results, title):
    names = []
    for r in results.values():
        names += [n for n in r["kl"] if n not in names]
    lines = [f"## {title}", "", "| base, rate, grid | change | nothing | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for key, r in sorted(
        results.items(), key=lambda kv: (kv[0].split("|")[3], kv[0].split("|")[1] == "bf16", kv[1]["change"])
    ):
        _, kind, what, grid = key.split("|")
        least = min((v[0] for v in r["kl"].values()), default=0)
        cells = []
        for n in names:
            v = r["kl"].get(n)
            text = "-" if v is None else f"{v[0]:.2e}"
            cells.append(f"**{text}**" if v and v[0] <= 1.1 * least else text)
        lines.append(
            f"| {kind}, {what}, {grid} | {r['change']:.3%} | {r['nothing']:.1e} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines) + "\n"


def small(results):
    out = {}
    for key, r in results.items():
        kind, what = key.split("|")
        change = next(iter(r.values()))[3]
        out[f"0|{kind}|{what}|{kind}"] = {"change": change, "nothing": float("nan"), "kl": r}
    return out


if __name__ == "__main__":
    print("# KL from the tuned model, nats per byte; bold: within 1.1 x the least of the row\n")
    print(
        table(
            json.loads((HERE / "envelope_gpu.json").read_text()),
            "25M parameters, one H100, seed 0: the last run",
        )
    )
    print(
        table(
            json.loads((HERE / "envelope_gpu_explore.json").read_text()),
            "25M parameters: the exploration (`env` is the form before the last)",
        )
    )
    print(
        table(
            small(json.loads((HERE / "envelope_cpu.json").read_text())),
            "2.5M parameters: what was tried on the way",
        )
    )
