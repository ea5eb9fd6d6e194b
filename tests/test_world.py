"""What is claimed of the committed mini results, and what the README shows of them, held against the files."""
import re

import pandas as pd
import pytest

from catto.data import TASKS, load_questions
from catto.report import findings, overview_markdown
from catto.settings import load

MINI = load("mini")


@pytest.fixture(scope="module")
def scores(repo):
    return pd.read_csv(repo / "figures" / "mini" / "scores.csv")


def mean(scores, task, method, column):
    return scores[(scores["task"] == task) & (scores["method"] == method)][column].mean()


@pytest.mark.parametrize("task", MINI.tasks)
def test_sft_learns_the_world_and_stays_below_the_bayes_accuracy(scores, task):
    accuracy, chance = mean(scores, task, "sft", "accuracy"), 1 / len(TASKS[task].labels)
    assert accuracy >= chance + 0.15
    for seed in MINI.seeds:
        questions = load_questions(task, split="test", seed=seed, n=MINI.test_questions)
        bayes = sum(max(q["posterior"]) for q in questions) / len(questions)
        rows = scores[(scores["task"] == task) & (scores["method"] == "sft") & (scores["seed"] == seed)]
        assert rows["bayes"].item() == pytest.approx(bayes, abs=1e-6)  # the table's column is the questions' own
    assert accuracy < mean(scores, task, "sft", "bayes")


def test_dpo_has_a_higher_ece_than_sft_on_at_least_four_of_five_tasks(scores):
    higher = [task for task in MINI.tasks if mean(scores, task, "dpo", "ece") > mean(scores, task, "sft", "ece")]
    assert len(MINI.tasks) == 5 and len(higher) >= 4, higher


def test_committed_results_are_those_of_the_profile(scores):
    assert set(zip(scores["task"], scores["method"], scores["seed"])) == {
        (t, m, s) for t in MINI.tasks for m in MINI.methods for s in MINI.seeds}
    assert (scores["n"] == MINI.test_questions).all() and (scores["n_bins"] == MINI.ece_bins).all()


def test_readme_shows_the_committed_results(repo):
    readme, mini = (repo / "README.md").read_text(encoding="utf-8"), repo / "figures" / "mini"
    table, contrasts = (pd.read_csv(mini / name) for name in ("table01.csv", "contrasts.csv"))
    assert overview_markdown(table, contrasts) in readme
    assert findings(table, contrasts) in readme


def test_readme_links_lead_somewhere(repo):
    targets = re.findall(r"\]\(([^)#]+)\)", (repo / "README.md").read_text(encoding="utf-8"))
    local = [t for t in targets if "://" not in t]
    assert len(local) > 10
    assert not [t for t in local if not (repo / t).exists()]
