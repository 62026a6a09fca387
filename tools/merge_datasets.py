"""Make one dataset of several that were written with one tokenizer; ``PREFIX.bin`` and ``PREFIX.idx`` each.

python tools/merge_datasets.py data/web data/books --output data/all
"""

import argparse
import sys
from pathlib import Path

from megalite.cli.progress import count_progress
from megalite.data.indexed.merge import merge_datasets
from megalite.errors import USER_ERROR_STATUS, UserError
from megalite.files import writing


def main() -> int:
    """Read the options, merge, return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", metavar="PREFIX", type=Path, nargs="+")
    parser.add_argument("--output", metavar="PREFIX", type=Path, required=True)
    parser.add_argument("--force", action="store_true", help="overwrite a dataset that is there")
    args = parser.parse_args()
    try:
        with writing(args.output, "give another --output"), count_progress("merging", "tokens") as progress:
            merged = merge_datasets(args.prefixes, args.output, progress, overwrite=args.force)
    except UserError as error:
        print(f"megalite: error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    print(f"{args.output}: {merged.num_documents:,} documents, {merged.num_tokens:,} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
