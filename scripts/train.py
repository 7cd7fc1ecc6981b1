"""``python scripts/train.py OPTIONS`` is ``dtrades-fast train OPTIONS``."""

import sys

from dtrades_fast.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
