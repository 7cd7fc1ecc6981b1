"""A study's file: which cells it makes, and what it is told when it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrades_fast.config import Config
from dtrades_fast.study.grid import LISTS, Study, read

FILE = """
description: Two methods.
defaults: {preset: quick, dataset: mnist5k, arch: smallcnn, seed: [0, 1]}
runs:
  - {method: trades, beta: [1, 2.5]}
  - {method: dtrades, lambda_share: 0, label: entropy only, part: ablation}
  - {method: faal, init_weights: {method: trades, beta: 2.5}, epochs: 2}
evaluations:
  - {suite: quick, limit: 20, checkpoint: [best, last]}
  - {attacks: [pgd20, square], only: {method: [trades, faal], seed: 1}}
  - {attacks: fgsm, surrogates: [{seed: 1}], only: {method: trades, seed: 0}}
"""


def study(path: Path, text: str = FILE) -> Study:
    file = path / "small.yaml"
    file.write_text(text)
    return read(file)


def test_lists_are_axes_and_blocks_are_added(tmp_path: Path) -> None:
    made = study(tmp_path)
    assert made.name == "small"
    assert made.description == "Two methods."
    assert made.compare == "dtrades"
    assert sorted(cell.name for cell in made.cells) == [
        "mnist5k-smallcnn-dtrades-entropy-only-seed0",
        "mnist5k-smallcnn-dtrades-entropy-only-seed1",
        "mnist5k-smallcnn-faal-seed0",
        "mnist5k-smallcnn-faal-seed1",
        "mnist5k-smallcnn-trades-beta-1-seed0",
        "mnist5k-smallcnn-trades-beta-1-seed1",
        "mnist5k-smallcnn-trades-beta-2.5-seed0",
        "mnist5k-smallcnn-trades-beta-2.5-seed1",
    ]
    cell = made["mnist5k-smallcnn-trades-beta-2.5-seed1"]
    assert cell.place == {
        "protocol": "common",
        "dataset": "mnist5k",
        "arch": "smallcnn",
        "method": "trades",
        "seed": 1,
        "part": "main",
        "setting": "beta 2.5",
    }
    config = cell.config(tmp_path / "runs")
    assert (config.defense.beta, config.run.seed, config.optimization.epochs) == (2.5, 1, 8)
    assert config.folder == tmp_path / "runs" / cell.name
    assert not cell.labelled
    ablated = made["mnist5k-smallcnn-dtrades-entropy-only-seed0"]
    assert (ablated.setting, ablated.part, ablated.labelled) == ("entropy only", "ablation", True)
    assert made["mnist5k-smallcnn-faal-seed0"].setting == ""


def test_a_cell_starts_from_the_best_epoch_of_the_one_described(tmp_path: Path) -> None:
    made = study(tmp_path)
    cell = made["mnist5k-smallcnn-faal-seed1"]
    assert cell.start == "mnist5k-smallcnn-trades-beta-2.5-seed1"
    assert cell.config(tmp_path).model.init_weights == str(tmp_path / cell.start / "model-best.safetensors")
    names = [c.name for c in made.cells]
    assert names.index(cell.start) < names.index(cell.name)


def test_evaluations_are_for_the_cells_that_they_name(tmp_path: Path) -> None:
    made = study(tmp_path)
    both = [{"suite": "quick", "limit": 20, "checkpoint": epoch} for epoch in ("best", "last")]
    more = {"attacks": "pgd20,square", "checkpoint": "best"}
    transfer = {"attacks": "fgsm", "checkpoint": "best", "surrogates": ["mnist5k-smallcnn-trades-beta-1-seed1"]}
    assert list(made["mnist5k-smallcnn-faal-seed1"].evaluations) == [*both, more]
    assert list(made["mnist5k-smallcnn-faal-seed0"].evaluations) == both
    assert list(made["mnist5k-smallcnn-trades-beta-1-seed0"].evaluations) == [*both, transfer]
    assert made["mnist5k-smallcnn-trades-beta-1-seed0"].needs == ["mnist5k-smallcnn-trades-beta-1-seed1"]


def test_protocols_have_names_of_their_own_and_are_kept_apart(tmp_path: Path) -> None:
    made = study(
        tmp_path,
        """
runs:
  - {preset: quick, method: trades, arch: smallcnn}
  - {protocol: published, recipe: trades-mnist}
""",
    )
    assert [cell.name for cell in made.cells] == [
        "common-mnist5k-smallcnn-trades-seed0",
        "published-mnist-smallcnn-trades-seed0",
    ]
    assert made.cells[1].method == "trades"  # the recipe's
    assert made.compare == "trades"  # the last cell's, where there is no D-TRADES


def test_an_option_that_is_a_list_is_no_axis(tmp_path: Path) -> None:
    assert LISTS == ("milestones",)
    assert isinstance(Config().optimization.milestones, tuple)
    text = "runs: [{method: trades, schedule: step, epochs: 9, milestones: %s}]"
    assert study(tmp_path, text % "[4, 6]").cells[0].options["milestones"] == [4, 6]
    two = study(tmp_path, text % "[[4, 6], [5]]").cells
    assert [cell.options["milestones"] for cell in two] == [[4, 6], [5]]
    assert len({cell.name for cell in two}) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", "must map option names to values"),
        ("runs: [{method: trades}]\nevaluations: [{limit: 3, device: cpu}]", "options of an evaluation 'device'"),
        ("run: []", "unknown sections 'run'; known are description, defaults, runs"),
        ("description: x", "'runs' must be a list of blocks of options"),
        ("runs: [trades]", "'runs' must be a list of blocks of options"),
        ("runs: [{method: nope}]", "unknown method 'nope'"),
        ("runs: [{method: trades, bta: 3}]", "bta"),
        ("runs: [{method: trades, seed: []}]", "seed: an empty list makes no runs"),
        ("runs: [{method: trades, runs_dir: x}]", "runs_dir: the study decides"),
        ("runs: [{method: trades}, {method: trades}]", "more than once: mnist5k-resnet18-trades-seed0"),
        ("runs: [{method: trades}]\ncompare: mart", "'compare' must be one of its methods, trades, got 'mart'"),
        ("runs: [{method: faal, init_weights: {method: trades}}]", "describes: none"),
        ("runs: [{method: trades, beta: [1, 2]}, {method: faal, init_weights: {method: trades}}]", "beta-2-seed0"),
        ("runs: [{method: trades, lr: -1}]", "--lr must be above 0"),
        ("runs: [{method: trades}]\nevaluations: [quick]", "'evaluations' must be a list of options"),
        ("runs: [{method: trades}]\nevaluations: [{suit: quick}]", "unknown options of an evaluation 'suit'"),
        ("runs: [{method: trades}]\nevaluations: [{suite: quick, surrogates: [x]}]", "surrogates must describe runs"),
        ("runs: [{method: trades}]\nevaluations: [{suite: qick}]", "suite"),
        ("runs: [{method: trades}]\nevaluations: [{attacks: pgd0x}]", "pgd0x"),
        ("runs: [{method: trades}]\nevaluations: [{only: {sed: 1}}]", "sed"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"small\.yaml") as error:
        study(tmp_path, text)
    assert message in str(error.value)


def test_unknown_files_and_cells(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="has no cell 'x'; its cells are mnist5k-smallcnn"):
        study(tmp_path)["x"]


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent / "studies").glob("*.yaml")), ids=lambda f: f.stem
)
def test_the_studies_that_come_with_the_project_are_right(file: Path) -> None:
    made = read(file)
    assert made.description
    assert all(cell.evaluations for cell in made.cells)
