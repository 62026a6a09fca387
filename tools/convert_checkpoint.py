"""`megalite convert` from a checkout: a model between Hugging Face's folders, Megatron's and megalite's checkpoints.

python tools/convert_checkpoint.py runs/quickstart exported --verify
"""

import sys

from megalite.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
