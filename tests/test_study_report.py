"""A study's report: its numbers, what it says when they are few, and a page that a browser shows without complaint."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run

from dtrades_fast import cli
from dtrades_fast.study import cell as cells
from dtrades_fast.study import comparisons, figures, fronts, results, statistics, tables
from dtrades_fast.study.blocks import Table, latex, markdown
from dtrades_fast.study.cell import Machine
from dtrades_fast.study.grid import Cell, Study, read
from dtrades_fast.study.report import progress
from dtrades_fast.study.results import Checkpoint, Group, Results, load

POINTS, CLASSES = 40, 4
FILE = """
description: Made up, with 50 % & more <of everything>.
defaults: {preset: quick, dataset: mnist5k, arch: resnet18, seed: [0, 1, 2], epochs: 2}
runs:
  - {method: at}
  - {method: trades, beta: [1, 4]}
  - {method: dtrades, lambda_mean: [1, 4]}
  - {method: dtrades, lambda_mean: 4, lambda_share: 0, label: entropy only, part: ablation}
  - {method: faal, init_weights: {method: trades, beta: 4}}
evaluations:
  - {attacks: [fgsm, pgd20], limit: 40, checkpoint: [best, last]}
  - {suite: minimum-norm, limit: 40, checkpoint: last, only: {part: main}}
"""


# ---- folders as training and evaluation leave them -------------------------------------------------------------------


def accuracy_of(cell: Cell) -> tuple[int, int]:
    """Points that are correct and that stand: D-TRADES 4 stands on five or six more than TRADES of the seed."""
    seed = cell.seed
    base = {"at": (30, 12), "trades": (32 + seed, 14 + seed), "faal": (31, 10 + 3 * seed)}
    if cell.method == "dtrades":
        return (32 + seed, 19 + seed + (seed == 1)) if cell.setting == "lambda_mean 4" else (34 + seed, 10 + 2 * seed)
    na, ra = base[cell.method]
    return (na + 3, ra - 4) if cell.setting == "beta 1" else (na, ra)


def flags(count: int) -> str:
    return "1" * count + "0" * (POINTS - count)


def evaluation(cell: Cell, checkpoint: str) -> dict[str, Any]:
    na, ra = accuracy_of(cell)
    ra -= 2 * (checkpoint == "last")
    labels = [i % CLASSES for i in range(POINTS)]
    masked = cell.method == "faal" and cell.seed == 2
    return {
        "checkpoint": checkpoint,
        "points": POINTS,
        "ids": list(range(POINTS)),
        "labels": labels,
        "epsilon": "0.3",
        "norm": "linf",
        "na": na / POINTS,
        "correct": flags(na),
        "per_class": {f"class{i}": 0.5 for i in range(CLASSES)},
        "attacks": {
            # on other points than pgd20 by one: both together leave one fewer
            "fgsm": {"ra": (ra + 3) / POINTS, "correct": "0" + flags(ra + 4)[1:]},
            "pgd20": {"ra": ra / POINTS, "correct": flags(ra)},
        },
        "minimum_norm": {},
        "transfer": {},
        "commit": "0123456789abcdef-dirty",
        "verdict": {"verdict": "masked" if masked else "healthy", "reasons": ["too good"] if masked else []},
    }


def minimum_norms(cell: Cell) -> dict[str, Any]:
    norms = [0.1 + 0.01 * i for i in range(POINTS - 1)] + [None]
    entry = {"cap": 1.0, "per_point": norms}
    return {**evaluation(cell, "last"), "attacks": {}, "minimum_norm": {"linf": entry}}


def epoch_line(cell: Cell, epoch: int) -> dict[str, Any]:
    histogram = {"edges": [0.1, 1.0, 10.0], "correct": [0, 3, 5, 0], "wrong": [0, 1, 1, 0]}
    weight = {"dtrades": 1.0 + epoch + cell.seed / 4, "trades": float(cell.options.get("beta", 6))}.get(cell.method)
    weighted = {} if weight is None else {"lambda": {"mean": weight}}
    return {
        "epoch": epoch,
        "step": 10 * epoch,
        "train": {"loss": {"mean": 2.0 / epoch}, **weighted},
        "validation": {"na": 0.3 * epoch, "ra": 0.1 * epoch},
        "seconds": 60.0,
        "monitor": {"alarms": {"steps": 5 if cell.method == "faal" else 0}, "lambda": {"histogram": histogram}},
        "defense": {},
    }


def finish(cell: Cell, runs: Path) -> None:
    folder = runs / cell.name
    folder.mkdir(parents=True)
    config = cell.config(runs).resolved("0.3")
    (folder / "config.yaml").write_text(config.to_yaml())
    versions = {"python": "3.12", "torch": "2.14"}
    env: dict[str, Any] = {"versions": versions, "commit": "abc", "platform": "Linux", "device": "cpu"}
    env |= {"backend": "C++", "threads": 1, "data": {"name": "mnist5k", "fingerprint": "digits"}}
    (folder / "env.json").write_text(json.dumps(env))
    lines = [json.dumps(epoch_line(cell, epoch)) for epoch in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    records = [evaluation(cell, "best"), evaluation(cell, "last")]
    records += [minimum_norms(cell)] if cell.part == "main" else []
    (folder / "eval.json").write_text(json.dumps({"schema": 2, "evaluations": records}))
    content = {
        "version": 1,
        "status": "done",
        "place": cell.place,
        "asked": cell.asked(),
        "trained": True,
        "error": None,
        "ended": f"2026-01-0{1 + cell.seed}T12:00:00Z",
    }
    content |= {"evaluated": cell.asked()["evaluations"], "seconds": {"training": 120.0, "evaluation": 60.0}}
    (folder / "cell.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    path = tmp_path_factory.mktemp("study") / "made-up.yaml"
    path.write_text(FILE)
    return read(path)


@pytest.fixture(scope="module")
def runs(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for cell in study.cells:
        finish(cell, folder)
    return folder


@pytest.fixture(scope="module")
def found(study: Study, runs: Path) -> Results:
    return load(study, runs)


@pytest.fixture(scope="module")
def report(study: Study, runs: Path) -> Path:
    assert cli.main(["report", str(study.path), "--runs-dir", str(runs)]) == 0
    return runs / "report"


def cell_of(table: Table, row: str, column: str) -> str:
    (line,) = [line for line in table.rows if line[0] == row]
    return line[list(table.header).index(column)]


def accuracies(group: Group, part: str, checkpoint: Checkpoint) -> Table | None:
    """Under the usual conditions."""
    return tables.accuracies(group, part, checkpoint, group.bases[checkpoint])


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_means_and_deviations_are_those_of_the_seeds(found: Results) -> None:
    (group,) = found.groups
    assert group.bases["last"].attacks == ("fgsm", "pgd20")
    table = accuracies(group, "main", "last")
    assert table is not None
    shares = {
        name: [100 * value / POINTS for value in values]
        for name, values in {"na": (32, 33, 34), "ra": (12, 13, 14)}.items()
    }
    assert (
        cell_of(table, "TRADES (beta 4)", "NA") == f"{np.mean(shares['na']):.1f} ± {np.std(shares['na'], ddof=1):.1f}"
    )
    assert cell_of(table, "TRADES (beta 4)", "RA pgd20") == "32.5 ± 2.5"
    worst = [100 * (value - 1) / POINTS for value in (12, 13, 14)]  # fgsm alone breaks one more
    assert cell_of(table, "TRADES (beta 4)", "RA worst") == f"{np.mean(worst):.1f} ± {np.std(worst, ddof=1):.1f}"
    assert cell_of(table, "TRADES (beta 4)", "RD") == "52.5 ± 0.0"
    assert cell_of(table, "TRADES (beta 4)", "ASR of all") == "70.0 ± 2.5"
    assert (
        cell_of(table, "TRADES (beta 4)", "ASR of correct")
        == f"{np.mean([100 * 21 / n for n in (32, 33, 34)]):.1f} ± 1.9"
    )
    assert cell_of(table, "TRADES (beta 4)", "best − last RA") == "5.0 ± 0.0"
    assert [line[0] for line in table.rows] == [
        "PGD-AT",
        "TRADES (beta 1)",
        "TRADES (beta 4)",
        "D-TRADES (lambda_mean 1)",
        "D-TRADES (lambda_mean 4)",
        "FAAL †",
    ]
    ablation = accuracies(group, "ablation", "best")
    assert ablation is not None
    assert [line[0] for line in ablation.rows] == ["D-TRADES (entropy only)"]


def test_robust_accuracy_by_class(found: Results) -> None:
    """12 of 40 points stand, the first one not: of class 0 two of ten, of the others three."""
    (group,) = found.groups
    (result,) = [
        r for row in group.rows for r in row.results.values() if r.cell.name == "mnist5k-resnet18-trades-beta-4-seed0"
    ]
    by_class = results.class_accuracies(result, "last", group.bases["last"])
    assert by_class == {"class0": 20, "class1": 30, "class2": 30, "class3": 30}
    assert results.figures(result, "last", group.bases["last"])["worst class"] == 20


def test_a_winner_only_where_the_interval_excludes_zero(found: Results) -> None:
    (group,) = found.groups
    table = tables.comparison(group, "dtrades", "last")
    assert table is not None
    assert table.header[5] == "higher"
    said = {(line[0], line[1]): line for line in table.rows}
    clear = said["D-TRADES (lambda_mean 4) − TRADES (beta 4)", "RA worst"]
    assert clear[2:4] == ["+13.3", "+9.7 to +16.9"]
    assert re.fullmatch(r"\+\d+\.\d to \+\d+\.\d", clear[4])
    assert clear[4] != clear[3]  # other test points would give others
    assert clear[5] == "D-TRADES (lambda_mean 4)"
    unclear = said["D-TRADES (lambda_mean 1) − PGD-AT", "RA worst"]
    assert unclear[3] == "-12.4 to +12.4"
    assert unclear[5] == "not resolved"
    same = said["D-TRADES (lambda_mean 4) − TRADES (beta 4)", "NA"]
    assert same[2:5] == ["+0.0", "the same on each seed", "+0.0 to +0.0"]
    assert same[5] == "not resolved"
    lines = comparisons.in_words(group, "dtrades", "last")
    assert len(lines) == len(table.rows)
    start = "resnet18 on mnist5k, last epoch, RA worst: "
    assert any(x.startswith(f"{start}D-TRADES (lambda_mean 4) is 13.3 points above TRADES (beta 4)") for x in lines)
    assert any(x.startswith(f"{start}not resolved: D-TRADES (lambda_mean 1) minus PGD-AT +0.0 points") for x in lines)
    assert ("D-TRADES (lambda_mean 4) − D-TRADES (entropy only)", "NA") in said  # the ablation


def by_weight(ours: list[int], theirs: list[float]) -> str:
    found = statistics.paired(
        dict(enumerate(100 / POINTS * np.array(ours))), dict(enumerate(100 / POINTS * np.array(theirs)))
    )
    return f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}] at 2.75"


def test_settings_of_a_method_make_a_front(found: Results) -> None:
    (group,) = found.groups
    by_method = fronts.fronts(group, "last")
    assert {method: [row.setting for row in rows] for method, rows in by_method.items()} == {
        "at": [""],
        "trades": ["beta 1", "beta 4"],
        "dtrades": ["lambda_mean 1", "lambda_mean 4"],  # not what has a label
        "faal": [""],
    }
    table = tables.trade_offs(group, "last")
    assert table is not None
    # areas of the corners (35, 7), (32, 11) of 40, and so on: one point fewer stands than under pgd20 alone
    area = [100 * ((32 + s) * (11 + s) + (3) * (7 + s)) / POINTS**2 for s in range(3)]
    assert (
        cell_of(table, "TRADES (beta 1)", "area under the method's front")
        == f"{np.mean(area):.1f} ± {np.std(area, ddof=1):.1f}"
    )
    assert cell_of(table, "PGD-AT", "area under the method's front") == "–"
    area, equal, weight, ablation = fronts.front_comparison(group, "dtrades", "last")
    published = dataclasses.replace(group, protocol="published")  # differ between methods
    assert fronts.front_comparison(published, "dtrades", "last") == []
    start = "resnet18 on mnist5k, last epoch, the settings of D-TRADES against those of TRADES, "
    assert area.startswith(f"{start}area under their front: ")
    ranges = "80.0 to 85.0, 82.5 to 87.5, 85.0 to 90.0 %, by seed"
    assert equal.startswith(f"{start}RA worst at equal NA ({ranges}): D-TRADES is 6.2 points above")
    # Of 40 points, 7 + s stand of TRADES 1 and 11 + s of TRADES 4: linear in the logarithm between them.
    theirs = [7 + s + 4 * np.log(2.5 + s / 4) / np.log(4) for s in range(3)]
    ours = {"one": [7 + 2 * s for s in range(3)], "four": [16 + s + (s == 1) for s in range(3)]}
    both = 100 / POINTS * (np.mean([ours["one"], ours["four"]], axis=0) - theirs).mean()
    at_weight = "RA worst at the same mean weight over training: "
    shown = by_weight(ours["one"], theirs), by_weight(ours["four"], theirs)
    assert weight.startswith(
        f"{start}{at_weight[:-2]} (mean over {shown[0]}; {shown[1]}): D-TRADES is {both:.1f} points above TRADES"
    )
    start = "resnet18 on mnist5k, last epoch, D-TRADES (entropy only) against the settings of TRADES, "
    alone = 100 / POINTS * (np.array(ours["one"]) - theirs).mean()
    assert ablation.startswith(f"{start}{at_weight}TRADES is {-alone:.1f} points above D-TRADES (entropy only)")


def test_time_before_counts(found: Results) -> None:
    table = tables.times(found.groups[0])
    assert cell_of(table, "FAAL", "training") == "2.0 (2.0 to 2.0)"
    assert cell_of(table, "FAAL", "with the network that it started from") == "4.0 (4.0 to 4.0)"


def test_masking_is_reported_with_its_reasons(found: Results) -> None:
    table = tables.masked_gradients(found.groups[0])
    assert cell_of(table, "FAAL", "runs with an alarm") == "3 of 3"
    assert cell_of(table, "FAAL", "% of steps") == "50.0"
    assert cell_of(table, "FAAL", "healthy evaluations") == "4 of 6"
    of_both = "; ".join(f"seed 2, {checkpoint}, 40 images, masked: too good" for checkpoint in ("last", "best"))
    assert cell_of(table, "FAAL", "others") == of_both
    assert cell_of(table, "FAAL", "PGD − RA worst, largest") == "2.5"  # a point that fgsm alone breaks
    assert cell_of(table, "PGD-AT", "others") == "–"


def test_options_that_differ_are_told_from_those_in_common(found: Results) -> None:
    differ, common = tables.configuration(found)
    assert {"method", "seed", "beta", "lambda_mean", "init_weights"} <= set(differ.header)
    assert ["epochs", "2"] in common.rows
    assert not {row[0] for row in common.rows} & set(differ.header)


def test_the_weight_that_training_really_had(found: Results) -> None:
    table = tables.weights(found.groups[0])
    assert table is not None
    assert cell_of(table, "TRADES (beta 4)", "mean over training") == "4.00 ± 0.00"
    assert cell_of(table, "D-TRADES (lambda_mean 4)", "mean over training") == "2.75 ± 0.25"
    assert cell_of(table, "D-TRADES (lambda_mean 4)", "mean in the last epoch") == "3.25 ± 0.25"
    assert [row for row in table.rows if "AT" in row[0]] == []


def test_what_an_attack_has_broken_is_broken_at_its_radius(found: Results) -> None:
    """Searches for the smallest norm found up to 0.48; the attacks broke point 0 and those from ``ra`` to ``na``."""
    expected = []
    for seed in range(3):
        na, ra = 32 + seed, 12 + seed
        norms = [0.1 + 0.01 * i for i in range(POINTS - 1)] + [1.0]
        expected.append(np.mean([min(v, 0.3) if i == 0 or ra <= i < na else v for i, v in enumerate(norms)]))
    table = accuracies(found.groups[0], "main", "last")
    assert table is not None
    deviation = np.std(expected, ddof=1)
    assert cell_of(table, "TRADES (beta 4)", "APN Linf") == f"{np.mean(expected):.3f} ± {deviation:.3f}"


def test_all_other_figures_are_compared_too(found: Results) -> None:
    (group,) = found.groups
    headlines, rest = (tables.comparison(group, "dtrades", "last", headlines=which) for which in (True, False))
    assert headlines is not None
    assert rest is not None
    pair = "D-TRADES (lambda_mean 4) − TRADES (beta 4)"
    assert [row[1] for row in headlines.rows if row[0] == pair] == ["NA", "RA worst", "RA worst class", "APN Linf"]
    assert [row[1] for row in rest.rows if row[0] == pair] == ["RA fgsm", "RA pgd20", "RD", "ASR of correct"]
    (drop,) = [row for row in rest.rows if row[:2] == [pair, "RD"]]
    assert drop[2:4] == ["-13.3", "-16.9 to -9.7"]
    assert re.fullmatch(r"-\d+\.\d to -\d+\.\d", drop[4])
    (norm,) = [row for row in headlines.rows if row[:2] == [pair, "APN Linf"]]
    assert re.fullmatch(r"[+-]0\.\d+ to [+-]0\.\d+", norm[4])  # over images, too


# ---- what is not alike is not mixed ----------------------------------------------------------------------------------


def changed(study: Study, runs: Path, target: Path, change: Callable[[Cell, Path], None]) -> Results:
    """The study with something changed in the folders of its cells."""
    shutil.copytree(runs, target, ignore=shutil.ignore_patterns("report"))
    for cell in study.cells:
        change(cell, target / cell.name)
    return load(study, target)


def add_records(folder: Path, *records: dict[str, Any]) -> None:
    kept = json.loads((folder / "eval.json").read_text())
    kept["evaluations"] = [*records, *kept["evaluations"]]
    (folder / "eval.json").write_text(json.dumps(kept))


def of_attack(cell: Cell, name: str, points: int = POINTS, epsilon: str = "0.3") -> dict[str, Any]:
    record = evaluation(cell, "last")
    attacks = {name: {"ra": 0.1, "correct": flags(4)[:points]}}
    cut = {key: record[key][:points] for key in ("ids", "labels", "correct")}
    return {**record, **cut, "points": points, "epsilon": epsilon, "attacks": attacks}


def test_points_and_radii_are_not_mixed(study: Study, runs: Path, found: Results, tmp_path: Path) -> None:
    """One seed was evaluated on fewer points, and at a smaller radius, too."""

    def change(cell: Cell, folder: Path) -> None:
        if cell.seed == 0:
            smaller = of_attack(cell, "pgd20", epsilon="0.1"), of_attack(cell, "square", points=20)
            add_records(folder, *smaller)

    (group,) = changed(study, runs, tmp_path / "runs", change).groups
    assert group.bases == found.groups[0].bases
    for part in group.parts:
        assert accuracies(group, part, "last") == accuracies(found.groups[0], part, "last")
    shown = [tables.accuracies(group, "main", "last", basis, i) for i, basis in enumerate(group.other_bases("last"), 1)]
    assert {table.caption.split(": ")[0] for table in shown if table is not None} == {
        "resnet18 on mnist5k, main, last epoch, Linf 0.3, 20 test images",
        "resnet18 on mnist5k, main, last epoch, Linf 0.1, 40 test images",
    }
    for table in shown:
        assert table is not None
        assert {row[-1] for row in table.rows} == {"1"}
    assert len({table.name for table in shown if table is not None}) == 2


def test_differences_under_other_conditions_name_no_winner(study: Study, runs: Path, tmp_path: Path) -> None:
    """All runs of the main part were attacked at a smaller radius, too, under which TRADES is far lower."""

    def change(cell: Cell, folder: Path) -> None:
        if cell.part == "main":
            stand = 30 + cell.seed - 20 * (cell.method == "trades")
            record = of_attack(cell, "pgd20", epsilon="0.1")
            add_records(folder, {**record, "attacks": {"pgd20": {"ra": stand / POINTS, "correct": flags(stand)}}})

    made = changed(study, runs, tmp_path / "runs", change)
    (group,) = made.groups
    usual, other = (tables.comparison(group, "dtrades", "last", number=number) for number in (0, 1))
    assert usual is not None
    assert other is not None
    assert usual.name != other.name
    assert "higher" in usual.header
    assert "higher" not in other.header
    assert other.caption.startswith("resnet18 on mnist5k, last epoch, Linf 0.1, 40 test images: paired")
    assert "RA worst is that under pgd20 here: no winner is named by it" in other.caption
    pair = "D-TRADES (lambda_mean 4) − TRADES (beta 4)"
    assert [row[1] for row in other.rows if row[0] == pair] == ["NA", "RA worst", "RA worst class"]
    (worst,) = [row for row in other.rows if row[:2] == [pair, "RA worst"]]
    assert worst[2] == "+50.0"
    for number, table in ((0, usual), (1, other)):
        assert table.caption.count(group.basis("last", number).words) == 1
    assert cli.main(["report", str(study.path), "--runs-dir", str(tmp_path / "runs")]) == 0
    text = (tmp_path / "runs" / "report" / "results.md").read_text()
    assert "<summary>The same on Linf 0.1, 40 test images: resnet18 on mnist5k</summary>" in text


def test_attacks_of_some_runs_stand_beside_what_the_same_runs_had(study: Study, runs: Path, tmp_path: Path) -> None:
    def change(cell: Cell, folder: Path) -> None:
        kept = json.loads((folder / "eval.json").read_text())
        if cell.seed == 0 and cell.method == "trades":
            kept["evaluations"][1]["attacks"]["square"] = {"ra": 0.1, "correct": flags(4)}
            (folder / "eval.json").write_text(json.dumps(kept))

    (group,) = changed(study, runs, tmp_path / "runs", change).groups
    basis = group.bases["last"]
    assert basis.attacks == ("fgsm", "pgd20")
    usual, other = accuracies(group, "main", "last"), tables.other_attacks(group, "last", basis)
    assert usual is not None
    assert "RA square" not in usual.header
    assert other is not None
    assert [row for row in other.rows if row[0] == "TRADES (beta 4)"] == [
        ["TRADES (beta 4)", "square", "10.0", "27.5", "1"]  # not the mean over all seeds
    ]
    assert tables.other_attacks(group, "best", group.bases["best"]) is None


def test_transfer_is_reported(study: Study, runs: Path, tmp_path: Path) -> None:
    entry = {"sources": ["another", "a twin"], "relations": [["labels"], ["queries"]], "ra": [[0.5], [0.25]]}

    def change(cell: Cell, folder: Path) -> None:
        if cell.seed == 0 and cell.method == "at":
            add_records(folder, {**of_attack(cell, "square", points=20), "transfer": {"pgd20": entry}})

    made = changed(study, runs, tmp_path / "runs", change)
    table = tables.transfers(made.groups[0], "last")
    assert table is not None
    assert table.rows == [
        ["PGD-AT", "0", "another", "labels", "pgd20", "50.0"],
        ["PGD-AT", "0", "a twin", "queries", "pgd20", "25.0"],
    ]
    assert tables.transfers(made.groups[0], "best") is None


def test_what_looks_masked_is_marked_wherever_it_counts(found: Results) -> None:
    (group,) = found.groups
    table = accuracies(group, "main", "last")
    assert table is not None
    assert [row[0] for row in table.rows if "†" in row[0]] == ["FAAL †"]
    assert table.caption.endswith(results.MARK_EXPLAINED)
    assert cell_of(table, "TRADES (beta 4)", "RA worst by seed") == "27.5, 30.0, 32.5"
    trade_off = tables.trade_offs(group, "last")
    assert trade_off is not None
    assert [row[0] for row in trade_off.rows if "†" in row[0]] == ["FAAL †"]
    compared = tables.comparison(group, "dtrades", "last")
    assert compared is not None
    pairs = {row[0] for row in compared.rows if "†" in row[0]}
    assert pairs == {f"D-TRADES (lambda_mean {mean}) − FAAL †" for mean in (1, 4)}
    assert compared.caption.endswith(results.MARK_EXPLAINED)
    lines = [line for line in comparisons.in_words(group, "dtrades", "last") if "FAAL" in line]
    assert lines
    assert all("FAAL †" in line for line in lines)


def test_an_evaluation_more_of_one_run_takes_nothing_from_the_others(
    study: Study, runs: Path, found: Results, tmp_path: Path
) -> None:
    """Stored by itself, since it was made otherwise; its attack stands beside those that all runs share."""

    def change(cell: Cell, folder: Path) -> None:
        if cell.seed == 0 and cell.method == "trades":
            attacks = {name: {"ra": 0.1, "correct": flags(4)} for name in ("autoattack", "square", "apgd-t")}
            add_records(folder, {**of_attack(cell, "autoattack"), "attacks": attacks})

    (group,) = changed(study, runs, tmp_path / "runs", change).groups
    assert group.bases == found.groups[0].bases
    assert accuracies(group, "main", "last") == accuracies(found.groups[0], "main", "last")
    other = tables.other_attacks(group, "last", group.bases["last"])
    assert other is not None
    assert [row[1:] for row in other.rows if row[0] == "TRADES (beta 4)"] == [
        [name, "10.0", "27.5", "1"] for name in ("autoattack", "square", "apgd-t")
    ]
    assert tables.comparison(group, "dtrades", "last") == tables.comparison(found.groups[0], "dtrades", "last")
    (trades,) = [row for row in group.rows if row.name == "TRADES (beta 4)"]
    points = comparisons.per_point(trades.results[0], "last", group.bases["last"], "RA square")
    assert points is not None
    assert points.mean() == 10


def test_a_damaged_start_leaves_the_report(study: Study, runs: Path, tmp_path: Path) -> None:
    def change(cell: Cell, folder: Path) -> None:
        if cell.name == study.cells[-1].start:
            (folder / "metrics.jsonl").write_text("{\n" + (folder / "metrics.jsonl").read_text())

    made = changed(study, runs, tmp_path / "runs", change)
    assert [name for name, state in made.states.items() if state.status == "failed"] == [study.cells[-1].start]
    (faal,) = [row for row in made.groups[0].rows if row.method == "faal"]
    assert [result.before for result in faal.results.values()].count(None) == 1


def test_a_seed_without_the_evaluation_is_left_out(study: Study, runs: Path, tmp_path: Path) -> None:
    """The first one of them, of other points than the rest."""

    def change(cell: Cell, folder: Path) -> None:
        if cell.seed == 0:
            kept = json.loads((folder / "eval.json").read_text())
            kept["evaluations"] = [of_attack(cell, "pgd20", points=20)]
            (folder / "eval.json").write_text(json.dumps(kept))

    (group,) = changed(study, runs, tmp_path / "runs", change).groups
    worst = [d for d in comparisons.differences(group, "dtrades", "last") if d.name == "worst class"]
    assert worst
    assert {d.over_seeds.count for d in worst} == {2}
    assert all(d.over_points is not None for d in worst)


def test_the_worst_class_has_an_interval_over_images(found: Results) -> None:
    """Which class is the worst changes with the points: of 12 that stand, any four classes may lose some."""
    (group,) = found.groups
    differences = comparisons.differences(group, "dtrades", "last")
    pair = ("D-TRADES (lambda_mean 4)", "TRADES (beta 4)")
    (one,) = [d for d in differences if d.name == "worst class" and (d.ours.name, d.theirs.name) == pair]
    assert one.over_points is not None
    assert one.over_points.mean == pytest.approx(one.over_seeds.mean)
    assert one.over_points.low < one.over_points.mean < one.over_points.high


def test_a_worst_class_in_which_nothing_stands_has_no_interval_over_images(
    study: Study, runs: Path, tmp_path: Path
) -> None:
    """Drawn points cannot take it below 0, and would show a difference to it as certain."""

    def change(cell: Cell, folder: Path) -> None:
        if cell.method == "trades" and cell.seed == 1:
            kept = json.loads((folder / "eval.json").read_text())
            for record in kept["evaluations"]:
                for attack in record["attacks"].values():
                    stand = [c if label else "0" for c, label in zip(attack["correct"], record["labels"], strict=True)]
                    attack["correct"] = "".join(stand)
            (folder / "eval.json").write_text(json.dumps(kept))

    (group,) = changed(study, runs, tmp_path / "runs", change).groups
    worst = [d for d in comparisons.differences(group, "dtrades", "last") if d.name == "worst class"]
    of_trades = [d for d in worst if d.theirs.method == "trades"]
    assert of_trades
    for each in of_trades:
        assert each.over_points is None
        assert each.winner == "not resolved"
    assert [d for d in worst if d.over_points is not None]
    table = tables.comparison(group, "dtrades", "last")
    assert table is not None
    assert "A worst class in which nothing stands has no interval over images." in table.caption


def test_where_cells_ran_is_told_with_their_commits(study: Study, runs: Path, tmp_path: Path) -> None:
    """Also those of the evaluation, of local changes, and of a run that went on elsewhere."""

    def change(cell: Cell, folder: Path) -> None:
        if cell.name == study.cells[0].name:
            env = json.loads((folder / "env.json").read_text())
            resumed = [{"commit": "fedcba9876543210", "device": "another"}]
            (folder / "env.json").write_text(json.dumps({**env, "resumed": resumed}))

    table = tables.environments(changed(study, runs, tmp_path / "runs", change))
    versions = "python 3.12, torch 2.14"
    assert table.rows == [
        ["abc, then fedcba9876", "0123456789-dirty", "1", "Linux", "cpu, then another", "C++", "1", versions],
        ["abc", "0123456789-dirty", str(len(study.cells) - 1), "Linux", "cpu", "C++", "1", versions],
    ]


def test_runs_of_different_length_are_drawn(study: Study, runs: Path, tmp_path: Path) -> None:
    """And fine-tuning begins where the network that it started from ended."""

    def change(cell: Cell, folder: Path) -> None:
        if cell.seed == 0:
            lines = [json.dumps(epoch_line(cell, epoch)) for epoch in (1, 2, 3)]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    (group,) = changed(study, runs, tmp_path / "runs", change).groups
    ax = figures.training(group).axes[0]
    drawn = {str(line.get_label()): np.asarray(line.get_xdata()).tolist() for line in ax.lines}
    assert drawn["PGD-AT"] == [1, 2]
    assert drawn["FAAL"] == [3, 4]
    figures.weights(figures.with_lambda(group))


def test_no_worst_case_without_an_attack_in_common(study: Study, runs: Path, tmp_path: Path) -> None:
    def change(cell: Cell, folder: Path) -> None:
        kept = json.loads((folder / "eval.json").read_text())
        kept["evaluations"] = [of_attack(cell, f"pgd{cell.seed}")]
        (folder / "eval.json").write_text(json.dumps(kept))

    (group,) = changed(study, runs, tmp_path / "runs", change).groups
    table = accuracies(group, "main", "last")
    assert table is not None
    assert table.header == ["method", "NA", "RA pgd0", "RA pgd1", "RA pgd2", "seeds"]
    assert "RA worst" not in table.caption
    assert cell_of(table, "PGD-AT", "RA pgd1") == "10.0 (1 of 3 seeds)"
    assert tables.trade_offs(group, "last") is None
    assert tables.by_class(group, "last") == {}  # which would be that of clean images


def test_time_before_needs_the_whole_training_before(study: Study, runs: Path, tmp_path: Path) -> None:
    """Two networks that FAAL starts from are being trained again."""

    def change(cell: Cell, folder: Path) -> None:
        if cell.method == "trades" and cell.seed > 0:
            (folder / "metrics.jsonl").write_text(json.dumps(epoch_line(cell, 1)) + "\n")

    (group,) = changed(study, runs, tmp_path / "runs", change).groups
    (faal,) = [row for row in group.rows if row.method == "faal"]
    times = [results.figures(result, "last", None).get("minutes") for result in faal.results.values()]
    assert times == [4, None, None]
    assert cell_of(tables.times(group), "FAAL", "with the network that it started from") == "4.0"


def test_cells_of_other_data_are_named(study: Study, runs: Path, tmp_path: Path) -> None:
    def change(cell: Cell, folder: Path) -> None:
        if cell.name == study.cells[1].name:
            env = json.loads((folder / "env.json").read_text())
            (folder / "env.json").write_text(json.dumps({**env, "data": {"fingerprint": "letters"}}))

    made = changed(study, runs, tmp_path / "runs", change)
    assert made.other_data == [study.cells[1].name]
    shown = list(progress(made))
    assert f"other data than the rest of their group: {study.cells[1].name}" in str(shown[-1])


def test_protocols_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Published conditions are reported beside the common ones, and name no winner."""
    text = FILE.replace("{method: at}", "{method: at, protocol: [common, published]}")
    text = text.replace("{method: dtrades, lambda_mean: [1, 4]}", "{method: dtrades, protocol: [common, published]}")
    file = tmp_path / "two.yaml"
    file.write_text(re.sub(r"  - {(method: faal|.*ablation).*\n", "", text))
    study, runs = read(file), tmp_path / "runs"
    for cell in study.cells:
        finish(cell, runs)
    assert cli.main(["report", str(file), "--runs-dir", str(runs), "--no-gallery"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "D-TRADES" in line]
    assert said
    assert all(line.startswith("resnet18 on mnist5k, ") for line in said)
    assert not any("published" in line for line in said)
    page = Page((runs / "report" / "index.html").read_text())
    ids = [str(attrs["id"]) for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    text = (runs / "report" / "results.md").read_text()
    captions = [line for line in text.splitlines() if line.startswith("resnet18 on mnist5k")]
    assert len(captions) == len(set(captions))
    assert "resnet18 on mnist5k, published conditions, last epoch, Linf 0.3, 40 test images: paired differences" in text
    assert "they name no winner" in text


def test_a_setting_without_options_has_a_name_on_the_front(tmp_path: Path) -> None:
    file = tmp_path / "default.yaml"
    file.write_text(
        "defaults: {preset: quick, dataset: mnist5k, arch: resnet18, epochs: 2}\n"
        "runs: [{method: [trades, dtrades]}, {part: weights, method: trades, beta: [1, 4]}]\n"
        "evaluations: [{attacks: [fgsm, pgd20], limit: 40, checkpoint: [best, last]}]\n"
    )
    runs = tmp_path / "runs"
    for cell in read(file).cells:
        finish(cell, runs)
    (group,) = load(read(file), runs).groups
    ax = figures.trade_off(group, "last").axes[0]
    assert [text.get_text() for text in ax.texts] == ["default", "1", "4"]


# ---- half a study ----------------------------------------------------------------------------------------------------


def test_an_unfinished_study_says_so(study: Study, runs: Path, tmp_path: Path) -> None:
    part = tmp_path / "part"
    for cell in study.cells[:5]:
        shutil.copytree(runs / cell.name, part / cell.name)
    broken = study.cells[5]
    shutil.copytree(runs / broken.name, part / broken.name)
    content = json.loads((part / broken.name / "cell.json").read_text())
    (part / broken.name / "cell.json").write_text(
        json.dumps({**content, "evaluated": [], "status": "failed", "error": "no memory"})
    )
    out = tmp_path / "out"
    assert cli.main(["report", str(study.path), "--runs-dir", str(part), "--output", str(out)]) == 0
    text = (out / "results.md").read_text()
    assert f"Not finished: 5 of {len(study.cells)} cells are, the last one on 2026-01-0" in text
    assert f"1 failed, {len(study.cells) - 6} are missing" in text
    assert f"{broken.name}: no memory" in text
    assert not (part / "report").exists()


def test_nothing_to_report(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(study.path), "--runs-dir", str(tmp_path)]) == 1
    assert "no cell of" in capsys.readouterr().err


# ---- files -----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that every tag is closed in order, and collects what matters."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_needs_nothing_else(report: Path) -> None:
    text = (report / "index.html").read_text()
    page = Page(text)
    assert "Made up, with 50 % &amp; more &lt;of everything&gt;." in text
    for image in page.all("img"):
        assert str(image["src"]).startswith("data:image/png;base64,")
        assert len(str(image["alt"])) > 20
    assert len(page.all("img")) == 6  # trade-off of both epochs, training, lambda, classes, radii
    assert not page.all("script")
    assert all(str(link["href"]).startswith("data:") for link in page.all("link"))
    assert "url(" not in text
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    ids = [str(attrs["id"]) for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(a["href"]).removeprefix("#") for a in page.all("a")} <= set(ids)
    assert page.all("html")[0]["lang"] == "en"
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    assert len(page.all("figcaption")) == len(page.all("figure")) == len(page.all("table")) + len(page.all("img"))


def test_all_formats_hold_the_same_tables(report: Path) -> None:
    text, page = (report / "results.md").read_text(), (report / "index.html").read_text()
    files = sorted((report / "tables").glob("*.tex"))
    assert len(files) == page.count("<table>") == len(re.findall(r"^\| ---", text, re.MULTILINE))
    for link in re.findall(r"\]\((figures/.*?)\)", text):
        assert (report / link).read_bytes().startswith(b"\x89PNG")
    assert sorted(re.findall(r"figures/(.*?)\.png", text)) == sorted(p.stem for p in (report / "figures").iterdir())
    for file in files:
        source = file.read_text()
        body = source[source.index(r"\toprule") : source.index(r"\bottomrule")]
        widths = re.search(r"begin{tabular}{((?:[lr]|p{.*?})*)}", source)[1]  # type: ignore[index]
        columns = len(re.sub("p{.*?}", "p", widths))
        for line in [line for line in body.splitlines() if line.endswith(r"\\")]:
            assert len(re.findall(r"(?<!\\)&", line)) == columns - 1
        assert source.count(r"\begin{") == source.count(r"\end{") == 2
        assert not re.search(r"(?<!\\)[%#]|(?<!\\)_(?![a-z]*})", re.sub(r"\\label{.*?}", "", source)), file.name


def test_words_are_escaped() -> None:
    table = Table("t", "50 % & more_of {it} ~^\\", ["a_b", "x"], [["λ ± 3", "a|b"]])
    source = latex(table)
    assert r"50 \% \& more\_of \{it\} \textasciitilde{}\textasciicircum{}\textbackslash{}" in source
    assert r"$\lambda$ $\pm$ 3" in source
    assert r"| λ ± 3 | a\|b |" in markdown("T", [table])


def test_numbers_can_be_read_again(report: Path, study: Study) -> None:
    lines = list(csv.DictReader((report / "results.csv").open()))
    assert {line["cell"] for line in lines} == {cell.name for cell in study.cells}
    values = [float(x["value"]) for x in lines if (x["method"], x["checkpoint"], x["figure"]) == ("at", "last", "NA")]
    assert values == [75.0, 75.0, 75.0]
    (mean,) = [
        line
        for line in csv.DictReader((report / "summary.csv").open())
        if (line["method"], line["checkpoint"], line["figure"]) == ("at", "last", "NA")
    ]
    assert (float(mean["mean"]), float(mean["deviation"]), mean["seeds"]) == (75, 0, "3")


def test_a_report_is_the_same_each_time(report: Path, study: Study, runs: Path, tmp_path: Path) -> None:
    cli.main(["report", str(study.path), "--runs-dir", str(runs), "--output", str(tmp_path)])
    for path in (p for p in report.rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / path.relative_to(report)).read_bytes(), path.name


def test_adversarial_images_of_trained_networks(tmp_path: Path) -> None:
    """Of a real run; that of the others says why there are none."""
    images = tiny_run.images(tmp_path / "images")
    file = tmp_path / "real.yaml"
    file.write_text(
        f"defaults: {{dataset: 'folder:{images}', arch: smallcnn, width: 2, batch_size: 8, epochs: 1, steps: 2}}\n"
        "runs: [{method: [trades, at]}]\n"
        "evaluations: [{attacks: fgsm, checkpoint: [best, last]}]\n"
    )
    runs = tmp_path / "runs"
    for cell in read(file).cells:
        cells.run(cell, runs, Machine("cpu", 1))
    (runs / read(file).cells[1].name / "model.safetensors").unlink()
    assert cli.main(["report", str(file), "--runs-dir", str(runs)]) == 0
    text = (runs / "report" / "results.md").read_text()
    assert re.search(r"!\[Clean images, perturbations and adversarial images; \d of \d fool TRADES\]", text)
    assert "no adversarial images of PGD-AT: " in text


# ---- a browser -------------------------------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0")
MEASURE = "<script>document.title = document.documentElement.scrollWidth + ' of ' + window.innerWidth</script></body>"


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """What the browser prints, and its log."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser: {', '.join(BROWSERS)}")
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "LANG": "C"})
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.mark.parametrize("width", [500, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(report: Path, tmp_path: Path, width: int) -> None:
    """500 pixels are the narrowest window that headless Chromium makes."""
    page = tmp_path / "page.html"
    page.write_text((report / "index.html").read_text().replace("</body>", MEASURE))
    shown, log = browse(page, tmp_path / "profile", f"--window-size={width},900", "--dump-dom")
    needed, there = map(int, re.search(r"<title>(\d+) of (\d+)</title>", shown).groups())  # type: ignore[union-attr]
    assert there <= width
    assert needed <= there
    assert "CONSOLE" not in log


def test_a_browser_prints_it(report: Path, tmp_path: Path) -> None:
    target = tmp_path / "page.pdf"
    browse(report / "index.html", tmp_path / "profile", f"--print-to-pdf={target}")
    assert target.read_bytes().startswith(b"%PDF")
