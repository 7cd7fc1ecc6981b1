"""A grid of runs: from a file to trained and evaluated cells, their statistics and a report."""
