"""The report on runs that are made up: planted numbers must come out of tables, verdicts, signatures and errors."""
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from catto.confidence import score_pool
from catto.eval import expected_calibration_error
from catto.methods import METHODS, grid
from catto.report import (CLAIMS, GOALS, RATE_TABLES, Claim, calibration_metrics, claimed_pairs, compute_results, goals, headline, load_runs, resample,
                          results_markdown, rule_of, update_readme, verdicts, write_report)
from catto.settings import file_hash, load, run_folder

SHIFTS = {"sft": 0.10, "sft_ls": 0.06, "sft_ts": 0.05, "sft_ts_greedy": 0.04, "dpo": 0.20, "dpo_matched": 0.18, "rcft": 0.12, "dpo_bce": 0.15,
          "dpo_catto": 0.18, "dpo_catto_label": 0.02, "cal_dpo": 0.14, "cal_dpo_ipo": 0.13, "cal_dpo_slic": 0.12, "cal_dpo_released": 0.16}
MANY = "sft sft_ls sft_ts sft_ts_greedy dpo dpo_matched rcft dpo_bce dpo_catto dpo_catto_label cal_dpo cal_dpo_ipo cal_dpo_slic cal_dpo_released"


def planted(**words):
    "Settings of a small study."
    return load("mini", **{"tasks": "snli anli", "ood_task": "mmlu", "seeds": "0 1", "methods": MANY, "bootstrap_resamples": 200, "test_questions": 200, **words})


class World:
    """Writes the files of runs, as training, evaluation and sampling leave them. Every method answers the same questions: question i is right
    when u_i < p_i + lift, and its confidence is that probability plus the shift. So the shift is what a method is over-confident by."""

    def __init__(self, root, settings, **changes):
        self.root, self.settings = Path(root), settings
        # (task trained on, method, seed) -> value; None stands for any
        self.changes = {"shift": {}, "lift": {}, "diverged": {}, "facts": {}, "pool_signal": {}, "unparsed": {}, **changes}

    def of(self, what, trained_on, method, seed, default):
        table = self.changes[what]
        keys = [(trained_on, method, seed), (trained_on, method, None), (None, method, seed), (None, method, None)]
        return next((table[key] for key in keys if key in table), default)

    def answers(self, trained_on, tested, method, seed, candidates=1, run=None):
        n = self.settings.test_questions
        rng = np.random.default_rng([seed, sum(map(ord, tested))])
        p, u = rng.uniform(0.4, 0.75, n), rng.random(n)
        truth = np.clip(p + self.of("lift", trained_on, method, seed, 0.0), 0, 1)
        confidence = np.clip(truth + self.of("shift", trained_on, run or method, seed, SHIFTS[method]), 0, 1)
        rows = pd.DataFrame({"id": [f"{tested}-{seed}-{i}" for i in range(n)], "task": tested, "candidate": 0, "label": "A", "predicted": "A", "confidence": confidence,
                             "correct": u < truth, "parsed": True, "p_correct": truth, "bayes": 0.8, "mean_log_prob": -0.5, "temperature": 1.0, "text": "x"})
        if candidates > 1:
            rows = rows.loc[rows.index.repeat(candidates)].reset_index(drop=True).assign(candidate=np.tile(np.arange(candidates), n))
            rows["correct"] = rng.random(len(rows)) < rows["p_correct"]
            signal = self.of("pool_signal", trained_on, method, seed, 0.3)
            rows["confidence"] = np.clip(0.5 + signal * (rows["correct"] - 0.5) + rng.uniform(-0.2, 0.2, len(rows)), 0, 1)
            rows["predicted"] = np.where(rows["correct"], "A", "B")
        cut = int(self.of("unparsed", trained_on, method, seed, 0.0) * n)
        rows.loc[rows.index[:cut], "parsed"] = False
        return rows.assign(trained_on=trained_on, method=method, seed=seed, split="test", profile="mini")

    def write(self, folder, manifest, name, rows):
        rows.to_parquet(folder / name, index=False)
        (folder / manifest).write_text(json.dumps({"key": "k", "outputs": {name: file_hash(folder / name)}}))

    def train(self, folder, run, trained_on, seed, diverged):
        other = run.changes  # the second learning rate is the worse one on validation
        facts = {"method": run.method, "changes": dict(run.changes), "rows": 500 if METHODS[run.method].matched else 1500, "steps": 60, "epochs": 2, "outputs": {}, "resumed": False,
                 "validation_ece": SHIFTS[run.method] + (0.05 if other else 0.0), "temperature": 1.5, "tokens": 100_000, "train_seconds": 10.0, "parameters": 1,
                 "peak_memory_bytes": 4e8, "inverted_pairs": 0.1 if METHODS[run.method].kind == "preference" else None, "largest_gradient": 0.09, "rewards_inside": 0.8,
                 "diverged": diverged, **self.of("facts", trained_on, run.name, seed, {})}
        (folder / "train.json").write_text(json.dumps(facts))

    def make(self, tasks=None, pools=True, every_rate=False):
        s = self.settings
        for trained_on in tasks or (*s.tasks, *filter(None, [s.ood_task])):
            for seed in s.seeds:
                for method in s.methods:
                    diverged = self.of("diverged", trained_on, method, seed, False)
                    for run in grid(s, trained_on, method):
                        folder = run_folder(self.root, s, trained_on, seed, run.name)
                        folder.mkdir(parents=True, exist_ok=True)
                        if METHODS[method].kind != "scaled":
                            self.train(folder, run, trained_on, seed, diverged)
                        if run.name == method or every_rate:
                            self.results(folder, trained_on, run.name, seed, diverged, pools)
        return self

    def results(self, folder, trained_on, run, seed, diverged, pools):
        s, method = self.settings, run.partition("@")[0]
        files = [(f"eval_{t}.json", f"predictions_test_{t}.parquet", t, 1) for t in s.tasks] if trained_on == s.ood_task else [
            ("eval.json", "predictions_test.parquet", trained_on, 1)]
        if pools and trained_on != s.ood_task and METHODS[method].kind != "scaled":
            files.append(("pool.json", "pool_test.parquet", trained_on, s.candidates))
        for manifest, name, tested, candidates in files:
            if diverged:
                (folder / manifest).write_text(json.dumps({"key": "k", "diverged": True, "outputs": {}}))
            else:
                self.write(folder, manifest, name, self.answers(trained_on, tested, method, seed, candidates, run))


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A complete study of two tasks, two seeds and all methods: settings, world, figures folder, manifest."
    root, settings = tmp_path_factory.mktemp("study"), planted(test_questions=400)
    world = World(root, settings).make()
    manifest = write_report(settings, root)
    return settings, world, root / "figures" / "mini", manifest


def table(figures, number):
    return pd.read_csv(figures / f"table{number:02d}.csv")


def test_every_table_and_figure_is_written(study):
    settings, _, figures, manifest = study
    expected = {f"table{n:02d}.{e}" for n in range(1, 13) for e in ("csv", "md")} | {f"{n}_{t}.svg" for n in ("reliability", "figure1") for t in settings.tasks}
    expected |= {"overview.svg", "scores.csv", "contrasts.csv", "findings.csv", "findings.md", "signatures.csv", "signatures.md", "same_rate.csv", "same_rate.md"}
    assert {path.name for path in figures.iterdir()} == expected == {Path(name).name for name in manifest["outputs"]}
    assert (manifest["runs"], manifest["missing"], manifest["diverged"]) == (14 * 4 * 2, 0, 0)


def test_table_1_holds_the_numbers_of_the_answers(study):
    settings, world, figures, _ = study
    rows = table(figures, 1).set_index(["task", "method", "metric"])
    for method in ("sft", "dpo_catto_label"):
        answers = [world.answers("snli", "snli", method, seed) for seed in settings.seeds]
        eces = [100 * expected_calibration_error(a["confidence"].to_numpy(), a["correct"].to_numpy(), settings.ece_bins) for a in answers]
        row = rows.loc["snli", method, "ece"]
        assert row["mean"] == pytest.approx(np.mean(eces), abs=1e-3) and row["sd"] == pytest.approx(np.std(eces, ddof=1), abs=1e-3)
        assert rows.loc["snli", method, "accuracy"]["mean"] == pytest.approx(100 * np.mean([a["correct"].mean() for a in answers]), abs=1e-3)
        assert (row["seeds"], row["n"], row["bins"]) == (2, settings.test_questions, settings.ece_bins) and row["floor"] > 0
    assert rows.loc["snli", "dpo", "ece"]["paper"] == 26.74 and np.isnan(rows.loc["snli", "dpo_matched", "ece"]["paper"])


@pytest.mark.parametrize("number, trained_on", [(1, "snli"), (2, "mmlu")])
def test_planted_differences_come_out_with_their_interval(study, number, trained_on):
    rows = table(study[2], number).set_index(["trained_on", "task", "method", "metric"]).sort_index().loc[trained_on, "snli"]
    for reference in ("dpo_matched", "dpo"):
        truth = 100 * (SHIFTS["dpo_bce"] - SHIFTS[reference])
        row = rows.loc["dpo_bce", "oracle_error"]
        assert row[f"minus_{reference}"] == pytest.approx(truth, abs=0.3)
        low, high = rows.loc["dpo_bce", "ece"][[f"minus_{reference}_low", f"minus_{reference}_high"]]
        assert low < truth < high < 0
    # The same answers right: no resample can tell the two apart, if they share it.
    assert rows.loc["dpo_bce", "accuracy"][["minus_dpo_matched", "minus_dpo_matched_low", "minus_dpo_matched_high"]].tolist() == [0, 0, 0]
    assert np.isnan(rows.loc["dpo_matched", "ece"]["minus_dpo_matched"])


def test_spread_tables_are_the_deviations_of_the_others(study):
    for number, source in ((4, 1), (5, 2)):
        spread, whole = (table(study[2], n).set_index(["task", "method", "metric"]) for n in (number, source))
        assert set(spread.index.get_level_values("metric")) == {"accuracy", "ece"} and "paper_dispersion" in spread
        assert (spread["standard_deviation"] - whole["sd"].reindex(spread.index)).abs().max() < 1e-4
    spread, whole = table(study[2], 6), table(study[2], 3)
    joined = spread.merge(whole[whole["rule"] == "confidence"], on=["task", "method", "k"])
    assert len(joined) == len(spread) > 0 and (joined["standard_deviation"] - joined["sd"]).abs().max() < 1e-4


def test_table_3_is_confidence_at_k(study):
    settings, world, figures, _ = study
    rows = table(figures, 3).set_index(["task", "method", "k", "rule"])
    scored = pd.concat([score_pool(world.answers("anli", "anli", "dpo", seed, settings.candidates), settings.candidate_counts, seed) for seed in settings.seeds])
    for (k, rule), accuracy in scored.groupby(["k", "rule"])["accuracy"]:
        assert rows.loc["anli", "dpo", k, rule][["mean", "sd"]].tolist() == pytest.approx([100 * accuracy.mean(), 100 * accuracy.std()], abs=1e-3)
    assert set(rows.index.get_level_values("k")) == {1, 2, 4, 8} and {"random", "majority", "weighted_vote", "log_prob", "pass"} <= set(rows.index.get_level_values("rule"))
    assert rows.loc["anli", "dpo", 8, "confidence"]["paper"] == 68.51 and np.isnan(rows.loc["anli", "dpo", 8, "majority"]["paper"])
    assert "sft_ts" not in rows.index.get_level_values("method")  # no model of its own, so nothing is missing
    text = (figures / "table03.md").read_text()
    assert "issing" not in text and "### Confidence@8 minus that of `dpo`\n" in text
    assert "| `dpo` | 0.0 / 1 | 0.0 / 1 |" in text.partition("### The candidates")[2]  # unparsed [%] / temperature


def test_learning_rates_per_seed_and_the_one_that_was_used(tmp_path):
    settings = planted(tasks="snli", ood_task="", methods="sft dpo", preference_learning_rates="1e-4 1e-5")
    # Seed 0 favours the small rate by 1 point, seed 1 the other by 3: the mean decides for the other.
    facts = {("snli", "dpo", 0): 0.21, ("snli", "dpo@preference_learning_rate=1e-05", 0): 0.20, ("snli", "dpo", 1): 0.20, ("snli", "dpo@preference_learning_rate=1e-05", 1): 0.23}
    World(tmp_path, settings, facts={key: {"validation_ece": ece} for key, ece in facts.items()}).make()
    write_report(settings, tmp_path)
    rows = table(tmp_path / "figures/mini", 8)
    assert rows[rows["lowest"]].set_index("seed")["learning_rate"].to_dict() == {0: 1e-5, 1: 1e-4}
    assert set(rows[rows["used"]]["learning_rate"]) == {1e-4} and set(rows["method"]) == {"dpo"}
    assert "| `dpo` | 1e-05 [5e-06] | 0.0001 [5e-06] | 0.0001 |" in (tmp_path / "figures/mini/table08.md").read_text()
    assert "No runs." in (tmp_path / "figures/mini/table07.md").read_text()
    assert RATE_TABLES.keys() == set(load("mini").tasks)


def test_times_leave_out_what_was_resumed(tmp_path):
    settings = planted(tasks="snli", ood_task="", methods="sft dpo dpo_matched dpo_bce dpo_catto")
    World(tmp_path, settings, facts={("snli", "dpo_catto", 0): {"train_seconds": 15.0}, ("snli", "dpo_catto", 1): {"train_seconds": 1.0, "resumed": True},
                                    ("snli", "dpo_bce", None): {"resumed": True}}).make()
    write_report(settings, tmp_path)
    rows = table(tmp_path / "figures/mini", 12).set_index("method")
    assert rows.loc["dpo_catto", ["seconds", "ratio", "seeds", "resumed", "paper"]].tolist() == [15, 1.5, 1, 1, 76]
    assert rows.loc["dpo_bce", ["seeds", "resumed"]].tolist() == [0, 2] and np.isnan(rows.loc["dpo_bce", "seconds"])  # named, not unseen
    assert rows.loc["dpo", "seconds_per_row_epoch"] == pytest.approx(10 / 3000, rel=1e-4) and rows.loc["dpo_matched", "seconds_per_row_epoch"] == pytest.approx(10 / 1000)
    assert rows.loc["dpo_matched", "tokens_per_second"] == 10_000 and rows.loc["dpo_matched", "peak_memory_mb"] == 400


# What we found ---------------------------------------------------------------------------------------------------------

TASKS = "abcde"


def contrasts(values, claim, width=1.0):
    "Differences of one claim, an interval of `width` to either side, in distribution or out of it as the claim says."
    return pd.DataFrame([{"trained_on": "mmlu" if claim.where == "out" else t, "task": t, "a": claim.a, "b": other, "metric": claim.metric,
                          "difference": d, "low": d - width, "high": d + width, "seeds": 2} for t, d in zip(TASKS, values) for other in claim.b],
                        columns=["trained_on", "task", "a", "b", "metric", "difference", "low", "high", "seeds"])


ORDINARY = [c for c in CLAIMS if not c.untestable and not c.only and c.over in ("all", "most") and c.where != "both"]


@pytest.mark.parametrize("claim", ORDINARY, ids=lambda c: c.id)
def test_each_claim_can_come_out_every_way(claim):
    on, off, alone = claim.limit + 3 * claim.side, claim.limit - 3 * claim.side, replace(claim, control=False)
    assert verdicts(contrasts([on] * 5, claim), [alone])["verdict"].tolist() == ["reproduced"]
    assert verdicts(contrasts([on, on, claim.limit, claim.limit, claim.limit], claim), [alone])["verdict"].tolist() == ["partly"]
    assert verdicts(contrasts([on, on, off, off, off], claim), [alone])["verdict"].tolist() == ["not reproduced"]
    assert verdicts(contrasts([off] * 5, claim), [alone])["verdict"].tolist() == ["not reproduced"]
    assert verdicts(contrasts([claim.limit] * 5, claim, width=0), [alone])["verdict"].tolist() == ["not reproduced"]  # exactly at the limit
    assert verdicts(contrasts([], claim), [alone])["verdict"].tolist() == ["cannot be tested here"]


def test_the_quantifiers():
    most, some, mixed = (Claim("x", "X", "", "dpo", ("sft",), side=+1, over=over) for over in ("most", "some", "mixed"))
    say = lambda values, claim: verdicts(contrasts(values, claim), [claim])[["verdict", "holds", "contradicted", "open"]].iloc[0].tolist()
    assert say([3, 3, 3, -3, 0], most) == ["reproduced", 3, 1, 1] and say([3, 3, 0, 0, 0], most) == ["partly", 2, 0, 3] and say([3, 3, -3, 0, 0], most)[0] == "not reproduced"
    assert say([3, -3, -3, -3, -3], some)[0] == "reproduced" and say([0, 0, 0, 0, -3], some)[0] == "not reproduced"
    assert say([3, -3, 0, 0, 0], mixed)[0] == "reproduced" and say([3, 0, 0, 0, 0], mixed)[0] == "partly"
    assert say([3] * 5, mixed)[0] == "not reproduced" and say([0] * 5, mixed)[0] == "not reproduced"


def test_against_several_methods_each_counts():
    claim = next(c for c in CLAIMS if c.id == "c8-best")
    every = contrasts([3] * 5, claim)
    assert verdicts(every, [claim])["verdict"].item() == "reproduced"
    one_open = every.copy()
    one_open.loc[(one_open["task"] == "a") & (one_open["b"] == "rcft"), ["difference", "low"]] = 0, -1
    assert verdicts(one_open, [claim])[["verdict", "holds", "open"]].iloc[0].tolist() == ["partly", 4, 1]
    one_worse = every.copy()
    one_worse.loc[(one_worse["task"] == "a") & (one_worse["b"] == "rcft"), ["difference", "low", "high"]] = -3, -4, -2
    assert verdicts(one_worse, [claim])["verdict"].item() == "not reproduced"
    lacking = verdicts(every[every["b"] != "rcft"], [claim]).iloc[0]
    assert lacking["verdict"] == "cannot be tested here" and lacking["evidence"] == "the runs lack rcft"


def test_a_condition_chooses_the_tasks():
    claim = next(c for c in CLAIMS if c.id == "c8-reversed")
    rows = pd.concat([contrasts([3, 3, -3, -3, -3], claim), contrasts([-3, -3, 3, 3, 3], claim).assign(a="dpo")])  # dpo is below sft on the first two
    assert verdicts(rows, [claim])[["verdict", "tasks"]].iloc[0].tolist() == ["reproduced", 2]
    rows.loc[rows["a"] == "dpo", "difference"] = 3
    assert verdicts(rows, [claim])[["verdict", "evidence"]].iloc[0].tolist() == ["cannot be tested here", "no task meets the condition"]


def test_claims_against_dpo_are_judged_twice(study):
    found = pd.read_csv(study[2] / "findings.csv").set_index("id")
    doubled = [c for c in CLAIMS if c.control]
    assert {c.id for c in doubled} >= {"catto-ece", "catto-accuracy", "ood-ece", "ood-accuracy", "c8-dpo"}
    assert {c.id for c in CLAIMS if c.a == "dpo_catto" and c.b == ("dpo",)} == {c.id for c in doubled if c.a == "dpo_catto"}
    # Planted: dpo_catto differs from dpo by its budget alone.
    assert found.loc["catto-ece", "verdict"] == found.loc["ood-ece", "verdict"] == "reproduced"
    assert found.loc["catto-ece-matched", "verdict"] == found.loc["ood-ece-matched", "verdict"] == "not reproduced"
    assert found.loc["catto-ece-matched", ["holds", "contradicted", "open"]].tolist() == [0, 0, 2]


def test_verdicts_of_the_planted_study(study):
    found = pd.read_csv(study[2] / "findings.csv").set_index("id")["verdict"]
    assert found[["dpo-ece", "bce-ece", "rcft-ece", "dpo-over", "catto-accuracy"]].eq("reproduced").all()
    assert found[["catto-rcft", "catto-bce", "dpo-accuracy", "c8-best", "rcft-time"]].eq("not reproduced").all()
    assert found[["sizes", "budget", "weight"]].eq("cannot be tested here").all()
    assert found[["goal-ece", "goal-ood", "goal-accuracy", "goal-oracle"]].eq("met").all()


def test_every_claim_states_its_rule_and_place():
    for claim in CLAIMS:
        assert claim.place and (claim.untestable or re.search(r"(95% interval|range over seeds) (above|below) ", rule_of(claim))), claim.id
    pairs, times = claimed_pairs()
    assert len(pairs) == len(set(pairs)) and {m for *_, m in times} == {"total_time", "step_time"}
    assert all(a in METHODS and (b in METHODS or b == "") for a, b, _ in pairs + times)


@pytest.mark.parametrize("goal, broken, expected", [
    ("goal-ece", {"metric": "ece", "difference": -11.0}, "partly"), ("goal-ece", {"metric": "ece", "high": 0.5}, "partly"),
    ("goal-ood", {"metric": "ece", "difference": -7.0}, "met"), ("goal-accuracy", {"metric": "accuracy", "difference": -1.2}, "partly"),
    ("goal-oracle", {"metric": "oracle_error", "high": 0.5}, "partly")])
def test_goals_can_fail(goal, broken, expected):
    values = {"ece": (-13.0, -15.0, -11.0), "accuracy": (0.5, -0.5, 1.5), "oracle_error": (-5.0, -6.0, -4.0)}
    rows = pd.DataFrame([{"trained_on": "mmlu" if out else t, "task": t, "a": "dpo_catto_label", "b": "dpo_matched", "metric": m, "difference": d, "low": low, "high": high, "seeds": 2}
                         for out in (False, True) for t in TASKS for m, (d, low, high) in values.items()])
    base = pd.DataFrame([{"task": t, "method": "dpo_matched", "metric": m, "mean": 20.0} for t in TASKS for m in values])
    judge = lambda rows: goals(rows, {"in": base, "out": base}).set_index("id")["verdict"]
    assert set(judge(rows)) == {"met"} and len(judge(rows)) == len(GOALS)
    worse = rows.copy()
    place = (worse["task"] == "a") & (worse["metric"] == broken["metric"])
    for column in set(broken) - {"metric"}:
        worse.loc[place, column] = broken[column]
    assert judge(worse)[goal] == expected
    if goal == "goal-ood":  # one task may fail, two may not
        worse.loc[(worse["task"] == "b") & (worse["metric"] == "ece"), "difference"] = -7.0
        assert judge(worse)[goal] == "partly"
    flipped = rows.assign(difference=-rows["difference"] - 2, low=-rows["high"], high=-rows["low"])
    assert judge(flipped)[goal] == "not met"
    base["mean"] = 0.0  # as of a model that is never right: nothing falls from 0
    assert judge(rows)[goal] == ("met" if "accuracy" in goal else "not met")


# At one learning rate ---------------------------------------------------------------------------------------------------

SMALL = "@preference_learning_rate=1e-05"
TWO_RATES = {"methods": "sft dpo dpo_matched dpo_catto dpo_catto_label", "preference_learning_rates": "1e-4 1e-5", "test_questions": 400}


def two_rates(root, **words):
    """Validation takes the small rate of DPO and of the label loss, whose models hardly leave SFT (0.10): by it DPO is no surer than SFT and the label
    loss no better than DPO on its budget (0.18, at the shared rate). At the shared rate DPO is at 0.20 and the label loss at 0.02."""
    settings = planted(**{**TWO_RATES, **words})
    facts = {(None, m + SMALL, None): {"validation_ece": 0.001} for m in ("dpo", "dpo_catto_label")}
    world = World(root, settings, facts=facts, shift={(None, "dpo" + SMALL, None): 0.10, (None, "dpo_catto_label" + SMALL, None): 0.18})
    return settings, world.make(pools=False, every_rate=True)


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    root = tmp_path_factory.mktemp("rates")
    settings, world = two_rates(root)
    write_report(settings, root)
    return settings, world, root / "figures" / "mini"


def test_every_method_at_one_rate_beside_the_rate_of_validation(rates):
    settings, world, figures = rates
    main, same = table(figures, 1).set_index(["task", "method", "metric"]), pd.read_csv(figures / "same_rate.csv").set_index(["task", "method", "metric"])
    for task in settings.tasks:
        for view, run in ((main, "dpo" + SMALL), (same, "dpo")):
            answers = [world.answers(task, task, "dpo", seed, run=run) for seed in settings.seeds]
            eces = [100 * expected_calibration_error(a["confidence"].to_numpy(), a["correct"].to_numpy(), settings.ece_bins) for a in answers]
            assert view.loc[(task, "dpo", "ece"), ["mean", "sd"]].tolist() == pytest.approx([np.mean(eces), np.std(eces, ddof=1)], abs=1e-3)
        row = same.loc[task, "dpo", "oracle_error"]
        assert row["minus_sft"] == pytest.approx(10, abs=0.3) and row["minus_dpo_matched"] == pytest.approx(2, abs=0.3) and row["minus_sft_low"] > 0
        assert row[["learning_rate", "table1_rate", "seeds", "n"]].tolist() == [1e-4, 1e-5, 2, 400]
        # What has one rate, or was chosen at the shared one, is the same run in both.
        for method in ("sft", "dpo_matched", "dpo_catto"):
            assert same.loc[(task, method, "ece"), "mean"] == main.loc[(task, method, "ece"), "mean"]
    assert set(same.index.get_level_values("method")) == set(settings.methods) and np.isnan(same.loc[("snli", "sft", "ece"), "table1_rate"])
    text = (figures / "same_rate.md").read_text()
    assert "learning rate 0.0001" in text and "nearer to SFT" in text and "| `dpo` | 1e-05 | 1e-05 |" in text and "nan" not in text and "| `dpo` | 10.0 | 10.0 |" in text.partition("inverted")[2] and "Not in the means" not in text
    assert set(same["trained_on"]) == set(settings.tasks)  # out of distribution there is one rate as it stands


def test_second_lines_are_judged_at_one_rate_by_the_same_rules(rates):
    found = pd.read_csv(rates[2] / "findings.csv")
    by, again = found.set_index("id"), [i for i in found["id"] if i.endswith("-same-rate")]
    assert again == [f"{i}-same-rate" for i in ("dpo-accuracy", "dpo-ece", "catto-closer-matched", "rcft-ece", "rcft-cost-accuracy", "catto-ece-matched",
                                                "catto-accuracy-matched", "catto-rcft", "goal-ece", "goal-accuracy", "goal-oracle")]
    for name in again:
        first = by.loc[name.removesuffix("-same-rate")]
        assert by.loc[name, "rule"] == first["rule"] and by.loc[name, "claim"] == first["claim"] + ", at one learning rate"
        assert list(found["id"]).index(name) == list(found["id"]).index(first.name) + 1  # one line below
    assert by.loc[["dpo-ece", "dpo-ece-same-rate"], "verdict"].tolist() == ["not reproduced", "reproduced"]
    assert by.loc[["goal-ece", "goal-ece-same-rate"], "verdict"].tolist() == ["not met", "met"]
    assert by.loc[["catto-ece-matched", "catto-ece-matched-same-rate"], "verdict"].tolist() == ["not reproduced"] * 2
    text = (rates[2] / "findings.md").read_text()
    assert "most benchmarks, at one learning rate (4.2, Table 1) | **reproduced**" in text and "every task, at one learning rate | **met**" in text


def test_a_lost_run_may_count_against_a_claim_and_never_for_it():
    claim = next(c for c in CLAIMS if c.id == "catto-ece")
    row = {"a": "dpo_catto", "b": "dpo", "metric": "ece", "difference": -5.0, "low": -6.0, "high": -4.0, "seeds": 2}
    found = pd.DataFrame([row | {"trained_on": t, "task": t} for t in ("snli", "tldr")])
    lost = lambda *tasks, what="in distribution": pd.DataFrame([{"trained_on": t, "task": t, "method": "dpo_catto", "seed": 0, "what": what, "why": "diverged"}
                                                                for t in tasks], columns=["trained_on", "task", "method", "seed", "what", "why"])
    say = lambda absent: verdicts(found, [replace(claim, control=False)], absent=absent)[["verdict", "tasks", "holds"]].iloc[0].tolist()
    assert say(lost()) == ["reproduced", 2, 2]
    assert say(lost("anli")) == ["partly", 3, 2]  # no number at all
    assert say(lost("snli")) == ["partly", 2, 1]  # one of its seeds
    assert say(lost("anli", what="candidates")) == ["reproduced", 2, 2]  # another table's
    goal = found.assign(a="dpo_catto_label", b="dpo_matched", difference=-15.0, low=-16.0, high=-14.0)
    base = pd.DataFrame([{"task": t, "method": "dpo_matched", "metric": "ece", "mean": 20.0} for t in ("snli", "tldr")])
    judge = lambda absent: goals(goal, {"in": base, "out": base}, absent=absent.assign(method="dpo_catto_label")).set_index("id").loc["goal-ece", ["verdict", "tasks", "holds"]].tolist()
    assert judge(lost()) == ["met", 2, 2] and judge(lost("anli")) == ["partly", 3, 2] and judge(lost("snli")) == ["partly", 2, 1]


def test_questions_that_seeds_share_are_drawn_once_for_all_of_them():
    rng = np.random.default_rng(0)
    z = rng.random(400) < 0.7
    rows = lambda seed, ids: pd.DataFrame({"trained_on": "snli", "task": "snli", "method": "dpo", "seed": seed, "id": ids, "confidence": 0.9, "correct": z})
    width = lambda frames: np.ptp(np.percentile(np.mean(list(resample(pd.concat(frames), calibration_metrics)["snli", "snli", "dpo", "accuracy"].values()), 0)[1:], [2.5, 97.5]))
    one = width([rows(0, range(400))])
    assert one == pytest.approx(100 * 2 * 1.96 * np.sqrt(z.mean() * (1 - z.mean()) / 400), rel=0.1)
    assert width([rows(s, range(400)) for s in range(4)]) == pytest.approx(one, rel=1e-9)  # the same questions again say nothing new
    assert width([rows(s, range(400 * s, 400 * s + 400)) for s in range(4)]) == pytest.approx(one / 2, rel=0.1)


def test_the_papers_tables_are_an_input_of_the_report(tmp_path, monkeypatch):
    settings = planted(tasks="snli", ood_task="", methods="sft dpo", test_questions=20, bootstrap_resamples=10)
    World(tmp_path, settings).make()
    shutil.copytree(Path(__file__).parents[1] / "data" / "paper", tmp_path / "paper")
    monkeypatch.setattr("catto.report._paper_folder", lambda: tmp_path / "paper")
    first = write_report(settings, tmp_path)
    assert write_report(settings, tmp_path)["key"] == first["key"]
    printed = tmp_path / "paper" / "table01.csv"
    lines = printed.read_text().splitlines()
    printed.write_text("\n".join([line.replace(line.split(",")[-1], "1.5") if line.startswith("dpo,snli,") else line for line in lines]) + "\n")
    assert write_report(settings, tmp_path)["key"] != first["key"]
    assert 1.5 in table(tmp_path / "figures/mini", 1)["paper"].tolist()


def test_readme_counts_claims_by_the_papers_rule(rates):
    contrasts, judged, same = (pd.read_csv(rates[2] / f"{name}.csv") for name in ("contrasts", "findings", "same_rate"))
    main = judged[~judged["id"].str.endswith("-same-rate")]
    text, plain = headline(contrasts, judged, same), headline(contrasts, main)
    second = [line for line in text.splitlines() if line.startswith("| *one learning rate (0.0001):* ")]
    assert [line for line in text.splitlines() if line not in second] == plain.splitlines() and len(main) < len(judged) and len(second) == 3
    rows = same[(same["method"] == "dpo") & (same["trained_on"] == same["task"])].set_index("metric")["minus_sft"]
    span = {metric: f"{rows[metric].min():+.1f} to {rows[metric].max():+.1f}" for metric in ("ece", "accuracy")}
    assert f"DPO − SFT | {span['ece']} | 0 of 2 | 2 of 2 | {span['accuracy']} |" in second[0]
    assert "label calibration − DPO on CATTO's budget | -" in second[2] and "| 2 of 2 | 0 of 2 |" in second[2]
    plain, lines = results_markdown(table(rates[2], 1), contrasts), results_markdown(table(rates[2], 1), contrasts, same)
    assert lines.startswith(plain) and lines.count("| *one rate*,") == 4 and "validation chose, as in the paper" in lines
    assert max(map(len, lines.splitlines()[:-1])) < 150


def test_what_is_missing_or_damaged_at_the_shared_rate_is_named(tmp_path):
    settings, _ = two_rates(tmp_path, tasks="snli", ood_task="", methods="sft dpo dpo_catto_label", test_questions=60)
    folder = run_folder(tmp_path, settings, "snli", 1, "dpo")
    whole = (folder / "predictions_test.parquet").read_bytes()
    (folder / "predictions_test.parquet").write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"1 damaged file:\n.*snli/seed1/dpo/predictions_test.parquet.*run=Run\('dpo'\)\)"):
        write_report(settings, tmp_path)
    with pytest.raises(ValueError) as error:
        load_runs(settings, tmp_path, shared_rate=True)
    program = re.search(r'python -c "(.*)"$', str(error.value))[1]
    assert "from catto.methods import Run;" in program and compile(program, "remedy", "exec")
    assert len(load_runs(settings, tmp_path).predictions) == 3 * 2 * 60  # validation chose another run, which is whole
    for name in ("eval.json", "predictions_test.parquet"):
        (folder / name).unlink()
    write_report(settings, tmp_path)
    same = pd.read_csv(tmp_path / "figures/mini/same_rate.csv").set_index(["method", "metric"])
    assert same.loc[("dpo", "ece"), "seeds"] == 1 and same.loc[("sft", "ece"), "seeds"] == 2
    assert "Missing: `dpo` of snli, seed 1." in (tmp_path / "figures/mini/same_rate.md").read_text()
    assert "Missing" not in (tmp_path / "figures/mini/table01.md").read_text()
    for folder in tmp_path.glob("data/runs/mini/snli/seed*"):
        for name in settings.methods:
            (folder / name / "eval.json").unlink(missing_ok=True)
    # sft has one run: now it is missing for both views, and nothing is left at the shared rate.
    write_report(settings, tmp_path)
    text = (tmp_path / "figures/mini/same_rate.md").read_text()
    assert "`dpo` of snli, seed 0, `dpo` of snli, seed 1" in text and text.endswith("No runs.\n")
    judged = pd.read_csv(tmp_path / "figures/mini/findings.csv").set_index("id")
    assert judged.loc["dpo-ece-same-rate", "verdict"] == judged.loc["goal-ece-same-rate", "verdict"] == "cannot be tested here"


# Failure signatures -----------------------------------------------------------------------------------------------------

def signs(root, settings, **changes):
    World(root, settings, **changes).make(pools=False)
    write_report(settings, root)
    found = pd.read_csv(root / "figures/mini/signatures.csv", keep_default_na=False)
    return {(r.trained_on, r.task, r.method, r.seed, r.signature, r.against) for r in found.itertuples()}, (root / "figures/mini/signatures.md").read_text()


FEW = {"tasks": "snli", "ood_task": "mmlu", "methods": "sft dpo dpo_matched dpo_bce", "preference_learning_rates": "1e-4"}
HERE = {"shift": {(None, m, None): 0.1 for m in ("sft", "dpo", "dpo_matched", "dpo_bce")}}


def test_no_signature_where_nothing_is_wrong(tmp_path):
    found, text = signs(tmp_path, planted(**FEW), **HERE)
    assert not found and text == "No run shows a failure signature.\n"


def test_each_signature_is_named_where_it_was_planted(tmp_path):
    facts = {("snli", "dpo", 1): {"validation_ece": 0.01}, ("snli", "sft", None): {"validation_ece": 0.3}, ("snli", "dpo_matched", None): {"validation_ece": 0.3},
             ("snli", "dpo_bce", None): {"validation_ece": 0.3}, ("mmlu", "dpo", 0): {"inverted_pairs": 0.16}}
    shift = HERE["shift"] | {("snli", "dpo", 1): 0.25}
    found, text = signs(tmp_path, planted(**FEW), shift=shift, facts=facts, lift={("snli", "dpo_bce", 0): -0.1}, unparsed={("mmlu", "dpo_bce", 1): 0.1})
    assert found == {("snli", "snli", "dpo_bce", 0, "accuracy drop", "dpo_matched"), ("snli", "snli", "dpo_bce", 0, "accuracy drop", "sft"),
                     ("snli", "snli", "dpo", 1, "validation and test disagree", "sft"), ("mmlu", "snli", "dpo", 0, "inverted pairs", "dpo_matched"),
                     ("mmlu", "snli", "dpo_bce", 1, "format lost", "")}
    assert len(text.splitlines()) == len(found) and "**format lost**: `dpo_bce`, snli (trained on mmlu), seed 1: 90.0% parsed" in text


def test_a_small_change_is_no_signature(tmp_path):
    # Validation falls while test rises, but by less than the noise of either.
    facts = {("snli", m, None): {"validation_ece": 0.300} for m in ("sft", "dpo_matched", "dpo_bce")} | {("snli", "dpo", None): {"validation_ece": 0.299}}
    found, _ = signs(tmp_path, planted(**FEW), shift=HERE["shift"] | {("snli", "dpo", None): 0.25}, facts=facts, lift={("snli", "dpo_bce", None): -0.005})
    assert not found


# What is not there ------------------------------------------------------------------------------------------------------

def test_a_diverged_run_is_said_and_stops_nothing(tmp_path):
    settings = planted(tasks="snli", methods="sft dpo dpo_matched dpo_bce dpo_catto")
    diverged = {("snli", "dpo_bce", None): True, ("snli", "dpo_catto", 1): True, ("mmlu", "dpo_matched", None): True}
    World(tmp_path, settings, diverged=diverged).make()
    manifest = write_report(settings, tmp_path)
    figures = tmp_path / "figures/mini"
    text = (figures / "table01.md").read_text()
    assert "| `dpo_bce` | diverged |" in text and "Diverged: `dpo_bce` of snli, seed 0, `dpo_bce` of snli, seed 1, `dpo_catto` of snli, seed 1." in text
    rows = table(figures, 1).set_index(["method", "metric"])
    assert rows.loc[("dpo_catto", "ece"), "seeds"] == 1 and "dpo_bce" not in rows.index.get_level_values(0)
    assert pd.read_csv(figures / "contrasts.csv").query("a == 'dpo_catto' and b == 'dpo_matched' and metric == 'ece' and trained_on == 'snli'")["seeds"].item() == 1
    for number, method in ((2, "dpo_matched"), (3, "dpo_bce"), (4, "dpo_bce"), (5, "dpo_matched"), (6, "dpo_bce")):
        text = (figures / f"table{number:02d}.md").read_text()
        assert f"| `{method}` | diverged |" in text and f"`{method}` of snli, seed 0" in text, number
    assert "0.0001: 18.0; diverged in seed 1" in (figures / "table08.md").read_text() and table(figures, 8).query("method == 'dpo_catto'")["diverged"].any()
    assert {"dpo_bce", "dpo_catto", "dpo_matched"} == set(pd.read_csv(figures / "signatures.csv").query("signature == 'diverged'")["method"])
    assert manifest["diverged"] == 2 + 1 + 2 + 3  # answers, answers out of distribution, and three pools


def test_answers_without_a_label_are_said_above_the_table_and_below_the_verdicts(tmp_path):
    settings = planted(**FEW)
    World(tmp_path, settings, unparsed={("mmlu", "dpo", None): 0.6, ("mmlu", "sft", None): 0.4}).make(pools=False)
    write_report(settings, tmp_path)
    one, two, findings = ((tmp_path / "figures/mini" / f"{name}.md").read_text() for name in ("table01", "table02", "findings"))
    note = "Fewer than half of the answers (mean over seeds) have a valid label on snli (`dpo`)."
    assert note in two and f"Out of distribution: {note}" in findings and "valid label" not in one and "the ECE is the accuracy" not in two


@pytest.mark.parametrize("words, pools, says", [
    ({"tasks": "commonsense_qa", "seeds": "0", "ood_task": "", "methods": "sft"}, False, {2: "No runs.", 3: "run 05_confidence_at_k", 7: "No runs.", 11: "No runs."}),
    ({"tasks": "snli", "seeds": "3", "ood_task": "", "methods": "sft dpo_bce"}, True, {2: "No runs.", 5: "No runs."}),
    ({"tasks": "snli", "ood_task": "mmlu", "methods": "sft dpo"}, False, {3: "run 05_confidence_at_k", 6: "No runs."})])
def test_a_part_of_the_study_gives_a_report(tmp_path, words, pools, says):
    settings = planted(**words)
    World(tmp_path, settings).make(pools=pools)
    write_report(settings, tmp_path)
    for number in range(1, 13):
        table(tmp_path / "figures/mini", number)
        text = (tmp_path / f"figures/mini/table{number:02d}.md").read_text()
        assert text and "nan" not in text and says.get(number, "") in text, number


def test_missing_runs_are_named_in_the_tables(tmp_path):
    settings = planted(tasks="snli", ood_task="", methods="sft dpo", seeds="0 1")
    World(tmp_path, settings).make()
    for name in ("eval.json", "predictions_test.parquet"):
        (run_folder(tmp_path, settings, "snli", 1, "dpo") / name).unlink()
    write_report(settings, tmp_path)
    assert "Missing: `dpo` of snli, seed 1." in (tmp_path / "figures/mini/table01.md").read_text()
    assert table(tmp_path / "figures/mini", 1).set_index(["method", "metric"]).loc[("dpo", "ece"), "seeds"] == 1


DAMAGE = {"truncated": lambda path: path.write_bytes(path.read_bytes()[:-50]), "changed": lambda path: path.write_bytes(path.read_bytes() + b" "),
          "gone": lambda path: path.unlink(), "empty": lambda path: path.write_bytes(b""),
          "another": lambda path: pd.read_parquet(path).assign(confidence=0.5).to_parquet(path)}  # whole, and of another run


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("trained_on, name, call", [
    ("snli", "predictions_test.parquet", "evaluate_method(s, 'snli', 1, 'dpo', "), ("snli", "pool_test.parquet", "sample_pool(s, 'snli', 1, 'dpo', "),
    ("mmlu", "predictions_test_snli.parquet", "tested_on='snli')")])
def test_a_damaged_file_is_named_with_its_remedy(tmp_path, damage, trained_on, name, call):
    settings = planted(tasks="snli", methods="sft dpo")
    World(tmp_path, settings).make()
    DAMAGE[damage](run_folder(tmp_path, settings, trained_on, 1, "dpo") / name)
    with pytest.raises(ValueError) as error:
        write_report(settings, tmp_path)
    text = str(error.value)
    assert "1 damaged file:" in text and f"{trained_on}/seed1/dpo/{name}" in text and call in text and "python -c" in text
    assert not (tmp_path / "figures").exists()


@pytest.mark.parametrize("name, call", [("eval.json", "evaluate_method"), ("train.json", "train_runs")])
def test_a_damaged_manifest_is_named_too(tmp_path, name, call):
    settings = planted(tasks="snli", ood_task="", methods="sft dpo", preference_learning_rates="1e-4")
    World(tmp_path, settings).make()
    (run_folder(tmp_path, settings, "snli", 1, "dpo") / name).write_text('{"key": "k", "out')
    with pytest.raises(ValueError, match=rf"dpo/{name} is damaged; make it again: .*{call}\(s"):
        write_report(settings, tmp_path)


def test_the_command_of_an_error_is_a_program(tmp_path):
    settings = planted(tasks="snli", ood_task="", methods="sft dpo")
    World(tmp_path, settings).make()
    (run_folder(tmp_path, settings, "snli", 1, "dpo") / "predictions_test.parquet").unlink()
    with pytest.raises(ValueError) as error:
        load_runs(settings, tmp_path)
    program = re.search(r'python -c "(.*)"$', str(error.value))[1]
    compile(program, "remedy", "exec")
    # Without questions there is nothing to answer: the command runs as far as the first file that is not here.
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    assert done.returncode and "FileNotFoundError" in done.stderr, done.stderr


def test_a_report_is_made_again_only_when_something_changed(study):
    settings, world, figures, manifest = study
    before = {path.name: path.stat().st_mtime_ns for path in figures.iterdir()}
    assert write_report(settings, world.root)["key"] == manifest["key"]
    assert before == {path.name: path.stat().st_mtime_ns for path in figures.iterdir()}


def test_figures_are_the_same_bytes_again_and_well_formed(study, tmp_path):
    settings, world, figures, _ = study
    small = planted(tasks="snli", ood_task="", methods="sft dpo")
    for root in (tmp_path / "a", tmp_path / "b"):
        World(root, small).make(pools=False)
        write_report(small, root)
    for path in (tmp_path / "a/figures/mini").iterdir():
        assert path.read_bytes() == (tmp_path / "b/figures/mini" / path.name).read_bytes(), path.name
    for path in figures.glob("*.svg"):
        ET.parse(path)
        assert path.stat().st_size < 600_000, path.name
    text = (figures / "reliability_snli.svg").read_text()
    assert all(METHODS[m].title.replace("'", "&#39;") in text or METHODS[m].title in text for m in settings.methods)


def test_markdown_tables_have_as_many_cells_as_columns(study):
    for path in study[2].glob("*.md"):
        columns = None
        for line in path.read_text().splitlines():
            cells = len(re.findall(r"(?<!\\)\|", line))
            if line.startswith("|"):
                columns = cells if columns is None else columns
                assert cells == columns, f"{path.name}: {line}"
            else:
                columns = None


def test_the_readmes_recipe_is_that_of_these_results(study, tmp_path):
    readme, figures = tmp_path / "README.md", tmp_path / "figures"
    shutil.copytree(study[2], figures)
    readme.write_text("".join(f"<!-- {name}: x -->\nstale\n<!-- /{name} -->\n" for name in ("findings", "results", "recipe")))
    update_readme(readme, figures)
    assert "made without the sweep" in readme.read_text() and "stale" not in readme.read_text()
    (figures / "recipe.md").write_text("Recommended on validation: `bce`.\n\n| a | table |\n")
    update_readme(readme, figures)
    assert "Recommended on validation: `bce`. The recipes beside it: [recipe.md](figures/recipe.md)." in readme.read_text()
    assert "| a | table |" not in readme.read_text() and "made without" not in readme.read_text()


def test_update_readme_writes_only_between_its_marks(study, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("top\n<!-- findings: a -->\n<!-- /findings -->\nmiddle\n<!-- results: b -->\nstale\n<!-- /results -->\nend\n")
    update_readme(readme, study[2])
    text = readme.read_text()
    assert text.startswith("top\n") and "\nmiddle\n" in text and text.endswith("end\n") and "stale" not in text
    contrasts, judged, same = (pd.read_csv(study[2] / f"{name}.csv") for name in ("contrasts", "findings", "same_rate"))
    assert results_markdown(table(study[2], 1), contrasts, same) in text and headline(contrasts, judged, same) in text
    assert "| *one rate*, ECE: `dpo` − `sft` |" in text and "| *one learning rate (0.0001):* DPO − SFT |" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("| `")) < 140  # narrow enough for a page
    update_readme(readme, study[2])
    assert readme.read_text() == text


def test_results_do_not_depend_on_the_other_tasks(study, tmp_path):
    "Resamples are shared within a seed and made from it, so a table does not change when a task or a method is left out."
    whole = study[2]
    small = planted(tasks="anli", ood_task="", methods="sft dpo dpo_matched dpo_bce", test_questions=study[0].test_questions)
    World(tmp_path, small).make(pools=False)
    contrasts = compute_results(small, tmp_path).contrasts
    columns = ["task", "a", "b", "metric"]
    both = contrasts.merge(pd.read_csv(whole / "contrasts.csv").query("trained_on == 'anli'"), on=columns, suffixes=("", "_whole"))
    both = both[~both["metric"].str.endswith("_time")]
    off = both[["difference", "low", "high"]].to_numpy() - both[["difference_whole", "low_whole", "high_whole"]].to_numpy()
    assert len(both) > 10 and np.abs(off).max() < 1e-4
