"""How long `import sae` takes, beside `import anndata`, in fresh interpreters taken in turn.

python benchmarks/import_time.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

STATEMENTS = ("import anndata", "import sae", "import scanpy", "import torch")


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for statement in STATEMENTS:
        seconds(statement)
    rounds = [{statement: seconds(statement) for statement in STATEMENTS} for _ in range(options.rounds)]
    reference = statistics.median(row["import anndata"] for row in rounds)
    print(f"{'statement':<16}{'median s':>10}{'ratio':>8}")
    for statement in STATEMENTS:
        median = statistics.median(row[statement] for row in rounds)
        print(f"{statement:<16}{median:>10.3f}{median / reference:>8.2f}")
