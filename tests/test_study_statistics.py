"""What is said of seeds and points is what statistics textbooks say."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from dtrades_fast.study import statistics
from dtrades_fast.study.statistics import (
    Interval,
    area_under_front,
    at_equal,
    bootstrap,
    difference_at_weight,
    difference_of_fronts,
    harmonic,
    in_common,
    paired,
    pareto,
    resampled,
    rounded,
    summary,
    verdict,
)


def seeded(values: list[float]) -> dict[int, float]:
    return dict(enumerate(values))


def test_summary() -> None:
    found = summary([1, 2, 6])
    assert (found.mean, found.count) == (3, 3)
    assert found.deviation == pytest.approx(math.sqrt(7))
    assert math.isnan(summary([5]).deviation)
    for bad in ([], [1, math.nan]):
        with pytest.raises(ValueError, match="a summary needs finite values"):
            summary(bad)


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    ours, theirs = [50.1, 51.3, 49.0, 52.2], [48.0, 50.9, 48.8, 49.9]
    found = paired(seeded(ours), seeded(theirs))
    theirs_interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(theirs_interval))
    assert found.mean == pytest.approx(1.25)
    assert (found.count, found.dropped) == (4, 0)
    assert paired(seeded(ours), seeded(theirs), 0.5).high < found.high


def test_pairs_are_the_seeds_that_both_have() -> None:
    found = paired({0: 5.0, 2: 9.0, 3: 1.0}, {0: 4.0, 1: 7.0, 2: 6.0})
    assert (found.mean, found.count, found.dropped) == (2.0, 2, 2)
    with pytest.raises(ValueError, match=r"no seed in common: \[0\] and \[1\]"):
        paired({0: 1.0}, {1: 1.0})


def test_one_seed_resolves_nothing() -> None:
    found = paired({0: 99.0}, {0: 1.0})
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert not found.resolved
    assert found.needed is None


def test_seeds_that_do_not_vary() -> None:
    found = paired(seeded([2, 3.1]), seeded([1, 2.1]))  # the same but for rounding
    assert (found.low, found.high, found.needed) == (1, 1, None)
    assert not found.resolved
    assert verdict(found, "A", "B") == (
        "not resolved: A minus B +1.0 points with each of 2 seeds, from which their spread cannot be told"
    )
    same = paired(seeded([2, 3]), seeded([2, 3]))
    assert (same.resolved, same.needed) == (False, None)


@pytest.mark.parametrize("mean", [0.2, -0.7, 2.0])
def test_needed_seeds_are_the_fewest(mean: float) -> None:
    """With them, the interval of such differences excludes zero four times in five; with one fewer less often."""
    found = paired(seeded([mean - 1, mean, mean + 1]), seeded([0, 0, 0]))
    assert found.needed is not None
    assert statistics.power(mean, 1, found.needed, 0.95) >= 0.8
    assert found.needed == 2 or statistics.power(mean, 1, found.needed - 1, 0.95) < 0.8


def test_power_is_what_simulations_give() -> None:
    random = np.random.default_rng(0)
    x = random.normal(0.8, 1, size=(20_000, 12))
    t = x.mean(1) / (x.std(1, ddof=1) / math.sqrt(12))
    simulated = (t > stats.t.ppf(0.975, 11)).mean()
    assert statistics.power(0.8, 1, 12, 0.95) == pytest.approx(simulated, abs=0.01)


def test_too_many_seeds_are_not_named() -> None:
    found = paired(seeded([1.0, -1.0, 1e-6]), seeded([0.0, 0.0, 0.0]))
    assert found.needed is None


# ---- bootstrap -------------------------------------------------------------------------------------------------------


def test_the_bootstrap_is_about_as_wide_as_theory_says() -> None:
    """Of one network against another on 400 points: a mean of independent differences."""
    random = np.random.default_rng(1)
    a, b = random.random((1, 400)) < 0.6, random.random((1, 400)) < 0.5
    found, differences = bootstrap(a, b), (a.astype(float) - b)[0]
    half = 1.96 * differences.std() / math.sqrt(400)
    assert found.mean == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half), abs=0.006)
    again = bootstrap(a, b)
    assert again == found


def test_the_bootstrap_covers() -> None:
    random, hits = np.random.default_rng(2), 0
    for _ in range(200):
        a, b = random.random((1, 100)) < 0.7, random.random((1, 100)) < 0.5
        found = bootstrap(a, b, resamples=400)
        hits += found.low <= 0.2 <= found.high
    assert 0.90 <= hits / 200 <= 0.99


def test_points_are_drawn_alike_for_all_seeds_and_both_methods() -> None:
    """A difference that is the same on every point has no uncertainty, however points vary."""
    a = np.random.default_rng(3).random((3, 50))
    found = bootstrap(a + 0.25, a)
    assert (found.low, found.high) == pytest.approx((0.25, 0.25))


def test_what_the_bootstrap_refuses() -> None:
    with pytest.raises(ValueError, match=r"same seeds and points, got \[2, 3\] and \[1, 3\]"):
        bootstrap(np.ones((2, 3)), np.ones((1, 3)))
    with pytest.raises(ValueError, match="1 of 3 points have no result"):
        bootstrap([[1, math.nan, 0]], [[1, 1, 0]])


# ---- verdict ---------------------------------------------------------------------------------------------------------


def test_no_winner_where_the_interval_contains_zero() -> None:
    clear = paired(seeded([50.0, 51.0, 50.5]), seeded([47.0, 48.2, 47.4]))
    said = f"A is 3.0 points above B (95 % interval +{clear.low:.1f} to +{clear.high:.1f}, 3 seeds; "
    said += "+1.0 to +5.0 over test images)"
    assert verdict(clear, "A", "B", points=Interval(3, 1, 5)) == said
    flipped = paired(seeded([47.0, 48.2, 47.4]), seeded([50.0, 51.0, 50.5]))
    assert verdict(flipped, "B", "A", points=Interval(-3, -5, -1)) == said
    unknown = verdict(clear, "A", "B")
    assert unknown.startswith("not resolved: A minus B +3.0 points (95 % interval +")
    assert unknown.endswith("; nothing is known of other test images)")
    open_question = paired(seeded([50.0, 53.0, 47.0]), seeded([49.0, 49.0, 49.5]))
    said = verdict(open_question, "A", "B")
    assert said.startswith("not resolved: A minus B +0.8 points (95 % interval -")
    assert open_question.needed is not None
    assert f"; about {rounded(open_question.needed)} seeds for a power of 80 %" in said
    images_too = verdict(open_question, "A", "B", points=Interval(0.8, -1, 3))
    assert f"; about {rounded(open_question.needed)} seeds and more images for a power of 80 %" in images_too
    assert "more images" not in verdict(open_question, "A", "B", points=Interval(0.8, 0.1, 1.5))
    assert verdict(paired({0: 3.0}, {0: 1.0}), "A", "B") == "not resolved: A minus B +2.0 points, one seed"
    assert verdict(paired({0: 3.0}, {0: 1.0, 1: 2.0}), "A", "B").endswith(", one seed in common")
    assert "there is no difference to resolve" in verdict(paired(seeded([1, 0]), seeded([0, 1])), "A", "B")
    faint = paired(seeded([1.0, -1.0, 1e-6]), seeded([0, 0, 0]))
    assert "more than 10,000 seeds" in verdict(faint, "A", "B")


def test_no_winner_where_other_test_images_might_not_agree() -> None:
    found = paired(seeded([50.0, 51.0, 50.5]), seeded([47.0, 48.2, 47.4]))
    assert "above" in verdict(found, "A", "B", points=Interval(3.0, 0.5, 5.5))
    said = verdict(found, "A", "B", points=Interval(3.0, -0.5, 6.5))
    assert said.startswith("not resolved: A minus B +3.0 points (95 % interval +2.")
    assert said.endswith("; but -0.5 to +6.5 over test images, of which more would be needed)")


def test_a_difference_is_not_rounded_to_nothing() -> None:
    found = paired(seeded([0.0101, 0.0102, 0.0103]), seeded([0.0, 0.0, 0.0]))
    said = verdict(found, "A", "B", "", 1, Interval(0.01, 0.005, 0.015))
    assert said.startswith("A is 0.01 above B (95 % interval +0.01 to +0.01")


# ---- trade-offs ------------------------------------------------------------------------------------------------------


def test_harmonic_mean() -> None:
    assert harmonic(60, 30) == pytest.approx(stats.hmean([60, 30]))
    assert harmonic(0, 0) == 0
    assert harmonic(80, 0) == 0


def test_pareto() -> None:
    points = [(90, 10), (80, 40), (70, 40), (60, 50), (60, 50), (50, 45)]
    assert pareto(points) == [0, 1, 3, 4]
    assert pareto([(1, 1)]) == [0]


def test_the_area_is_the_share_that_chance_hits() -> None:
    points = [(90.0, 10.0), (80.0, 40.0), (60.0, 50.0), (40.0, 30.0)]
    thrown = 100 * np.random.default_rng(0).random((200_000, 2))
    hit = np.any([(thrown[:, 0] <= na) & (thrown[:, 1] <= ra) for na, ra in points], axis=0).mean()
    assert area_under_front(points) == pytest.approx(hit, abs=0.005)
    assert area_under_front([(0.5, 0.5)], scale=1) == 0.25
    assert area_under_front(points) == area_under_front(points[::-1])


def test_fronts_are_compared_at_equal_clean_accuracy() -> None:
    front = [(90.0, 10.0), (80.0, 40.0), (60.0, 50.0), (70.0, 20.0)]  # the last one is exceeded
    assert at_equal(front, [60, 70, 85, 90]).tolist() == [50, 45, 25, 10]
    assert at_equal(front, 59) == 50  # its lowest point has more clean accuracy than that
    assert np.isnan(at_equal(front, 91))
    shifted = [(na, ra + 3) for na, ra in front]
    assert difference_of_fronts(shifted, front) == pytest.approx(3)
    assert difference_of_fronts(front, shifted) == pytest.approx(-3)
    assert difference_of_fronts([(20.0, 20.0)], front) is None
    assert difference_of_fronts([(70.0, 20.0)], front) == 20 - 45  # at the one clean accuracy
    assert in_common([(95.0, 0.0), (65.0, 40.0)], front) == (65, 90)
    dominant = [(98.0, 80.0), (97.0, 70.0)]  # one setting exceeds the other
    assert difference_of_fronts(dominant, [(98.0, 40.0), (97.0, 60.0)]) == pytest.approx(80 - 50)
    lower = difference_of_fronts([(95.0, 0.0), (65.0, 40.0)], front)
    na = np.linspace(65, 90, 20_001)
    expected = (np.interp(na, [65, 95], [40, 0]) - np.interp(na, [60, 80, 90], [50, 40, 10])).mean()
    assert lower == pytest.approx(expected, abs=0.05)


def test_settings_are_compared_at_equal_weight() -> None:
    theirs = [(1.0, 30.0), (4.0, 50.0), (16.0, 60.0)]
    assert difference_at_weight([(2.0, 45.0), (8.0, 50.0)], theirs) == pytest.approx(((45 - 40) + (50 - 55)) / 2)
    assert difference_at_weight([(2.0, 45.0), (20.0, 99.0)], theirs) == pytest.approx(5)  # 20 is beyond theirs
    assert difference_at_weight([(0.5, 45.0)], theirs) is None


# ---- any statistic of test points ------------------------------------------------------------------------------------


def test_resampling_a_mean_is_the_bootstrap() -> None:
    values = np.random.default_rng(1).random(100)
    found = resampled(lambda weights: float(values @ weights), 100, resamples=10_000)
    expected = bootstrap(values, np.zeros(100))
    assert found.mean == pytest.approx(expected.mean)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.003)


def test_a_minimum_is_not_shifted_by_drawing() -> None:
    """Ten classes that are alike against ten of which one is the worst: only the former's minimum falls by drawing."""
    random, rates = np.random.default_rng(3), np.stack([np.full(10, 0.5), np.linspace(0.2, 0.9, 10)])
    classes = np.repeat(np.eye(10), 20, 1)  # [classes, points]

    def statistic(stand: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
        share = classes @ weights
        worst = ((stand * weights) @ classes.T / np.where(share > 0, share, 1) + (share == 0)).min(-1)
        return float(worst[0] - worst[1])

    draws = [(random.random((2, 200)) < np.repeat(rates, 20, 1)).astype(float) for _ in range(1000)]
    even = np.full(200, 1 / 200)
    truth = np.mean([statistic(stand, even) for stand in draws])  # on other images, as many as these
    hits = 0
    for stand in draws[:100]:
        found = resampled(functools.partial(statistic, stand), 200, resamples=300)
        hits += found.low <= truth <= found.high
    assert hits >= 90


def test_draws_without_the_statistic_are_left_out() -> None:
    def value(weights: NDArray[np.float64]) -> float | None:
        return 1.0 if weights[0] > 0 else None

    assert resampled(value, 3) == Interval(1, 1, 1)
    with pytest.raises(ValueError, match="does not exist"):
        resampled(lambda weights: None, 3)


def test_counts_are_said_as_orders_of_magnitude() -> None:
    assert [rounded(n) for n in (2, 9, 10, 14, 15, 16, 219, 1015)] == [2, 9, 10, 20, 20, 20, 300, 2000]
