"""dtrades_fast: train, attack and compare adversarially robust image classifiers, on kernels of its own."""

__version__ = "0.1.0"
