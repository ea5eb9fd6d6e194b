"""What is claimed of the committed mini results, and what the README shows of them, held against the files."""
import re

import pandas as pd
import pytest

from catto import report
from catto.data import TASKS, load_questions
from catto.report import findings_markdown, headline, results_markdown, signature_lines
from catto.settings import load

MINI = load("mini")


@pytest.fixture(scope="module")
def mini(repo):
    return repo / "figures" / "mini"


@pytest.fixture(scope="module")
def scores(mini):
    "Runs trained and tested on the same task."
    scores = pd.read_csv(mini / "scores.csv")
    return scores[scores["trained_on"] == scores["task"]]


@pytest.fixture(scope="module")
def one_rate(mini):
    "Every method at the learning rate at which the world was settled, in points."
    return pd.read_csv(mini / "same_rate.csv").set_index(["task", "method", "metric"])["mean"]


def mean(scores, task, method, column):
    return scores[(scores["task"] == task) & (scores["method"] == method)][column].mean()


@pytest.mark.parametrize("task", MINI.tasks)
def test_sft_learns_the_world_and_stays_below_the_bayes_accuracy(scores, one_rate, task):
    accuracy, chance = one_rate[task, "sft", "accuracy"] / 100, 1 / len(TASKS[task].labels)
    assert accuracy >= chance + 0.15
    assert accuracy == pytest.approx(mean(scores, task, "sft", "accuracy"), abs=1e-5)  # SFT has one rate, so one accuracy
    for seed in MINI.seeds:
        questions = load_questions(task, split="test", seed=seed, n=MINI.test_questions)
        bayes = sum(max(q["posterior"]) for q in questions) / len(questions)
        rows = scores[(scores["task"] == task) & (scores["method"] == "sft") & (scores["seed"] == seed)]
        assert rows["bayes"].item() == pytest.approx(bayes, abs=1e-5)  # the table's column is the questions' own
    assert accuracy < mean(scores, task, "sft", "bayes")


def test_dpo_has_a_higher_ece_than_sft_on_at_least_four_of_five_tasks(one_rate):
    "The condition of the world, at the rate at which it was settled. What comes out at the rates that validation chose is a result, and no condition."
    higher = [task for task in MINI.tasks if one_rate[task, "dpo", "ece"] > one_rate[task, "sft", "ece"]]
    assert len(MINI.tasks) == 5 and len(higher) >= 4, higher


def test_committed_results_are_those_of_the_profile(scores, mini):
    every = pd.read_csv(mini / "scores.csv")
    seeds = set(every["seed"])
    assert seeds >= set(MINI.seeds) and seeds == set(range(len(seeds)))  # none is picked out
    gone = pd.read_csv(mini / "signatures.csv").query("signature == 'diverged'")
    expected = {(trained, tested, m, s) for m in MINI.methods for s in seeds for trained, tested in
                [*((t, t) for t in MINI.tasks), *((MINI.ood_task, t) for t in MINI.tasks if MINI.ood_task)]}
    expected -= {row for row in expected if ((gone["trained_on"] == row[0]) & (gone["method"] == row[2]) & (gone["seed"] == row[3])).any()}
    assert set(zip(every["trained_on"], every["task"], every["method"], every["seed"])) == expected
    assert (every["n"] == MINI.test_questions).all() and (every["n_bins"] == MINI.ece_bins).all()


def test_every_table_and_figure_of_the_study_is_there(mini):
    expected = {f"table{n:02d}.{e}" for n in range(1, 13) for e in ("csv", "md")} | {f"{n}_{t}.svg" for n in ("reliability", "figure1") for t in MINI.tasks}
    assert not (expected | {"overview.svg", "same_rate.csv", "same_rate.md", "findings.csv", "findings.md", "signatures.csv", "signatures.md"}) - {path.name for path in mini.iterdir()}


def test_readme_shows_the_committed_results(repo, mini):
    readme = (repo / "README.md").read_text(encoding="utf-8")
    table, contrasts, judged, same_rate = (pd.read_csv(mini / name) for name in ("table01.csv", "contrasts.csv", "findings.csv", "same_rate.csv"))
    assert results_markdown(table, contrasts, same_rate) in readme
    assert headline(contrasts, judged, same_rate) in readme and findings_markdown(judged, pd.read_csv(mini / "table02.csv")) in readme


TEXTS = {"table01": report.metrics_markdown, "table02": report.metrics_markdown, "table03": report.confidence_markdown, "same_rate": report.same_rate_markdown,
         "table12": report.training_markdown, **{f"table{n:02d}": report.spread_markdown for n in (4, 5, 6)},
         **{f"table{n:02d}": report.rates_markdown for n in report.RATE_TABLES.values()}}


@pytest.mark.parametrize("name", TEXTS)
def test_each_text_follows_from_its_table(mini, name):
    shown, made = (re.split(r"(?m)^(?=[#|])", text, maxsplit=1) for text in
                   ((mini / f"{name}.md").read_text(), TEXTS[name](pd.read_csv(mini / f"{name}.csv"), "")))
    assert shown[1] == made[1]  # below the line that says what the numbers are
    assert shown[0].partition("\n\n")[2].strip() == made[0].strip()  # the sentence on answers without a valid label
    assert "Profile `mini`" in shown[0] or "profile `mini`" in shown[0]
    assert ("n = 500 questions of each seed" in shown[0]) == (TEXTS[name] not in (report.rates_markdown, report.training_markdown))


def test_signatures_and_findings_follow_from_their_tables(mini):
    assert (mini / "signatures.md").read_text() == signature_lines(pd.read_csv(mini / "signatures.csv")) + "\n"
    assert (mini / "findings.md").read_text() == findings_markdown(pd.read_csv(mini / "findings.csv"), pd.read_csv(mini / "table02.csv")) + "\n"


def test_sentences_of_the_readme_that_are_typed(repo, mini, scores):
    "They are true of the committed numbers; where a new run makes one false, the sentence has to go."
    readme, rates = (repo / "README.md").read_text(encoding="utf-8"), pd.read_csv(mini / "same_rate.csv").set_index(["task", "method", "metric"])
    for task in MINI.tasks:
        assert mean(scores, task, "rcft", "ece") - mean(scores, task, "rcft", "ece_floor") < 0.02
        assert abs(mean(scores, task, "rcft", "accuracy") - mean(scores, task, "dpo", "accuracy")) < 0.01
        assert 50 < rates.loc[(task, "dpo_catto_label", "ece"), "inverted_pairs"] and 33 <= round(rates.loc[(task, "dpo_matched", "ece"), "inverted_pairs"]) <= 40
        assert all(7.5 < 100 * mean(scores, task, method, "oracle_error") < 18.5 for method in ("rcft", "dpo_catto_label"))
    for sentence in ("within 2 points of the noise floor on all\nfive tasks, at DPO's accuracy", "against 33 to 40% of its control's at the same rate", "stays at 8 to 18 points"):
        assert sentence in readme


def test_readme_links_lead_somewhere(repo):
    targets = re.findall(r"\]\(([^)#]+)\)", (repo / "README.md").read_text(encoding="utf-8"))
    local = [t for t in targets if "://" not in t]
    assert len(local) > 10
    assert not [t for t in local if not (repo / t).exists()]
