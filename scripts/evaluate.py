"""``python scripts/evaluate.py OPTIONS`` is ``dtrades-fast evaluate OPTIONS``."""

import sys

from dtrades_fast.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
