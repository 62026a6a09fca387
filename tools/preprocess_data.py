"""Megatron-LM's preprocess_data.py by its usual options, over megalite: ``OUTPUT_KEY_document.bin`` and ``.idx``.

python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus --tokenizer-model tok.model --append-eod
python tools/preprocess_data.py --input corpus.jsonl --output-prefix corpus --tokenizer-type GPT2BPETokenizer \\
    --vocab-file vocab.json --merge-file merges.txt --append-eod

What `megalite preprocess` can do beyond them it does under its own options.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # as in `megalite preprocess`: threads keep workers from forking

from megalite.cli.preprocess import summary  # noqa: E402
from megalite.data.preprocess.preprocess import preprocess  # noqa: E402
from megalite.data.preprocess.workers import Interrupted  # noqa: E402
from megalite.data.tokenizers.gpt2_files import tokenizer_json  # noqa: E402
from megalite.errors import USER_ERROR_STATUS, UserError  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """Read the options; what Megatron-LM needs and megalite does not is taken and left aside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--tokenizer-model", type=Path)
    parser.add_argument("--vocab-file", type=Path, help="GPT-2's vocab.json")
    parser.add_argument("--merge-file", type=Path, help="GPT-2's merges.txt")
    parser.add_argument("--tokenizer-type", help="left aside: the files say what they are; GPT2BPETokenizer has two")
    parser.add_argument("--json-keys", nargs="+", default=["text"])
    parser.add_argument("--append-eod", action="store_true")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--on-error", default="fail", help="what a malformed document does: fail or skip")
    parser.add_argument("--force", action="store_true", help="overwrite datasets that are there")
    aside = parser.add_argument_group("taken and left aside: the file says what it is, and work is shared by itself")
    for option in ("--partitions", "--log-interval"):
        aside.add_argument(option)
    aside.add_argument("--keep-sequential-samples", action="store_true")
    return parser.parse_args()


@contextmanager
def tokenizer_of(args: argparse.Namespace) -> Iterator[Path]:
    """Yield the tokenizer's file: GPT-2's two files, which may have any names, become one for as long as it is used."""
    two = (args.vocab_file, args.merge_file)
    if args.tokenizer_model is not None:
        if any(two):
            raise UserError("--tokenizer-model: stands beside --vocab-file or --merge-file; keep one tokenizer")
        yield args.tokenizer_model
        return
    if None in two:
        raise UserError(
            "no tokenizer is given; write --tokenizer-model FILE, or GPT-2's --vocab-file vocab.json and --merge-file "
            "merges.txt"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_bytes(tokenizer_json(*two))
        yield path


def main() -> int:
    """Tokenize each key, return the exit status."""
    args = parse_arguments()
    try:
        with tokenizer_of(args) as tokenizer:
            for key in args.json_keys:
                prefix = Path(f"{args.output_prefix}_{key}_document")
                report = preprocess(
                    args.input,
                    tokenizer,
                    prefix,
                    text_key=key,
                    append_eod=args.append_eod,
                    workers=args.workers,
                    on_error=args.on_error,
                    overwrite=args.force,
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
