"""The numbers printed in the paper, as they stand in data/paper."""
from pathlib import Path

import pandas as pd
import pytest

TABLE = Path(__file__).parents[1] / "data" / "paper" / "table01.csv"
METHODS = ["sft", "sft_ts", "sft_ls", "dpo", "rcft", "dpo_bce", "dpo_catto"]
DATASETS = ["reward_bench_2", "snli", "anli", "tldr", "commonsense_qa"]


@pytest.fixture
def table():
    return pd.read_csv(TABLE)


def test_every_cell_of_table_1_is_there_once(table):
    assert list(table.columns) == ["method", "dataset", "metric", "value"]
    assert len(table) == 7 * 5 * 2 and not table.duplicated(["method", "dataset", "metric"]).any()
    assert set(table["method"]) == set(METHODS) and set(table["dataset"]) == set(DATASETS)
    assert set(table["metric"]) == {"accuracy", "ece"}
    assert table["value"].between(10, 90).all()


def test_values_have_two_decimals_as_printed():
    lines = TABLE.read_text().splitlines()[1:]
    assert all(len(line.rsplit(".", 1)[1]) == 2 for line in lines)


@pytest.mark.parametrize("dataset, points", list(zip(DATASETS, [4.31, 7.61, 2.22, 2.54, 2.55])))
def test_what_catto_takes_off_the_ece_of_dpo(table, dataset, points):
    ece = table[(table["metric"] == "ece") & (table["dataset"] == dataset)].set_index("method")["value"]
    assert ece["dpo"] - ece["dpo_catto"] == pytest.approx(points, abs=1e-9)


@pytest.mark.parametrize(
    "metric, best_sft, best_dpo",
    [
        # the highest accuracy and the lowest ECE of each group of the paper, read off the page
        ("accuracy", [63.85, 74.48, 72.36, 62.81, 72.35], [65.44, 78.52, 72.45, 64.68, 73.45]),
        ("ece", [16.19, 21.44, 15.76, 27.70, 24.25], [15.10, 19.13, 22.50, 25.97, 23.31]),
    ],
)
def test_best_of_each_group(table, metric, best_sft, best_dpo):
    wide = table[table["metric"] == metric].pivot(index="dataset", columns="method", values="value").loc[DATASETS]
    for group, expected in ((METHODS[:3], best_sft), (METHODS[3:], best_dpo)):
        best = wide[group].max(axis=1) if metric == "accuracy" else wide[group].min(axis=1)
        assert best.tolist() == expected
