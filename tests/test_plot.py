"""Pictures: what they show is what metrics.jsonl and the network say, and what cannot be drawn is said."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dtrades_fast import cli
from dtrades_fast import data as datasets
from dtrades_fast.config import load
from dtrades_fast.evaluation.evaluate import find_run, load_run
from dtrades_fast.plot import figures
from dtrades_fast.plot import plot as plotting
from dtrades_fast.plot.plot import Options, look_at, plot
from dtrades_fast.plot.samples import Samples, measure, weighting
from dtrades_fast.training import checkpoint
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import create_model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"), per_class=30)  # 9 validate


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    """Method -> a run that has learnt a part of its classes, so that there are right and wrong predictions."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("runs")
    options = ("--epsilon", "24/255", "--lr", "0.02")
    return {
        method: tiny_run.run(data, path, *options, "--method", method, "--run", method)[0]
        for method in ("dtrades", "trades", "standard")
    }


def options(*folders: RunFolder, **given: Any) -> Options:
    return Options(runs=tuple(str(folder.path) for folder in folders), device="cpu", threads=1, **given)


def samples_of(folder: RunFolder, **given: Any) -> Samples:
    return look_at(folder, folder.read_metrics(), "cpu", options(folder, **given))


@pytest.fixture(scope="module")
def dtrades(runs: dict[str, RunFolder]) -> Samples:
    return samples_of(runs["dtrades"], epoch="last")  # the best one may lie in the warm-up


@pytest.fixture
def mixed(dtrades: Samples) -> Samples:
    """With predictions of every kind: the first three correct, the next two fooled, the rest wrong."""
    clean, adv = torch.zeros_like(dtrades.clean_probs), torch.zeros_like(dtrades.adv_probs)
    right, wrong = dtrades.labels, (dtrades.labels + 1) % 3
    clean[torch.arange(9), torch.where(torch.arange(9) < 5, right, wrong)] = 1
    adv[torch.arange(9), torch.where(torch.arange(9) < 3, right, wrong)] = 1
    weight = torch.linspace(1, 9, 9)
    made_of = {"base": 1.0, "alpha": 2.0, "beta": 3.0, "minimum": 0.0, "maximum": math.inf}
    return dataclasses.replace(dtrades, clean_probs=clean, adv_probs=adv, weight=weight, weighting=made_of)


def panel(figure: Figure, label: str) -> Axes:
    (found,) = [ax for ax in figure.axes if label in ax.get_ylabel()]
    return found


# Training curves


def line(epoch: int, **monitor: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "train": {"loss": {"mean": 3.0 / epoch}, "na": {"mean": 0.1 * epoch}},
        "validation": {"na": 0.12 * epoch, "ra": 0.05 * epoch},
        "monitor": monitor,
    }


def test_curves_hold_the_metrics(runs: dict[str, RunFolder]) -> None:
    lines = runs["dtrades"].read_metrics()
    figure = figures.curves({"dtrades": lines})
    for label, paths, factor in (
        ("loss", [("train", "loss", "mean")], 1),
        ("NA", [("validation", "na"), ("train", "na", "mean")], 100),
        ("RA", [("validation", "ra"), ("train", "ra", "mean")], 100),
        ("λ", [("train", "lambda", "mean")], 1),
        ("FOSC", [("monitor", "fosc", "mean"), ("monitor", "fosc", "p95")], 1),
    ):
        drawn = panel(figure, label).lines
        for curve, path in zip(drawn, paths, strict=True):
            expected = lines
            for name in path:
                expected = [value[name] for value in expected]
            np.testing.assert_array_equal(curve.get_xdata(), [1, 2, 3])
            np.testing.assert_allclose(curve.get_ydata(), factor * np.array(expected))
        assert len({curve.get_linestyle() for curve in drawn}) == len(paths)
    assert panel(figure, "FOSC").get_yscale() == "log"


def test_the_band_is_a_standard_deviation(runs: dict[str, RunFolder]) -> None:
    lines = runs["dtrades"].read_metrics()
    (band,) = panel(figures.curves({"a": lines}), "λ").collections
    corners = band.get_paths()[0].vertices
    last = lines[-1]["train"]["lambda"]
    ends = sorted(set(corners[corners[:, 0] == 3][:, 1].tolist()))
    assert ends == pytest.approx([last["mean"] - last["std"], last["mean"] + last["std"]])


def test_every_axis_has_a_name_and_a_unit(runs: dict[str, RunFolder], mixed: Samples) -> None:
    drawn = [figures.curves({"a": runs["dtrades"].read_metrics()}), figures.entropy_sensitivity({"a": mixed})]
    for ax in (ax for figure in drawn for ax in figure.axes):
        assert ax.get_xlabel() == "epoch" or "(nats)" in ax.get_xlabel()
        assert any(unit in ax.get_ylabel() for unit in ("(nats", "(%)", "weight λ"))
    histogram = figures.lambda_histogram({"a": mixed}).axes[0]
    assert "λ(x)" in histogram.get_xlabel()
    assert "(%)" in histogram.get_ylabel()


def test_runs_differ_by_more_than_colour() -> None:
    names = [f"run{i}" for i in range(9)]
    figure = figures.curves({name: [line(1), line(2)] for name in names})
    drawn = panel(figure, "loss").lines
    assert len(drawn) == len(names)
    assert len({(curve.get_color(), curve.get_marker()) for curve in drawn}) == len(names)
    assert len({curve.get_marker() for curve in drawn[:8]}) == 8
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names


def test_no_empty_panel() -> None:
    older = {name: value for name, value in line(1).items() if name != "monitor"}
    assert [ax.get_ylabel().split()[0] for ax in figures.curves({"older": [older]}).axes] == [
        "training",
        "natural",
        "robust",
    ]
    converged = line(1, fosc={"mean": 0.0, "p95": 0.0}, alarms={"steps": 0, "reasons": {}})
    assert len(figures.curves({"a": [converged]}).axes) == 3  # a logarithmic axis has no 0


def test_alarms_are_marked_where_they_were() -> None:
    alarms = [0, 2, 0, 5]
    lines = [
        line(i + 1, fosc={"mean": 0.1, "p95": 0.0}, alarms={"steps": steps, "reasons": {}})
        for i, steps in enumerate(alarms)
    ]
    quiet = [line(i + 1, fosc={"mean": 0.2, "p95": 0.3}) for i in range(4)]
    ax = panel(figures.curves({"quiet": quiet, "alarmed": lines}), "FOSC")
    (marks,) = [curve for curve in ax.lines if curve.get_marker() == "X"]
    np.testing.assert_array_equal(marks.get_xdata(), [2, 4])
    legend = ax.get_legend()
    assert legend is not None
    assert "masking alarm" in [text.get_text() for text in legend.get_texts()]


# What the network makes of its images


def test_samples_are_those_of_the_model(runs: dict[str, RunFolder]) -> None:
    """Every figure computed again, the slow way."""
    for method, folder in runs.items():
        config = load(folder.config)
        sets = datasets.load(config.data.dataset, "data", "cpu")
        model = create_model(config, sets.info).eval()
        model.load_state_dict(checkpoint.load_weights(folder.weights))
        found = samples_of(folder, epoch="last")
        assert found.images.equal(sets.validation.images(slice(None)))
        assert found.labels.equal(sets.validation.labels)
        assert (found.adv - found.images).abs().max() <= 24 / 255 + 1e-6
        assert found.adv.min() >= 0
        assert found.adv.max() <= 1
        assert not found.adv.equal(found.images), method  # not even for standard training
        adv = found.adv.clone().requires_grad_()
        clean_logs, adv_logs = model(found.images).log_softmax(1), model(adv).log_softmax(1)
        torch.testing.assert_close(found.clean_probs, clean_logs.exp())
        torch.testing.assert_close(found.adv_probs, adv_logs.exp())
        torch.testing.assert_close(found.entropy, -(clean_logs.exp() * clean_logs).sum(1))
        assert found.correct.equal(clean_logs.argmax(1) == found.labels)
        assert found.robust.equal(adv_logs.argmax(1) == found.labels)
        kl = (clean_logs.detach().exp() * (clean_logs.detach() - adv_logs)).sum()
        (gradient,) = torch.autograd.grad(kl, adv)
        torch.testing.assert_close(found.sensitivity, gradient.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-6)


def test_lambda_is_made_of_what_calibration_found(runs: dict[str, RunFolder], dtrades: Samples) -> None:
    found = runs["dtrades"].read_metrics()[-1]["defense"]
    expected = found["lambda_alpha"] * dtrades.entropy + found["lambda_beta"] * dtrades.sensitivity
    torch.testing.assert_close(dtrades.weight, expected)
    assert dtrades.epoch == 3


def test_weighting(runs: dict[str, RunFolder]) -> None:
    config = load(runs["dtrades"].config)
    lines = runs["dtrades"].read_metrics()
    assert weighting(config, lines[0]) == {}  # the warm-up
    assert weighting(config, lines[1])["alpha"] == lines[1]["defense"]["lambda_alpha"]
    given = dataclasses.replace(config.defense, lambda_alpha=2.0, lambda_beta=3.0, lambda_max=5.0, lambda_warmup=0.0)
    older = {name: value for name, value in lines[0].items() if name != "defense"}
    expected = {"base": 0.0, "alpha": 2.0, "beta": 3.0, "minimum": 0.0, "maximum": 5.0}
    assert weighting(dataclasses.replace(config, defense=given), older) == expected
    for method in ("trades", "standard"):
        assert weighting(load(runs[method].config), runs[method].read_metrics()[-1]) == {}


def test_samples_do_not_depend_on_the_batch_size(runs: dict[str, RunFolder]) -> None:
    run = load_run(runs["trades"], "last", None, "cpu", None)
    last = runs["trades"].read_metrics()[-1]
    whole, parts = measure(run, last, 100), measure(run, last, 2)
    assert whole.adv.equal(parts.adv)
    assert whole.labels.equal(parts.labels)
    torch.testing.assert_close(whole.sensitivity, parts.sensitivity)


def test_the_best_epoch_is_the_one_that_training_chose(runs: dict[str, RunFolder]) -> None:
    for folder in runs.values():
        chosen = checkpoint.load_state(folder.best)["best"]["epoch"]
        assert samples_of(folder, epoch="best").epoch == chosen
        assert samples_of(folder, epoch="last").epoch == 3


# Their pictures


def test_histogram_is_split_by_correctness(mixed: Samples) -> None:
    ax = figures.lambda_histogram({"a": mixed}).axes[0]
    assert "3 correct, 2 fooled, 4 wrong" in ax.get_title()
    groups = ([1, 2, 3], [4, 5], [6, 7, 8, 9])  # of lambda, as in `mixed`
    for patch, values in zip(ax.patches, groups, strict=True):
        outline = patch.get_path().vertices
        filled = outline[outline[:, 1] > 0]
        assert filled[:, 0].min() == pytest.approx(min(values), abs=8 / figures.BINS + 1e-6)
        assert filled[:, 0].max() == pytest.approx(max(values), abs=8 / figures.BINS + 1e-6)
        assert filled[:, 1].max() == pytest.approx(100 / len(values))  # each in a bin of its own
    assert len({patch.get_hatch() for patch in ax.patches}) == 3


def test_points_are_split_by_correctness(mixed: Samples) -> None:
    ax = figures.entropy_sensitivity({"a": mixed}).axes[0]
    both = torch.stack((mixed.entropy, mixed.sensitivity), 1).numpy()
    for points, part in zip(ax.collections, (slice(3), slice(3, 5), slice(5, 9)), strict=False):
        np.testing.assert_allclose(points.get_offsets(), both[part])


def test_level_lines_are_lambdas(mixed: Samples) -> None:
    ax = figures.entropy_sensitivity({"a": mixed}).axes[0]
    levels = ax.collections[3]
    lengths = 0
    for level, path in zip(levels.levels, levels.get_paths(), strict=True):
        for entropy, sensitivity in path.vertices:
            assert 1 + 2 * entropy + 3 * sensitivity == pytest.approx(level, rel=1e-3)
            lengths += 1
    assert lengths > 10
    assert all(text.get_text().startswith("λ = ") for text in ax.texts)
    assert ax.texts


def test_no_level_lines_without_a_lambda_that_varies(mixed: Samples) -> None:
    for made_of in ({}, {**mixed.weighting, "alpha": 0.0, "beta": 0.0}, {**mixed.weighting, "maximum": 0.5}):
        ax = figures.entropy_sensitivity({"a": dataclasses.replace(mixed, weighting=made_of)}).axes[0]
        assert len(ax.collections) == 3


def test_sensitivities_of_zero_are_shown(mixed: Samples) -> None:
    for values in (torch.zeros(9), torch.cat((torch.zeros(1), mixed.sensitivity[1:]))):
        figure = figures.entropy_sensitivity({"a": dataclasses.replace(mixed, sensitivity=values)})
        assert figure.axes[0].get_yscale() == "symlog"
        assert figure.axes[0].get_ylim()[0] == 0


def test_gallery(mixed: Samples) -> None:
    figure = figures.gallery("a", mixed, 3)
    clean, change, adv = np.array(figure.axes).reshape(3, 3)
    for column, i in enumerate((0, 4, 8)):
        original = mixed.images[i].permute(1, 2, 0).numpy()
        attacked = mixed.adv[i].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(clean[column].images[0].get_array(), original)
        np.testing.assert_array_equal(adv[column].images[0].get_array(), attacked)
        shown = change[column].images[0].get_array()
        assert 0 <= shown.min() <= shown.max() <= 1
        np.testing.assert_allclose((2 * shown - 1) * 24 / 255, attacked - original, atol=1e-6)
        assert clean[column].get_title().startswith(f"label {mixed.classes[mixed.labels[i]]}\n")
    assert [("✗" in ax.get_title()) for ax in clean] == [False, False, True]
    assert [("✗" in ax.get_title()) for ax in adv] == [False, True, True]
    assert "(100 %)" in adv[0].get_title()
    assert "epsilon 24/255" in " ".join(figure.get_suptitle().split())
    assert "−epsilon is darkest, 0 grey and +epsilon brightest" in figure.get_suptitle()


def test_gallery_of_an_l2_ball_says_its_own_scale(mixed: Samples) -> None:
    figure = figures.gallery("a", dataclasses.replace(mixed, radius=None), 9)
    largest = (mixed.adv - mixed.images).abs().max().item()
    assert f"+{largest:.3g} brightest" in figure.get_suptitle()
    shown = np.stack([ax.images[0].get_array() for ax in figure.axes[9:18]])
    assert np.abs(2 * shown - 1).max() == pytest.approx(1)


def test_long_class_names_are_cut() -> None:
    assert figures.short("aquarium_fish") == "aquarium_fish"
    assert figures.short("a_very_long_class_name") == "a_very_long_…"


# The command


def test_a_run_is_drawn_into_its_folder(runs: dict[str, RunFolder], capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs["dtrades"]
    words = [folder.path.name, "--runs-dir", str(folder.path.parent), "--epoch", "last", "--threads", "1"]
    assert cli.main(["plot", *words]) == 0
    printed = capsys.readouterr().out
    for name in ("curves", "lambda", "entropy-sensitivity", "gallery"):
        assert str(folder.plots / name) in printed
        with Image.open(folder.plots / f"{name}.png") as picture:
            picture.load()
            assert min(picture.size) > 300
        pdf = (folder.plots / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF-")
        assert pdf.rstrip().endswith(b"%%EOF")
    assert len(list(folder.plots.iterdir())) == 8


def test_several_runs(runs: dict[str, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures"
    assert plot(options(runs["dtrades"], runs["standard"], runs["trades"], out=str(out), epoch="last", images=1)) == []
    galleries = {f"gallery-{name}.png" for name in runs}
    assert {path.name for path in out.glob("*.png")} == galleries | {
        "curves.png",
        "lambda.png",
        "entropy-sensitivity.png",
    }
    printed = capsys.readouterr().out
    assert "no histogram of lambda for standard" in printed
    assert "no histogram of lambda for trades" in printed
    assert "no histogram of lambda for dtrades" not in printed
    given = options(runs["standard"], runs["trades"], runs_dir=str(tmp_path))
    assert plotting.output_folder(given, [runs["standard"], runs["trades"]]) == tmp_path / "plots"


def test_the_same_run_gives_the_same_files(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    for name in ("a", "b"):
        plot(options(runs["trades"], out=str(tmp_path / name)))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_names_of_runs(tmp_path: Path) -> None:
    folders = [RunFolder(tmp_path / name) for name in ("x/run", "y/run", "x/run", "x/other")]
    assert list(plotting.named(folders)) == ["x/run", "y/run", "x/other"]
    assert list(plotting.named(folders[2:])) == ["run", "other"]


def test_what_cannot_be_drawn_is_said(
    runs: dict[str, RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs["trades"].path, tmp_path / "moved", ignore=shutil.ignore_patterns("plots"))
    moved = RunFolder(tmp_path / "moved")
    dataset = f"dataset: {load(moved.config).data.dataset}"
    moved.config.write_text(moved.config.read_text().replace(dataset, "dataset: folder:/nowhere"))
    assert cli.main(["plot", str(moved.path), "--threads", "1"]) == 1
    assert "left out all but the curves of moved: /nowhere/train is missing" in capsys.readouterr().err
    assert {path.name for path in moved.plots.iterdir()} == {"curves.png", "curves.pdf"}
    moved.best_weights.unlink()
    (problem,) = plot(options(moved, runs["trades"], out=str(tmp_path / "both")))
    assert "model-best.safetensors does not exist" in problem
    assert (tmp_path / "both" / "gallery.png").is_file()  # of the run that is whole


def test_refusals(runs: dict[str, RunFolder], tmp_path: Path) -> None:
    for given, message in (
        ({"images": 0}, "--images must be at least 1, got 0"),
        ({"limit": 0}, "--limit must be at least 1, got 0"),
        ({"batch_size": -1}, "--batch-size must be at least 1, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            plot(options(runs["trades"], **given))
    with pytest.raises(ValueError, match="needs at least one run"):
        plotting.main([], "dtrades-fast plot")
    with pytest.raises(FileNotFoundError, match="nope is no run folder"):
        find_run("nope", str(tmp_path))
    young = RunFolder(tmp_path / "young")
    young.path.mkdir()
    shutil.copy(runs["trades"].config, young.config)
    with pytest.raises(FileNotFoundError, match="young has not finished its first epoch"):
        plot(options(young))
    young.metrics.write_text('{"epoch": 1, "tr')  # is being written
    with pytest.raises(FileNotFoundError, match="young has not finished its first epoch"):
        plot(options(young))
    young.metrics.write_text('{"epoch": 1, "tr\n')
    with pytest.raises(RuntimeError, match=r"metrics.jsonl is damaged .*--resume writes it again"):
        plot(options(young))
    assert not young.plots.exists()


def test_overwrite_deletes_the_pictures(data: Path, tmp_path: Path) -> None:
    folder, _ = tiny_run.run(data, tmp_path, "--epochs", "1")
    plot(options(folder))
    assert folder.plots.is_dir()
    tiny_run.run(data, tmp_path, "--epochs", "1", "--overwrite")
    assert not folder.plots.exists()
