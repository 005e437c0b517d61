"""Trains the small model and its tunes, and writes them into few files: `python -m benchmarks.behaviour.envelope.make_pairs WHEELS OUT`."""

import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.behaviour.envelope import pairs as P

WANTED = {
    "mxfp4": (1e-7, 6e-7, 2.5e-6, 1e-5, 4e-5, 1.5e-4, 6e-4),
    "int4": (1e-7, 4e-5, 6e-4),
    "nvfp4": (1e-5, 1.5e-4, 6e-4),
    "fp8-block": (1e-7, 2.5e-6, 4e-5, 1.5e-4, 6e-4),
    "bf16": (4e-5, 6e-4),
}


def main(wheels: str, out: str) -> None:
    start, out_dir = time.time(), Path(out)
    size, texts = P.SIZES["cpu"], P.texts_of(wheels)
    trained, second, key = P.make_trained(size, texts)
    weights = P.flat(trained)
    np.savez(out_dir / "trained.npz", **weights)
    print("trained", time.time() - start, flush=True)
    judge = P.Judge(size, texts)
    todo = [(kind, rate) for kind, rates in WANTED.items() for rate in rates]
    for n in range(0, len(todo), 3):
        content = {}
        for kind, rate in todo[n : n + 3]:
            base, _ = P.to_base(weights, kind)
            tuned = P.flat(P.learn(P.nested(base), second, size.tune_steps, rate, key, size))
            for k in tuned:
                code, top = P.pack(tuned[k] - base[k])
                content[f"{kind}|{rate}|{k}"], content[f"{kind}|{rate}|{k}|top"] = code, top
            kl = judge.kl(base, judge.reference(tuned))
            print(kind, rate, f"KL of the base {kl:.2e}", time.time() - start, flush=True)
        np.savez(out_dir / f"pairs{n // 3}.npz", **content)


if __name__ == "__main__":
    main(*sys.argv[1:])
