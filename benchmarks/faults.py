"""What is left of an object when a verb fails, wherever it fails?

Runs every verb once for each place where `tests/test_atomic.py` can make it fail, with an error that alternates between
RuntimeError, MemoryError and KeyboardInterrupt (Ctrl-C), and counts what is left: the object as it was, down to the identity
of its arrays; the whole result; or what the verb promises to keep, an SAE that was trained so far by `fit`, and the runs of
`sweep`, each finished or marked as failed. The last column has to be 0. With names, only these.

    python benchmarks/faults.py
    python benchmarks/faults.py "fit, view" steer
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from pathlib import Path
from types import ModuleType

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import scanpy as sc
import torch

TESTS = Path(__file__).parent.parent / "tests"
COLUMNS = ("verb", "places", "as before", "whole result", "kept as promised", "anything else")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TESTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    conftest, atomic = load("conftest"), load("test_atomic")
    # Of a sweep whose runs are made to fail, and of generators that fail when they are thrown away.
    sc.settings.verbosity, sys.unraisablehook = "error", lambda _: None
    # A number that was never set is another one when more libraries are loaded.
    torch.set_num_threads(2)
    objects = atomic.prepared(conftest._make_adata)
    print("| " + " | ".join(COLUMNS) + " |\n|---|" + "--:|" * (len(COLUMNS) - 1))
    start, wrong, total = time.perf_counter(), [], dict.fromkeys(("before", "whole", "partly", "else"), 0)
    for name in sys.argv[1:] or atomic.CASES:
        trial = atomic.Trial(atomic.CASES[name], objects[atomic.CASES[name].start], conftest.Comparison)
        points, whole = trial.points(), trial.whole()
        counts = dict.fromkeys(total, 0)
        for point, error in atomic.sampled(points, None):
            found = trial.outcome(point, error, whole)
            counts[found if found in counts else "else"] += 1
            if found not in counts:
                wrong.append(f"{name}, {point}, {error.__name__}: {found}")
                print(wrong[-1], file=sys.stderr)
        total = {kind: total[kind] + n for kind, n in counts.items()}
        print(f"| {name} | {len(points)} | " + " | ".join(map(str, counts.values())) + " |", flush=True)
    print(f"| all | {sum(total.values())} | " + " | ".join(map(str, total.values())) + " |")
    print(f"\n{time.perf_counter() - start:.0f} s", *wrong, sep="\n")


if __name__ == "__main__":
    main()
