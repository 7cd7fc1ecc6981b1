"""``python scripts/study.py OPTIONS`` is ``dtrades-fast study OPTIONS``."""

import sys

from dtrades_fast.cli import main

sys.exit(main(["study", *sys.argv[1:]]))
