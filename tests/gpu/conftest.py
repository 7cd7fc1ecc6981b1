import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent
sys.path += [str(TESTS), str(TESTS / "ops")]  # tiny_run, and the oracles of the operators
