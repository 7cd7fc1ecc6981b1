"""D-TRADES finds its own weights: warm-up, calibration, and that both survive a restart."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from torch import Tensor, nn

from dtrades_fast.attacks import Watch
from dtrades_fast.defenses import Batch, Crafted, Loss, Threat
from dtrades_fast.defenses.dtrades import DTRADES

THREAT = Threat(0.1, 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"))


def lines(folder: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


class Outputs(nn.Module):
    """Random logits, others at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn(len(x), 4, dtype=x.dtype)


def one_loss(defense: DTRADES, epoch: float, samples: int = 6) -> Loss:
    """A step at that moment of training, with random logits and gradients."""
    images = torch.rand(samples, 1, 2, 2, dtype=torch.float64)
    watch = Watch(images, 0.1, "linf")
    watch(images, torch.rand_like(images))
    batch = Batch(images, torch.zeros(samples, dtype=torch.int64), torch.arange(samples), 0, epoch)
    return defense.loss(Outputs(), batch, Crafted(images, watch))


@pytest.mark.parametrize(
    ("base", "mean", "share"), [(0.0, 6.0, 0.5), (2.0, 5.0, 0.25), (1.0, 3.0, 0.0), (0.0, 2.0, 1.0)]
)
def test_the_mean_and_its_share_come_out(base: float, mean: float, share: float) -> None:
    """Over the very batches of the calibration: the mean of lambda, and how much of it is sensitivity's."""
    torch.manual_seed(0)
    defense = DTRADES(THREAT, lambda_base=base, lambda_mean=mean, lambda_share=share, calibration_batches=3)
    warm = [one_loss(defense, epoch, samples).terms for epoch, samples in ((0.0, 6), (0.3, 2), (0.5, 6), (0.9, 9))]
    used = {name: torch.cat([terms[name] for terms in warm[1:]]) for name in ("entropy", "sensitivity")}
    one_loss(defense, 1.0)
    found = defense.figures()
    of_entropy = found["lambda_alpha"] * used["entropy"].mean().item()
    of_sensitivity = found["lambda_beta"] * used["sensitivity"].mean().item()
    assert base + of_entropy + of_sensitivity == pytest.approx(mean)
    assert of_sensitivity == pytest.approx(share * (mean - base))


def test_lambda_is_constant_in_the_warm_up_and_then_calibrated_once() -> None:
    torch.manual_seed(0)
    defense = DTRADES(THREAT, lambda_mean=5.0, lambda_base=1.0, lambda_warmup=2.0, lambda_min=3.0, lambda_max=5.5)
    for epoch in (0.0, 0.5, 1.99):
        assert one_loss(defense, epoch).terms["lambda"].unique().tolist() == [5.0]
        assert defense.figures() == {}
    terms, found = one_loss(defense, 2.0).terms, defense.figures()
    weighed = found["lambda_alpha"] * terms["entropy"] + found["lambda_beta"] * terms["sensitivity"]
    torch.testing.assert_close(terms["lambda"], (1.0 + weighed).clamp(3.0, 5.5))
    assert len(terms["lambda"].unique()) > 1
    for epoch in (2.1, 7.0):
        one_loss(defense, epoch)
        assert defense.figures() == found


def test_given_weights_win() -> None:
    torch.manual_seed(0)
    defense = DTRADES(THREAT, lambda_alpha=2.0, lambda_beta=3.0)
    terms = one_loss(defense, 0.0).terms
    torch.testing.assert_close(terms["lambda"], 2 * terms["entropy"] + 3 * terms["sensitivity"])
    assert defense.figures() == {"lambda_alpha": 2.0, "lambda_beta": 3.0}
    assert defense.lambda_warmup == 0
    warmed = DTRADES(THREAT, lambda_alpha=2.0, lambda_beta=3.0, lambda_warmup=1.0)
    assert one_loss(warmed, 0.5).terms["lambda"].unique().tolist() == [6.0]
    assert len(one_loss(warmed, 1.0).terms["lambda"].unique()) > 1


def test_a_state_has_what_calibration_needs() -> None:
    torch.manual_seed(0)
    whole = DTRADES(THREAT, calibration_batches=2)
    for epoch in (0.0, 0.4, 0.8):
        one_loss(whole, epoch)
    restarted = DTRADES(THREAT, calibration_batches=2)
    restarted.load_state_dict(whole.state_dict())
    for defense in (whole, restarted):
        torch.manual_seed(1)
        one_loss(defense, 1.0)
    assert restarted.figures() == whole.figures() != {}
    again = DTRADES(THREAT, calibration_batches=2)
    again.load_state_dict(whole.state_dict())
    assert again.figures() == whole.figures()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambda_alpha": 1.0}, "must be given both or neither"),
        ({"lambda_beta": 1.0}, "must be given both or neither"),
        ({"lambda_warmup": 0.0}, "lambda_warmup must be above 0 epochs"),
        ({"lambda_warmup": -1.0}, "lambda_warmup must be at least 0 epochs"),
        ({"lambda_share": 1.5}, "from 0 to 1, got 1.5"),
        ({"calibration_batches": 0}, "at least 1, got 0"),
        ({"lambda_base": 7.0}, r"lambda_mean must lie between .*\[7.0, inf\], got 6.0"),
        ({"lambda_max": 5.0}, r"\[0.0, 5.0\], got 6.0"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DTRADES(THREAT, **options)


def test_nothing_to_calibrate_with_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="training began behind the warm-up"):
        one_loss(DTRADES(THREAT), 1.0)
    defense = DTRADES(THREAT)
    images = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    watch = Watch(images, 0.1, "linf")
    watch(images, torch.zeros_like(images))
    batch = Batch(images, torch.zeros(3, dtype=torch.int64), torch.arange(3), 0)
    defense.loss(Outputs(), batch, Crafted(images, watch))
    with pytest.raises(RuntimeError, match=r"the mean sensitivity 0\. Give --lambda-alpha and --lambda-beta"):
        one_loss(defense, 1.0)


def test_the_warm_up_trains_as_trades(data: Path, tmp_path: Path) -> None:
    """Bit for bit, for as long as it lasts."""
    options = ("--epochs", "1", "--method")
    dtrades, output = tiny_run.run(data, tmp_path, *options, "dtrades", "--lambda-mean", "4", "--run", "dtrades")
    trades, _ = tiny_run.run(data, tmp_path, *options, "trades", "--beta", "4", "--run", "trades")
    assert dtrades.weights.read_bytes() == trades.weights.read_bytes()
    assert "lambda is 4 throughout, as in TRADES: the warm-up is as long as training" in output


def test_a_run_logs_and_keeps_what_it_found(data: Path, tmp_path: Path) -> None:
    folder, output = tiny_run.run(data, tmp_path, "--calibration-batches", "2")
    logged = [line["defense"] for line in lines(folder)]
    assert logged[0] == {}
    assert logged[1] == logged[2] != {}
    assert torch.load(folder.last, weights_only=True)["defense"]["weights"] == list(logged[1].values())
    assert f"lambda_alpha {logged[1]['lambda_alpha']:.4g}" in output
    assert lines(folder)[0]["train"]["lambda"]["std"] == 0
    assert lines(folder)[1]["train"]["lambda"]["std"] > 0
