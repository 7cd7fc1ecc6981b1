"""Pictures of runs: training curves, what lambda is made of, adversarial images."""
