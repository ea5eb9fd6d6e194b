"""ECE and what travels with it: the edge rule, other implementations, the debiased value, the interval, the refusals."""
import functools
import itertools
import warnings
from fractions import Fraction

import matplotlib
import numpy as np
import pytest
import torch
from scipy.stats import bootstrap
from sklearn.calibration import calibration_curve
from torchmetrics.functional.classification import binary_calibration_error

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import catto.eval
from catto.eval import (
    calibration_report,
    debiased_ece,
    expected_calibration_error,
    noise_floor,
    plot_reliability,
    reliability_curve,
)


def data(n, seed=0, scale=0.8):
    "Confidences as a sure model has them, and answers that are right with probability scale * confidence."
    rng = np.random.default_rng(seed)
    confidence = rng.beta(6, 1.2, n)
    return confidence, rng.random(n) < scale * confidence


def naive_ece(c, z, n_bins):
    c, z = np.asarray(c, dtype=float), np.asarray(z, dtype=float)
    inside = [(c <= 1 / n_bins) if m == 0 else (c > m / n_bins) & (c <= (m + 1) / n_bins) for m in range(n_bins)]
    return sum(b.mean() * abs(z[b].mean() - c[b].mean()) for b in inside if b.any())


def torchmetrics_ece(c, z, n_bins=20):
    return float(binary_calibration_error(torch.tensor(c), torch.tensor(z).long(), n_bins=n_bins))


# Bins


@pytest.mark.parametrize("n_bins", [1, 2, 3, 7, 10, 15, 20, 49, 50, 100, 1000])
def test_zero_one_and_every_edge_are_counted_once_in_the_bin_they_close(n_bins):
    edges = np.arange(n_bins + 1) / n_bins
    count = reliability_curve(edges, np.ones(n_bins + 1), n_bins).count
    assert count.sum() == n_bins + 1
    assert count.tolist() == [2] + [1] * (n_bins - 1)  # 0 and the first edge share the first bin
    above = np.nextafter(edges[:-1], 1)  # the next larger number belongs to the bin above
    assert reliability_curve(above, np.ones(n_bins), n_bins).count.tolist() == [1] * n_bins


def test_counts_sum_to_n_and_empty_bins_are_nan():
    c, z = data(500)
    curve = reliability_curve(c, z)
    assert curve.n == curve.count.sum() == 500
    assert np.array_equal(np.isnan(curve.accuracy), curve.count == 0) and (curve.count == 0).any()
    assert np.array_equal(np.isnan(curve.confidence), curve.count == 0)


def test_empty_bins_give_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reliability_curve([0.5], [1]).ece == pytest.approx(0.5)


def test_curve_and_function_give_one_ece():
    for seed in range(20):
        c, z = data(300, seed)
        assert reliability_curve(c, z, 13).ece == pytest.approx(expected_calibration_error(c, z, 13), abs=1e-14)


# Values


def test_all_wrong_at_confidence_one_is_one():
    assert expected_calibration_error(np.ones(50), np.zeros(50)) == 1.0
    assert debiased_ece(np.ones(50), np.zeros(50)) == 1.0


def test_all_right_at_confidence_one_is_zero():
    assert expected_calibration_error(np.ones(50), np.ones(50)) == 0.0


@pytest.mark.parametrize("confidence, correct, ece", [(0.7, 1, 0.3), (0.7, 0, 0.7), (0.0, 0, 0.0), (0.0, 1, 1.0), (1.0, 1, 0.0)])
def test_one_question(confidence, correct, ece):
    assert expected_calibration_error([confidence], [correct]) == pytest.approx(ece)


def test_constant_confidence_is_the_difference_of_means():
    assert expected_calibration_error(np.full(80, 0.6), np.arange(80) < 20) == pytest.approx(0.35)


def test_order_does_not_matter():
    c, z = data(400)
    order = np.random.default_rng(1).permutation(400)
    assert expected_calibration_error(c[order], z[order]) == pytest.approx(expected_calibration_error(c, z), abs=1e-14)
    for ties in (c, c.round(1), np.full(400, 0.8)):  # the splits are the same, so this is exact
        assert debiased_ece(ties[order], z[order]) == debiased_ece(ties, z)
    assert reliability_curve(c[order], z[order]).count.tolist() == reliability_curve(c, z).count.tolist()


def test_against_the_loop_on_and_off_the_edges():
    rng = np.random.default_rng(2)
    for _ in range(200):
        n, n_bins = int(rng.integers(1, 300)), int(rng.integers(1, 40))
        c = rng.random(n) if rng.random() < 0.5 else rng.integers(0, n_bins + 1, n) / n_bins
        z = rng.random(n) < rng.random()
        assert expected_calibration_error(c, z, n_bins) == pytest.approx(naive_ece(c, z, n_bins), abs=1e-12)


def test_accepted_types_give_one_number():
    c, z = [0.25, 0.75, 1.0], [0, 1, 0]
    expected = expected_calibration_error(c, z)
    for other in (np.float32(c), torch.tensor(c), tuple(c)):
        assert expected_calibration_error(other, z) == expected
    for other in (np.bool_(z), np.float64(z), torch.tensor(z), [False, True, False]):
        assert expected_calibration_error(c, other) == expected
    assert type(expected) is float


# Other implementations


@pytest.mark.parametrize("n_bins", [1, 10, 15, 20])
def test_agrees_with_torchmetrics_on_continuous_data(n_bins):
    for seed in range(20):
        c, z = data(500, seed)
        assert expected_calibration_error(c, z, n_bins) == pytest.approx(torchmetrics_ece(c, z, n_bins), abs=1e-12)


@pytest.mark.parametrize("n_bins", [10, 15, 20])
def test_agrees_with_bins_of_scikit_learn_on_continuous_data(n_bins):
    for seed in range(20):
        c, z = data(500, seed)
        accuracy, confidence = calibration_curve(z, c, n_bins=n_bins)
        count = np.histogram(c, np.linspace(0, 1, n_bins + 1))[0]
        rebuilt = np.abs(accuracy - confidence) @ count[count > 0] / len(c)
        assert expected_calibration_error(c, z, n_bins) == pytest.approx(rebuilt, abs=1e-12)
        curve = reliability_curve(c, z, n_bins)
        assert np.allclose(curve.accuracy[curve.count > 0], accuracy, atol=1e-12)
        assert np.allclose(curve.confidence[curve.count > 0], confidence, atol=1e-12)


@pytest.mark.parametrize(
    "confidence, correct, ours, theirs",
    [
        # 1.0 shares the last bin with 0.96: |0.98 - 0.5|. torchmetrics gives it a bin of its own: (0.04 + 1) / 2.
        ([0.96, 0.96, 1.0, 1.0], [1, 1, 0, 0], 0.48, 0.52),
        # 0.5 closes the bin of 0.46: |0.48 - 0.5|. torchmetrics puts it in the bin above: (0.54 + 0.5) / 2.
        ([0.46, 0.46, 0.5, 0.5], [1, 1, 0, 0], 0.02, 0.52),
        # 0.5 is apart from 0.54: (0.5 + 0.54) / 2. torchmetrics has them in one bin: |0.52 - 0.5|.
        ([0.5, 0.5, 0.54, 0.54], [1, 1, 0, 0], 0.52, 0.02),
    ],
)
def test_where_torchmetrics_differs_on_edges(confidence, correct, ours, theirs):
    c, z = np.array(confidence), np.array(correct)
    assert expected_calibration_error(c, z) == pytest.approx(ours, abs=1e-12)
    assert torchmetrics_ece(c, z) == pytest.approx(theirs, abs=1e-12)


def test_saturated_data_differs_from_torchmetrics_by_a_known_amount():
    c, z = data(500, 3)
    c[::2] = 1.0
    ours, theirs = expected_calibration_error(c, z), torchmetrics_ece(c, z)
    inside = c < 1
    split = [np.abs((c - z)[~inside].sum()), np.abs((c - z)[inside & (c > 0.95)].sum())]
    joint = np.abs((c - z)[c > 0.95].sum())
    assert theirs - ours == pytest.approx((sum(split) - joint) / 500, abs=1e-12)


# Debiased ECE


class Halves:
    "Stands in for the generator: deals the rows that `rule(n)` lists to every bin of n questions, again and again."

    def __init__(self, rule):
        self.rule = rule

    def permuted(self, half, axis, out):
        rows = np.asarray(self.rule(half.shape[1]))
        assert axis == 1 and len(half) % len(rows) == 0
        out[:] = np.tile(rows, (len(half) // len(rows), 1))


@functools.cache
def every(n):
    return [np.isin(np.arange(n), half) for half in itertools.combinations(range(n), n // 2)]


def outcomes_of(confidence):
    "All patterns of right and wrong, and their probabilities under calibration."
    outcomes = np.array(list(itertools.product((0, 1), repeat=len(confidence))))
    return outcomes, np.where(outcomes == 1, confidence, 1 - confidence).prod(1)


def naive_debiased(c, z, n_bins=20):
    "The definition over all halves of every bin, in exact fractions of 1/1000."
    total = Fraction(0)
    for m in range(n_bins):
        inside = [i for i in range(len(c)) if (m < n_bins * c[i] <= m + 1) or m == c[i] == 0]
        d = [Fraction(round(1000 * c[i]), 1000) - int(z[i]) for i in inside]
        halves = list(itertools.combinations(range(len(d)), len(d) // 2))
        for half in halves:
            a = sum((d[i] for i in half), Fraction(0))
            b = sum(d) - a
            total += (((a > 0) - (a < 0)) * b + ((b > 0) - (b < 0)) * a) / len(halves)
    return float(total / len(c))


def test_debiased_is_zero_on_average_on_calibrated_data():
    rng, plain, debiased = np.random.default_rng(11), [], []
    for _ in range(2000):
        c = rng.beta(6, 1.2, 500)
        z = rng.random(500) < c
        plain.append(expected_calibration_error(c, z))
        debiased.append(debiased_ece(c, z, n_splits=50))
    assert abs(np.mean(debiased)) < 3 * np.std(debiased, ddof=1) / np.sqrt(2000)
    assert 0.041 < np.mean(plain) < 0.045
    assert 1.3 < np.std(debiased) / np.std(plain) < 1.6  # 3.7 with leave-one-out signs
    assert min(debiased) > -np.mean(plain)


@pytest.mark.parametrize(
    "confidence, how",
    [
        # Equal confidences are sorted by their answers: exact over all splits.
        (np.full(10, 0.6), dict(n_splits=252, rng=Halves(every))),
        (np.full(9, 0.5), dict(n_splits=126, rng=Halves(every))),
        (np.repeat([0.32, 0.61, 0.9], [4, 4, 3]), dict(n_splits=6, rng=Halves(every))),
        # All different: exact for any splits.
        (np.repeat([0.32, 0.61, 0.9], [4, 4, 3]) + 0.003 * np.arange(11), dict(n_splits=7)),
        (np.linspace(0.61, 0.65, 10), dict(n_splits=1)),
        (np.linspace(0.61, 0.65, 10), dict(n_splits=1, rng=Halves(lambda n: [np.arange(n) % 2]))),
    ],
)
def test_debiased_expectation_is_exactly_zero(confidence, how):
    outcomes, weight = outcomes_of(confidence)
    assert weight.sum() == pytest.approx(1)
    assert weight @ [debiased_ece(confidence, z, **how) for z in outcomes] == pytest.approx(0, abs=1e-14)
    assert weight @ [expected_calibration_error(confidence, z) for z in outcomes] > 0.1


def test_the_zero_mean_needs_the_tie_rule_and_splits_that_are_random_to_the_answers(monkeypatch):
    confidence = np.full(10, 0.6)
    outcomes, weight = outcomes_of(confidence)
    in_turns = dict(n_splits=1, rng=Halves(lambda n: [np.arange(n) % 2]))
    assert weight @ [debiased_ece(confidence, z, **in_turns) for z in outcomes] > 0.05
    monkeypatch.setattr("catto.eval._TIE", 0.0)
    all_halves = dict(n_splits=252, rng=Halves(every))
    assert abs(weight @ [debiased_ece(confidence, z, **all_halves) for z in outcomes]) > 1e-4


def test_debiased_against_the_definition():
    rng = np.random.default_rng(14)
    for _ in range(100):
        c = np.concatenate([rng.integers(301, 350, 4), rng.integers(701, 750, 5), [933]]) / 1000
        z = rng.random(10) < 0.7
        expected = naive_debiased(c, z)
        assert debiased_ece(c, z, n_splits=30, rng=Halves(every)) == pytest.approx(expected, abs=1e-12)
        assert debiased_ece(c, z, n_splits=5000) == pytest.approx(expected, abs=0.03)


def test_debiased_equals_ece_when_the_gap_is_plain():
    rng = np.random.default_rng(12)
    c = 0.9 + 0.1 * rng.random(500)
    z = rng.random(500) < 0.5
    assert debiased_ece(c, z) == pytest.approx(expected_calibration_error(c, z), abs=1e-12)
    assert debiased_ece(c, ~z) == pytest.approx(expected_calibration_error(c, ~z), abs=1e-12)
    thin = [0.62, 0.63, 0.71, 0.72, 0.73]  # two and three questions: neither half may be empty
    assert debiased_ece(thin, np.zeros(5)) == pytest.approx(np.mean(thin), abs=1e-12)


def test_debiased_never_exceeds_ece():
    for seed in range(100):
        c, z = data(100, seed, scale=1.0)
        assert debiased_ece(c, z) <= expected_calibration_error(c, z) + 1e-12


def test_debiased_of_lone_questions_is_zero():
    assert debiased_ece([0.7], [0]) == 0.0 and debiased_ece([0.1, 0.5, 0.9], [1, 0, 0]) == 0.0


@pytest.mark.parametrize("n, right", [(50, 41), (500, 410), (5000, 4100)])
def test_debiased_stays_within_the_noise_where_gaps_cancel(n, right):
    "Every leave-one-out sign is the wrong one here: that estimate is -0.30 at any n."
    c, z = np.linspace(0.8101, 0.83, n), np.arange(n) < right
    d = c - z
    assert (np.sign(d.sum() - d) * d).mean() < -0.25
    floor = noise_floor(c)
    assert expected_calibration_error(c, z) < 0.1 * floor.mean
    assert -1.2 * floor.mean < debiased_ece(c, z) < 0


def test_debiased_follows_its_generator():
    c, z = data(100)
    assert debiased_ece(c, z) == debiased_ece(c, z, rng=np.random.default_rng(0)) != debiased_ece(c, z, rng=np.random.default_rng(1))
    few, many = ([debiased_ece(c, z, n_splits=n, rng=np.random.default_rng(s)) for s in range(100)] for n in (10, 250))
    assert np.std(few) / np.std(many) == pytest.approx(5, rel=0.3)  # the error of the splits falls with their root


def test_debiased_in_batches(monkeypatch):
    c, z = data(100)
    whole, sizes = debiased_ece(c, z), []

    class Recording:
        def __init__(self):
            self.rng = np.random.default_rng(0)

        def permuted(self, half, **how):
            sizes.append(half.size)
            return self.rng.permuted(half, **how)

    monkeypatch.setattr("catto.eval._CELLS", 730)
    assert debiased_ece(c, z, rng=Recording()) == pytest.approx(whole, abs=1e-12)
    assert 100 < max(sizes) <= 730


# Noise floor


def test_noise_floor_is_the_ece_of_calibrated_draws():
    c, _ = data(300)
    rng = np.random.default_rng(13)
    slow = [expected_calibration_error(c, rng.random(300) < c) for _ in range(2000)]
    floor = noise_floor(c, n_draws=2000)
    error = np.std(slow, ddof=1) / np.sqrt(2000)
    assert floor.mean == pytest.approx(np.mean(slow), abs=4 * np.sqrt(2) * error)
    assert (floor.low, floor.high) == pytest.approx(np.quantile(slow, (0.025, 0.975)), abs=0.003)
    assert floor.low < floor.mean < floor.high


def test_noise_floor_in_batches(monkeypatch):
    c, _ = data(100)
    whole = noise_floor(c)
    monkeypatch.setattr("catto.eval._CELLS", 730)  # seven draws at a time, the last batch smaller
    assert noise_floor(c) == pytest.approx(whole, abs=1e-12)


def test_no_loop_holds_more_values_than_allowed(monkeypatch):
    sizes, ece = [], catto.eval._ece
    monkeypatch.setattr("catto.eval._CELLS", 730)
    monkeypatch.setattr("catto.eval._ece", lambda bins, gap, n_bins: sizes.append(gap.size) or ece(bins, gap, n_bins))
    c, z = data(100)
    noise_floor(c)
    floor_sizes, sizes[:] = sizes[:], []
    calibration_report(c, z)
    assert 0 < max(floor_sizes) <= 730 and 0 < max(sizes) <= 730


def test_noise_floor_uses_the_generator():
    c, _ = data(100)
    assert noise_floor(c) == noise_floor(c, rng=np.random.default_rng(0)) != noise_floor(c, rng=np.random.default_rng(1))


# Report

KEYS = """n accuracy mean_confidence ece ece_low ece_high ece_debiased ece_smooth ece_floor ece_floor_low ece_floor_high
brier nll auroc parse_rate oracle_error n_bins""".split()


def test_report_holds_plain_numbers_under_its_names():
    c, z = data(200)
    report = calibration_report(c, z, p_correct=0.8 * c, parsed=np.arange(200) < 190)
    assert list(report) == KEYS
    assert {key: type(value) for key, value in report.items()} == {k: int if k in ("n", "n_bins") else float for k in KEYS}
    assert np.isfinite(list(report.values())).all()
    assert report["n"] == 200 and report["n_bins"] == 20 and report["parse_rate"] == 0.95
    assert report["accuracy"] == pytest.approx(z.mean()) and report["mean_confidence"] == pytest.approx(c.mean())
    assert report["ece"] == expected_calibration_error(c, z)
    assert report["ece_debiased"] == pytest.approx(debiased_ece(c, z), abs=0.005)  # other splits
    assert report["brier"] == pytest.approx(np.mean((c - z) ** 2))
    assert report["nll"] == pytest.approx(-np.mean(np.log(np.where(z, c, 1 - c))))
    assert report["auroc"] == pytest.approx(np.mean(c[z][:, None] > c[~z]))
    assert report["oracle_error"] == pytest.approx(np.mean(0.2 * c))
    assert abs(report["ece_smooth"] - report["ece"]) < 0.05


def test_wrong_at_confidence_one_costs_the_documented_clip():
    assert calibration_report([1.0, 1.0], [0, 0])["nll"] == pytest.approx(-np.log(np.finfo(float).eps))  # 36.04


def test_report_on_float32_is_the_report_on_the_same_numbers_in_float64():
    c, z = data(300)
    c = c.astype(np.float32)
    assert calibration_report(c, z, p_correct=c, parsed=z) == calibration_report(c.astype(float), z, p_correct=c, parsed=z)


def test_report_is_reproducible_and_follows_its_generator():
    c, z = data(100)
    same = [calibration_report(c, z, np.full(100, 0.5), z, rng=rng) for rng in (None, np.random.default_rng(0))]
    assert same[0] == same[1]
    other = calibration_report(c, z, rng=np.random.default_rng(1))
    assert all(other[key] != same[0][key] for key in ("ece_low", "ece_floor", "ece_debiased"))


def test_interval_by_a_second_road():
    c, z = data(150)
    report = calibration_report(c, z, n_resamples=500)
    slow = bootstrap((c, z), expected_calibration_error, paired=True, vectorized=False, n_resamples=500,
                     method="BCa", rng=np.random.default_rng(0)).confidence_interval
    assert (report["ece_low"], report["ece_high"]) == pytest.approx(tuple(slow), abs=1e-12)


def test_interval_in_batches(monkeypatch):
    c, z = data(60)
    whole = calibration_report(c, z)
    monkeypatch.setattr("catto.eval._CELLS", 60 * 7)
    batched = calibration_report(c, z)
    assert (batched["ece_low"], batched["ece_high"]) == pytest.approx((whole["ece_low"], whole["ece_high"]), abs=1e-12)


@pytest.mark.parametrize("confidence, correct", [([0.7], [1]), (np.ones(20), np.zeros(20)), (np.full(9, 0.3), np.ones(9))])
def test_degenerate_reports_are_nan_without_warnings(confidence, correct):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = calibration_report(confidence, correct)
    assert np.isnan([report[k] for k in ("ece_low", "ece_high", "auroc", "parse_rate", "oracle_error")]).all()
    assert np.isfinite([report[k] for k in KEYS if k not in ("ece_low", "ece_high", "auroc", "parse_rate", "oracle_error")]).all()


# Refusals

CALLS = [expected_calibration_error, reliability_curve, debiased_ece, calibration_report]
BAD = [
    ([0.5, np.nan], [0, 1], "confidence has 1 NaN"),
    ([], [], "confidence is empty .n = 0."),
    ([55.0, 90.0], [0, 1], "confidence goes up to 90.*looks like percentages"),
    ([0.5, 1.0000001], [0, 1], "confidence goes up to 1.0000001"),
    ([0.5, np.inf], [0, 1], "confidence goes up to inf"),
    ([0.5, -0.1], [0, 1], "confidence goes down to -0.1"),
    (np.float16([0.5, 0.9]), [0, 1], "confidence is in half precision"),
    (torch.tensor([0.5, 0.9], dtype=torch.bfloat16), [0, 1], "confidence is in half precision"),
    ([np.float16(0.5), np.float16(0.9)], [0, 1], "confidence is in half precision"),
    ([[0.5, 0.9]], [[0, 1]], "confidence has shape .1, 2."),
    (0.5, 1, "confidence has shape"),
    ([False, True], [0.5, 0.9], "confidence is boolean.*swapped"),
    (["0.5", "0.9"], [0, 1], "confidence holds"),
    ([0.5, None], [0, 1], "confidence holds object"),
    ([0.5, 0.9], [1], "correct has shape .1,. and confidence .2,."),
    ([0.5, 0.9], [[0, 1]], "correct has shape"),
    ([0.5, 0.9], [1, 2], "correct holds values other than 0, 1"),
    ([0.5, 0.9], [0.5, 1], "correct holds values other than 0, 1"),
    ([0.5, 0.9], [1, np.nan], "correct holds values other than 0, 1"),
    ([0.5, 0.9], ["0", "1"], "correct holds values other than 0, 1"),
]


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("confidence, correct, message", BAD)
def test_refused_by_name(function, confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        function(confidence, correct)


@pytest.mark.parametrize("n_splits", [0, -1, 2.5, True, None])
def test_bad_splits_are_refused(n_splits):
    with pytest.raises(ValueError, match="n_splits is"):
        debiased_ece([0.5], [1], n_splits=n_splits)


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize("n_bins", [0, -1, 2.5, 20.0, True, "20", None])
def test_bad_bins_are_refused(function, n_bins):
    with pytest.raises(ValueError, match="n_bins is"):
        function([0.5], [1], n_bins=n_bins)


def test_noise_floor_refuses_the_same():
    for confidence, message in {(0.5, np.nan): "NaN", (): "n = 0", (50.0, 90.0): "percentages"}.items():
        with pytest.raises(ValueError, match=message):
            noise_floor(confidence)
    with pytest.raises(ValueError, match="n_bins is 0"):
        noise_floor([0.5], n_bins=0)
    with pytest.raises(ValueError, match="n_draws is 0"):
        noise_floor([0.5], n_draws=0)


@pytest.mark.parametrize(
    "extra, message",
    [
        (dict(p_correct=[50.0, 90.0]), "p_correct goes up to 90.*percentages"),
        (dict(p_correct=[0.5]), "p_correct has 1 values and confidence 2"),
        (dict(p_correct=[0.5, np.nan]), "p_correct has 1 NaN"),
        (dict(parsed=[1]), "parsed has shape"),
        (dict(parsed=[1, 2]), "parsed holds values other than"),
        (dict(n_resamples=0), "n_resamples is 0"),
    ],
)
def test_report_refuses_bad_extras(extra, message):
    with pytest.raises(ValueError, match=message):
        calibration_report([0.5, 0.9], [0, 1], **extra)


# Picture


@pytest.fixture
def curve():
    yield reliability_curve(*data(200))
    plt.close("all")


def test_picture_shows_the_numbers_of_the_curve(curve):
    top, bottom = plot_reliability(curve, title="a method")
    filled = curve.count > 0
    accuracy, gap = top.containers
    assert np.allclose([bar.get_height() for bar in accuracy], curve.accuracy[filled])
    assert np.allclose([bar.get_height() for bar in gap], (curve.confidence - curve.accuracy)[filled])
    assert np.allclose([bar.get_y() for bar in gap], curve.accuracy[filled])
    assert np.allclose([bar.get_height() for bar in bottom.containers[0]], curve.count / 200)
    assert [int(text.get_text()) for text in bottom.texts] == curve.count[filled].tolist()
    assert [line.get_xdata()[0] for line in bottom.lines] == [curve.mean_accuracy, curve.mean_confidence]
    assert top.get_legend().get_title().get_text() == f"ECE {100 * curve.ece:.1f} %\nn = 200"
    assert [text.get_text() for text in top.get_legend().get_texts()] == ["Accuracy", "Gap"]
    assert top.get_title() == "a method"


def test_picture_draws_where_it_is_told(curve):
    _, pair = plt.subplots(2)
    assert plot_reliability(curve, ax=pair) == tuple(pair)
    _, one = plt.subplots()
    assert plot_reliability(curve, ax=one) is one and len(one.containers) == 2


def test_shared_histogram_axis_cuts_no_bar_off():
    tall, flat = reliability_curve([0.9] * 20, [1] * 20), reliability_curve(np.linspace(0, 1, 200), np.ones(200))
    for pair in ((tall, flat), (flat, tall)):
        _, axes = plt.subplots(2, 2, sharey="row")
        for curve, ax in zip(pair, axes.T):
            plot_reliability(curve, ax=ax)
        assert axes[1, 0].get_ylim()[1] > 1
    plt.close("all")


def test_picture_refuses_three_axes(curve):
    with pytest.raises(ValueError, match="one Axes nor a .top, bottom. pair"):
        plot_reliability(curve, ax=plt.subplots(3)[1])


@pytest.mark.parametrize("ax", [3, "axes", [1, 2], ()])
def test_picture_refuses_other_axes(curve, ax):
    with pytest.raises(ValueError, match="one Axes nor a .top, bottom. pair"):
        plot_reliability(curve, ax=ax)
