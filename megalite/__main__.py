"""``python -m megalite``: the same as the command ``megalite``, and what launchers start as a module."""

import sys

from megalite.cli import main

if __name__ == "__main__":
    sys.exit(main())
