"""``python -m dtrades_fast`` is ``dtrades-fast``."""

import sys

from dtrades_fast.cli import main

sys.exit(main())
