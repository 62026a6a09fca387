"""Preprocessing, start-up and reading, beside bare tokenizers and Megatron-core: into benchmarks/results/data.md.

python benchmarks/data.py
"""

import platform
from pathlib import Path

import data_preprocess
import data_samples

RESULTS = Path(__file__).parent / "results" / "data.md"


def main() -> None:
    parts = ["# Data\n", f"`python benchmarks/data.py` on {platform.machine()}, Python {platform.python_version()}.\n"]
    for title, measure in (("Preprocessing", data_preprocess.measure), ("Samples", data_samples.measure)):
        part = f"## {title}\n\n{measure()}\n"
        print(part, flush=True)
        parts.append(part)
    RESULTS.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
