"""Tables and rows of an evaluation: no accuracy stands without the ball that it belongs to."""

from __future__ import annotations

from typing import Any

import pytest

from dtrades_fast.evaluation import report


def record(norm: str, epsilon: str) -> dict[str, Any]:
    robustness = {"ra": 0.5, "rd": 0.4, "asr_all": 0.4, "asr_correct": 0.44, "per_class": {"cat": 0.5}}
    worst = {"worst_class": "cat", "worst_class_ra": 0.5, "spread": 0.0}
    return {
        **{"run": "demo", "checkpoint": "best", "dataset": "cats", "split": "test", "points": 9},
        **{"norm": norm, "epsilon": epsilon, "na": 0.9, "per_class": {"cat": 0.9}, "minimum_norm": {}},
        "attacks": {"fgsm": {**robustness, **worst}},
        "transfer": {"pgd20": {"sources": ["twin"], "relations": [["grey box"]], "ra": [[0.6]]}},
        "verdict": {"verdict": "healthy"},
    }


@pytest.mark.parametrize(
    ("norm", "epsilon", "ball"), [("linf", "8/255", "Linf epsilon 8/255"), ("l2", "0.5", "L2 epsilon 0.5")]
)
def test_the_ball_is_named(norm: str, epsilon: str, ball: str) -> None:
    one = record(norm, epsilon)
    for view in (report.table([one]), report.class_table(one), report.transfer_table(one)):
        assert ball in str(view.title)
    assert ball in report.markdown(one)


def test_rows_of_different_balls_are_told_apart() -> None:
    by_norm = report.table([record("linf", "0.5"), record("l2", "0.5")])
    assert list(by_norm.columns[3].cells) == ["fgsm Linf 0.5", "fgsm L2 0.5"]
    by_radius = report.table([record("l2", "0.5"), record("l2", "1")])
    assert list(by_radius.columns[3].cells) == ["fgsm 0.5", "fgsm 1"]
    assert "L2 epsilon 0.5, L2 epsilon 1" in str(by_radius.title)
