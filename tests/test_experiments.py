"""The experiments beyond the paper's tables, on planted run folders: what is shown, what is skipped, what is refused."""
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from catto.claims import read_claims
from catto.eval import expected_calibration_error
from catto.experiments import (
    RECIPE, REFERENCE, Case, Outcome, cal_dpo_cases, check_gradients, compare, gradient_bound, gradient_cases, gradient_table, plot_sweep, read_outcome, recipe_of, recommend,
    sequence_cases, sweep_cases, sweep_runs, sweep_table, transfer_cases, what_is_missing, write_experiments)
from catto.methods import METHODS, Run
from catto.settings import file_hash, load, run_folder

TASKS = ("snli", "anli")


@pytest.fixture(scope="module")
def settings():
    "Two tasks, two seeds, a sweep of a few runs."
    return replace(load("smoke"), tasks=TASKS, ood_task="mmlu", seeds=(0, 1), sweeps=True, sweep_seeds=(0, 1), sweep_weights=(0.0, 0.1, 1.0),
                   sweep_forms=("linear", "bce"), sweep_tokens=("all", "label"), sweep_scales=(1.0, 2.0), sweep_betas=(0.1, 0.5), beta=0.1,
                   preference_learning_rates=(1e-4,), bootstrap_resamples=50, label_weight=0.1, label_form="bce", label_scale=1.0,
                   methods=("sft", "dpo", "dpo_matched", "rcft", "dpo_bce", "dpo_catto", "dpo_catto_label", "cal_dpo", "cal_dpo_ipo"))


def answers(gap, seed, n=200):
    "Predictions that are right with probability c, and say c + gap."
    rng = np.random.default_rng(seed)
    c = rng.uniform(0.3, 0.8, n)
    said = np.clip(c + gap, 0, 1)
    return pd.DataFrame({"id": np.arange(n).astype(str), "confidence": said, "correct": rng.random(n) < c, "parsed": True, "text": "-", "mean_prob": 0.9,
                         "mean_log_prob": np.log(0.8), "min_prob": said / 2, "last_prob": 1.0})


def gap_of(case, settings):
    "What is planted: bce on the label token calibrates, more so at home; everything else is 20 points too sure."
    form, tokens, scale, weight = recipe_of(case.run, settings).values()
    return (0.0 if case.tested_on in (None, case.task) else 0.1) if (form, tokens, scale) == ("bce", "label", 1.0) else 0.2


def plant(root, case, settings, diverged=False):
    "The files and manifests of one case."
    folder = run_folder(root, settings, case.task, case.seed, case.run.name)
    folder.mkdir(parents=True, exist_ok=True)
    away = f"_{case.tested_on}" if case.tested_on not in (None, case.task) else ""
    if diverged:
        for name in ("train", f"eval{away}"):
            (folder / f"{name}.json").write_text(json.dumps({"key": "k", "outputs": {}, "diverged": True}))
        return
    number = 10 * case.seed + TASKS.index(case.task) if case.task in TASKS else 7
    steps = pd.DataFrame({"step": [10, 20], "rewards/chosen": [0.0, 0.25], "rewards/rejected": [0.0, -0.25]})
    if recipe_of(case.run, settings)["weight"]:
        steps["calibration/largest_gradient"] = [0.05, 0.08]
    tables = {"training_log.csv": steps, "predictions_validation.parquet": answers(gap_of(case._replace(tested_on=None), settings), number + 100),
              f"predictions_test{away}.parquet": answers(gap_of(case, settings), number)}
    for name, table in tables.items():
        table.to_csv(folder / name, index=False) if name.endswith("csv") else table.to_parquet(folder / name, index=False)
    train, test = [{name: file_hash(folder / name) for name in names} for names in (list(tables)[:2], list(tables)[2:])]
    (folder / "train.json").write_text(json.dumps({"key": "k", "outputs": train, "diverged": False, "rewards_inside": 0.5, "validation_ece": 0.1}))
    (folder / f"eval{away}.json").write_text(json.dumps({"key": "k", "outputs": test}))


def all_cases(settings, root):
    return list(dict.fromkeys([*sweep_cases(settings), *cal_dpo_cases(settings), *gradient_cases(settings), *transfer_cases(settings), *sequence_cases(settings, root)]))


@pytest.fixture(scope="module")
def written(settings, tmp_path_factory):
    "A root folder with every run of the settings, and what was written from them; not to be changed."
    root = tmp_path_factory.mktemp("written")
    for case in all_cases(settings, root):
        plant(root, case, settings)
    write_experiments(settings, root)
    return root


@pytest.fixture
def planted(written, tmp_path):
    "The runs alone, to be changed."
    shutil.copytree(written / "data", tmp_path / "data", ignore=shutil.ignore_patterns("experiments.json"))
    return tmp_path


@pytest.fixture
def table(written, settings):
    "The table of the weight sweep."
    return pd.read_csv(figures(written, settings) / "lambda_sweep.csv")


def figures(root, settings):
    return root / "figures" / settings.profile


def test_every_recipe_is_trained_once(settings):
    runs = sweep_runs(settings)
    assert len({run.name for run in runs}) == len(runs)
    recipes = [tuple(recipe_of(run, settings).values()) for run in runs]
    assert len(set(recipes)) == len(recipes) and recipes[0][-1] == 0 and runs[0].name == "dpo_matched"
    wanted = {(form, tokens, scale, weight) for form in ("linear", "bce") for tokens in ("all", "label") for weight in (0.1, 1.0)
              for scale in ((1.0, 2.0) if (form, tokens) == ("bce", "label") else (1.0,))}
    assert set(recipes[1:]) == wanted


def test_a_run_is_what_its_recipe_says_under_other_settings(settings):
    "A profile whose own dpo_catto is not the printed one sweeps the same recipes."
    other = replace(settings, calibration_form="bce", calibration_tokens="label", calibration_weight=1.0, surrogate_scale=2.0)
    def recipes(s):
        return [tuple(recipe_of(run, s).values()) for run in sweep_runs(s)]
    assert recipes(other) == recipes(settings)
    assert Run("dpo_catto") in sweep_runs(other)  # its own recipe needs no training of its own
    for run in sweep_runs(other)[1:]:
        assert METHODS[run.method].options(run.settings(other))["calibration_weight"] == recipe_of(run, other)["weight"]


def test_all_parts_are_written(settings, written):
    manifest = json.loads((written / "data" / "runs" / settings.profile / "experiments.json").read_text())
    names = {Path(name).name for name in manifest["outputs"]}
    assert names == {*(f"{name}.{kind}" for name in ("lambda_sweep", "cal_dpo", "gradients", "transfer", "sequence") for kind in ("csv", "svg")),
                     "lambda_means.csv", "recipe.csv", "recipe.md", "experiments.md"}
    assert all((figures(written, settings) / name).is_file() for name in names)
    assert not any("not run" in text.lower() or "diverged" in text for text in manifest["parts"].values()), manifest["parts"]
    assert manifest["parts"]["lambda_sweep"].startswith(f"Recommended on validation (seed 0, 1, every run at the learning rate {settings.preference_learning_rate:g}): ")
    assert re.search(r"in all of \d+ runs. Of the forms that the paper's ¼ does not cover, 0 of \d+ runs go above it.", manifest["parts"]["gradients"])
    assert "mean over pairs of tasks (6 with 2 seeds): `" in manifest["parts"]["transfer"] and "valid label" not in manifest["parts"]["transfer"]


def test_numbers_of_the_sweep_are_those_of_the_predictions(settings, written):
    table = pd.read_csv(figures(written, settings) / "lambda_sweep.csv")
    assert len(table) == len(sweep_cases(settings))
    for _, row in table.sample(5, random_state=0).iterrows():
        folder = run_folder(written, settings, row["task"], row["seed"], row["run"])
        for where in ("validation", "test"):
            rows = pd.read_parquet(folder / f"predictions_{where}.parquet")
            assert row[f"{where}_ece"] == pytest.approx(100 * expected_calibration_error(rows["confidence"], rows["correct"], 20), abs=1e-5)
            assert row[f"{where}_accuracy"] == pytest.approx(100 * rows["correct"].mean(), abs=1e-5)
            assert row[f"{where}_parse_rate"] == 100 and 0 < row[f"{where}_ece_floor"] < 10 and row[f"{where}_ece_debiased"] < row[f"{where}_ece"]
    same = table[(table["form"] == "linear")]
    assert (same["ece_difference"] == 0).all()  # the very predictions of dpo_matched were written


def test_the_mean_interval_is_narrower_than_those_of_its_runs(settings, written):
    table, means = (pd.read_csv(figures(written, settings) / f"lambda_{name}.csv").set_index(RECIPE).sort_index() for name in ("sweep", "means"))
    recipe = ("bce", "label", 1.0, 0.1)
    whole, each = means.loc[recipe], table.loc[recipe]
    assert whole["ece_difference"] == pytest.approx(each["ece_difference"].mean(), abs=1e-5)
    assert whole["ece_high"] - whole["ece_low"] < (each["ece_high"] - each["ece_low"]).min()
    assert whole["ece_high"] < -5 and (whole["runs"], whole["of"]) == (4, 4)


def test_the_recipe_is_chosen_on_validation(settings, written, table):
    recipe = pd.read_csv(figures(written, settings) / "recipe.csv")
    assert recipe["recommended"].tolist() == [True] + [False] * (len(recipe) - 1)
    assert recipe.loc[0, RECIPE[:3]].tolist() == ["bce", "label", 1.0]
    worse = table.assign(test_ece=99.0, test_accuracy=1.0, ece_low=99.0, ece_high=99.0)
    assert recommend(worse)["recommended"].tolist() == recommend(table)["recommended"].tolist()
    assert recommend(worse)[RECIPE].equals(recommend(table)[RECIPE])
    # On validation alone: make another recipe the best there.
    other = (table["form"] == "bce") & (table["tokens"] == "all") & (table["weight"] == 1.0)
    assert recommend(table.assign(validation_ece=table["validation_ece"].mask(other, 0.1))).loc[0, RECIPE].tolist() == ["bce", "all", 1.0, 1.0]


@pytest.mark.parametrize("cost, chosen", [(0.9, True), (1.1, False)])
def test_a_recipe_may_cost_one_point(table, cost, chosen):
    calibrated = (table["form"] == "bce") & (table["tokens"] == "label") & (table["scale"] == 1)
    table["validation_accuracy"] -= cost * calibrated
    assert bool(recommend(table).loc[0, "recommended"]) == chosen


def test_the_printed_form_is_never_recommended(table):
    best = table.assign(validation_ece=table["validation_ece"].mask(table["form"] == "linear", 0.0))
    assert recommend(best).loc[0, "form"] == "bce"


def test_transfer_numbers(settings, written):
    table = pd.read_csv(figures(written, settings) / "transfer.csv").set_index(["trained_on", "tested_on", "method"]).sort_index()
    assert len(table) == 3 * 3 * 4 and (table["seeds"] == 2).all() and (table["state"] == "done").all()
    home, away = (table.loc[("snli", task, "dpo_catto_label")] for task in ("snli", "anli"))
    assert home["ece_high_dpo_matched"] < away["ece_high_dpo_matched"] < 0
    assert table.loc[("mmlu", "anli", "dpo_catto"), "ece_difference_rcft"] == 0
    assert table["ece_difference_rcft"].isna().groupby("method").all().to_dict() == {
        "dpo_matched": True, "rcft": True, "dpo_catto": False, "dpo_catto_label": False}


def test_without_sweeps_nothing_old_is_shown(settings, planted):
    "Sweep runs of another day lie there, but this run did not ask for them."
    plain = replace(settings, sweeps=False)
    figures(planted, plain).mkdir(parents=True, exist_ok=True)
    (figures(planted, plain) / "recipe.md").write_text("the recipe of another day")
    manifest = write_experiments(plain, planted)
    assert manifest["parts"]["lambda_sweep"] == "Not run: `sweeps = false`."
    assert not any("lambda" in name or "recipe" in name for name in manifest["outputs"])
    assert not [path.name for path in figures(planted, plain).iterdir() if "lambda" in path.name or "recipe" in path.name]
    pairs = pd.read_csv(figures(planted, plain) / "transfer.csv")[["trained_on", "tested_on"]].drop_duplicates()
    assert {tuple(pair) for pair in pairs.values} == {("snli", "snli"), ("anli", "anli"), *(("mmlu", task) for task in ("snli", "anli", "mmlu"))}


def test_a_seed_that_the_run_has_not_is_not_swept(settings):
    assert {case.seed for case in sweep_cases(replace(settings, seeds=(1, 2)))} == {1}


def test_diverged_runs_are_shown_and_stop_nothing(settings, written, planted):
    lost = Run("dpo_catto", {"calibration_form": "bce", "calibration_tokens": "label"})
    assert lost in sweep_runs(settings)
    for run in (lost, Run("cal_dpo_ipo"), Run("rcft")):
        plant(planted, Case("snli", 0, run), settings, diverged=True)
    manifest = write_experiments(settings, planted)
    sweep = pd.read_csv(figures(planted, settings) / "lambda_sweep.csv")
    row = sweep[(sweep["run"] == lost.name) & (sweep["task"] == "snli") & (sweep["seed"] == 0)].iloc[0]
    assert row["state"] == "diverged" and np.isnan(row["test_ece"])
    recipe = pd.read_csv(figures(planted, settings) / "recipe.csv")
    assert recipe.loc[0, "weight"] == 1.0 and recipe.loc[0, "recommended"]  # the other weight, which is whole
    transfer = pd.read_csv(figures(planted, settings) / "transfer.csv").set_index(["trained_on", "tested_on", "method"])["state"]
    assert transfer["snli", "snli", "rcft"] == "diverged" and transfer["anli", "snli", "rcft"] == "done"
    sequence = pd.read_csv(figures(planted, settings) / "sequence.csv").set_index(["task", "method"])["state"].sort_index()
    assert set(sequence.loc["snli", "rcft"]) == {"diverged"}
    for part in ("lambda_sweep", "cal_dpo", "transfer", "sequence"):
        assert "diverged, such as" in manifest["parts"][part]
    for name in ("lambda_sweep", "cal_dpo", "transfer", "sequence"):
        assert "diverged" in (figures(planted, settings) / f"{name}.csv").read_text()
    # The manifest of one run is another, so all is written again.
    assert manifest["key"] != json.loads((written / "data" / "runs" / settings.profile / "experiments.json").read_text())["key"]


def test_missing_runs_are_counted_and_named(settings, planted):
    gone = Run("dpo_catto", {"calibration_weight": 1.0})
    os.remove(run_folder(planted, settings, "anli", 1, gone.name) / "eval.json")
    manifest = write_experiments(settings, planted)
    assert f"1 of {len(sweep_cases(settings))} runs were not run, such as {gone.name} on anli, seed 1." in manifest["parts"]["lambda_sweep"]
    means = pd.read_csv(figures(planted, settings) / "lambda_means.csv")
    row = means[(means["form"] == "linear") & (means["tokens"] == "all") & (means["weight"] == 1)].iloc[0]
    assert row["state"] == "not run" and np.isnan(row["test_ece"]) and (row["runs"], row["of"]) == (3, 4)


def test_without_the_reference_there_is_no_recipe(settings, planted):
    plant(planted, Case("snli", 0, REFERENCE), settings, diverged=True)
    manifest = write_experiments(settings, planted)
    assert manifest["parts"]["lambda_sweep"].startswith("No figure and no recipe without `dpo_matched`.")
    assert not any("recipe" in name for name in manifest["outputs"])


def test_nothing_there_at_all(settings, tmp_path):
    manifest = write_experiments(settings, tmp_path)
    assert [Path(name).name for name in manifest["outputs"]] == ["experiments.md"]
    assert all(text.startswith("Nothing to show.") and "were not run" in text for text in manifest["parts"].values())


@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
@pytest.mark.parametrize("name", ["test", "validation", "log"])
def test_a_damaged_file_is_named(settings, tmp_path, how, name):
    case = Case("snli", 0, REFERENCE)
    plant(tmp_path, case, settings)
    file = run_folder(tmp_path, settings, "snli", 0, "dpo_matched") / ("training_log.csv" if name == "log" else f"predictions_{name}.parquet")
    content = file.read_bytes()
    assert read_outcome(settings, case, tmp_path, name).state == "done"
    {"cut": lambda: file.write_bytes(content[:-20]), "changed": lambda: file.write_bytes(content[:50] + b"x" + content[51:]), "gone": file.unlink}[how]()
    with pytest.raises(ValueError, match=rf"{file.name} of dpo_matched, snli, seed 0, is not what {'eval' if name == 'test' else 'train'}.json recorded"):
        read_outcome(settings, case, tmp_path, name)


def test_the_same_runs_give_the_same_files_and_are_not_done_twice(settings, written, planted):
    manifest = json.loads((written / "data" / "runs" / settings.profile / "experiments.json").read_text())
    assert write_experiments(settings, written)["seconds"] == manifest["seconds"]
    again = write_experiments(settings, planted)
    assert again["outputs"] == manifest["outputs"]
    (figures(planted, settings) / "sequence.svg").write_text("")
    assert write_experiments(settings, planted)["outputs"] == manifest["outputs"]  # the damaged figure is made again
    assert (figures(planted, settings) / "sequence.svg").stat().st_size > 1000


def test_the_sharper_bound_is_the_one_of_the_claims():
    claims = read_claims().set_index("id")
    assert f"{gradient_bound():.4f}" == claims.loc["E.11-through", "constant"]


@pytest.mark.parametrize("form, scale, broken", [("linear", 1.0, True), ("linear", 2.0, False), ("bce", 1.0, False)])
def test_the_bound_is_asserted_for_the_printed_form_alone(settings, form, scale, broken):
    case = Case("snli", 1, Run("dpo_catto", {"calibration_form": form, "surrogate_scale": scale} if (form, scale) != ("linear", 1.0) else {}))
    log = Outcome("done", pd.DataFrame({"step": [1, 2], "calibration/largest_gradient": [gradient_bound() + 2e-6, 0.0]}))
    table = gradient_table({case: log}, settings)
    assert bool(table["sharper_bound"].notna().item()) == broken
    if broken:
        with pytest.raises(AssertionError, match="dpo_catto on snli, seed 1, logged a gradient of 0.0913"):
            check_gradients(table)
        assert check_gradients(table.assign(largest_gradient=gradient_bound())) == 1
    else:
        assert check_gradients(table) == 0


def test_rewards_are_log_ratios_over_their_beta(settings, written):
    table = pd.read_csv(figures(written, settings) / "cal_dpo.csv").set_index("run")
    last = {run: rows["chosen_log_ratio"].unique().tolist() for run, rows in table.groupby(level=0)}
    assert last["cal_dpo"] == [2.5] and last["cal_dpo@beta=0.5"] == [0.5]
    assert table.loc["cal_dpo@beta=0.5", "chosen_over_goal"].unique().tolist() == [0.5]


def test_compare_refuses_other_questions(settings):
    rows = answers(0, 0)
    with pytest.raises(ValueError, match="same questions"):
        compare([(rows, rows.assign(id=rows["id"] + "x"))], settings)


def test_what_is_missing_is_silent_when_nothing_is(settings):
    case = Case("snli", 0, REFERENCE)
    assert what_is_missing({case: Outcome("done", answers(0, 0))}) == ""
    assert "dpo_matched on snli to anli, seed 0" in what_is_missing({case._replace(tested_on="anli"): Outcome("not run")})


def test_a_sweep_without_its_reference_has_no_differences(settings):
    cases = [case for case in sweep_cases(settings) if case.task == "snli" and case.seed == 0]
    outcomes = {case: Outcome("diverged") if case.run == REFERENCE else Outcome("done", answers(0.1, 0)) for case in cases}
    table = sweep_table(outcomes, outcomes, settings)
    assert table["ece_difference"].isna().all() and table["test_ece"].notna().sum() == len(cases) - 1
    with pytest.raises(ValueError, match="no complete dpo_matched"):
        recommend(table)


def test_the_sweep_figure_cuts_off_nothing():
    "Panels of a row share their axis: what the last one draws must not lie beyond what the first one needed."
    ece = {("linear", 0.1): 5.0, ("linear", 1.0): 6.0, ("bce", 0.1): 20.0, ("bce", 1.0): 60.0}
    rows = [dict(form="none", tokens="none", scale=1.0, weight=0.0, state="done", test_ece=10.0, test_accuracy=60.0)]
    rows += [dict(form=form, tokens="all", scale=1.0, weight=weight, state="done", test_ece=value, test_accuracy=60.0, test_ece_min=value - 1,
                  test_ece_max=value + 3, test_accuracy_min=50.0, test_accuracy_max=70.0, ece_low=-1.0, ece_high=1.0, accuracy_low=-1.0,
                  accuracy_high=1.0) for (form, weight), value in ece.items()]
    figure = plot_sweep(pd.DataFrame(rows))
    panels = figure.axes[:2]
    assert {ax.get_ylim()[0] for ax in panels} == {0.0}
    assert all(ax.get_ylim()[1] >= 63.0 for ax in panels)
    plt.close(figure)
