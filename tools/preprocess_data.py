"""Megatron-LM's preprocess_data.py by its usual options, over megalite: ``OUTPUT_KEY_document.bin`` and ``.idx``.

python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus --tokenizer-model tok.model --append-eod

What `megalite preprocess` can do beyond them it does under its own options.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in `megalite preprocess`: threads keep workers from forking

from megalite.cli.preprocess import summary  # noqa: E402
from megalite.data.preprocess import preprocess  # noqa: E402
from megalite.data.preprocessing.workers import Interrupted  # noqa: E402
from megalite.errors import USER_ERROR_STATUS, UserError  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """Read the options; what Megatron-LM needs and megalite does not is taken and left aside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--tokenizer-model", type=Path, required=True)
    parser.add_argument("--json-keys", nargs="+", default=["text"])
    parser.add_argument("--append-eod", action="store_true")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--on-error", default="fail", help="what a malformed document does: fail or skip")
    aside = parser.add_argument_group("taken and left aside: the file says what it is, and work is shared by itself")
    for option in ("--tokenizer-type", "--partitions", "--log-interval"):
        aside.add_argument(option)
    aside.add_argument("--keep-sequential-samples", action="store_true")
    return parser.parse_args()


def main() -> int:
    """Tokenize each key, return the exit status."""
    args = parse_arguments()
    try:
        for key in args.json_keys:
            prefix = Path(f"{args.output_prefix}_{key}_document")
            report = preprocess(
                args.input,
                args.tokenizer_model,
                prefix,
                text_key=key,
                append_eod=args.append_eod,
                workers=args.workers,
                on_error=args.on_error,
            )
            print(*summary(prefix, report), sep="\n")
    except UserError as error:
        print(f"megalite: error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    except Interrupted as stop:
        print(f"megalite: interrupted; {stop.fix}", file=sys.stderr)
        return stop.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
