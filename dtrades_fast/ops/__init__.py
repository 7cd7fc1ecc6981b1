"""The operators: public functions over the compiled kernels, with pure-PyTorch twins in :mod:`.reference`."""

from dtrades_fast.ops._library import BACKEND, Backend, BackendError
from dtrades_fast.ops.entropy_kl import EntropyKL, entropy_kl
from dtrades_fast.ops.lambda_x import LambdaX, lambda_x
from dtrades_fast.ops.logit_grad import logit_grad_ce, logit_grad_kl
from dtrades_fast.ops.pgd_step import pgd_step_
from dtrades_fast.ops.random_start import random_start
from dtrades_fast.ops.robust_loss import CELoss, MartLoss, TradesLoss, ce_loss, mart_loss, trades_loss
from dtrades_fast.ops.sample_stats import SampleStats, sample_stats

__all__ = [
    "BACKEND",
    "Backend",
    "BackendError",
    "CELoss",
    "EntropyKL",
    "LambdaX",
    "MartLoss",
    "SampleStats",
    "TradesLoss",
    "ce_loss",
    "entropy_kl",
    "lambda_x",
    "logit_grad_ce",
    "logit_grad_kl",
    "mart_loss",
    "pgd_step_",
    "random_start",
    "sample_stats",
    "trades_loss",
]
