"""scripts/bench_gpu.py runs from end to end at toy sizes on a CPU, and says what it needs."""
import importlib.util
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch

from catto.methods import METHODS
from catto.settings import load

SETTINGS = load("paper")

def bench(repo, *words, **env):
    return subprocess.run([sys.executable, repo / "scripts" / "bench_gpu.py", *words], cwd=repo, env=os.environ | env,
                          capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def rows(repo, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench") / "bench_gpu.csv"
    done = bench(repo, "--tiny", "--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return pd.read_csv(out, keep_default_na=False)


def test_every_section_is_there(rows):
    with_triton = importlib.util.find_spec("triton") is not None
    kernels = {"equality", "kernel"} if with_triton else set()
    assert set(rows["section"]) - {"table12"} == {"machine", "ceiling", "head", "step", "grid"} | kernels
    machine = rows[rows["section"] == "machine"].set_index("quantity")["value"]
    assert machine["torch"] == torch.__version__ and machine["row_work"] == ("triton" if with_triton else "torch")
    costs = rows[rows["quantity"] == "time"]
    assert (costs["value"].astype(float) > 0).all()


def test_every_method_at_every_size(rows):
    times = rows[(rows["section"] == "head") & (rows["quantity"] == "time")]
    cases = {f"{size}, head {state}" for size in ("small", "middle", "qwen3_4b") for state in ("trained", "frozen")}
    assert set(times["case"]) == cases
    for _, of_case in times.groupby("case"):
        assert {"fused_torch", "straightforward", "trl", "trl_with_metrics"} < set(of_case["method"])
    steps = rows[(rows["section"] == "step") & (rows["quantity"] == "time")].set_index("method")["value"].astype(float)
    assert set(steps.index) == {"trl_dpo", "catto_fused", "catto_reference", "sft", "reference pass"}
    over = rows[(rows["section"] == "step") & (rows["quantity"] == "time_over_trl")].set_index("method")["value"].astype(float)
    assert over["catto_fused"] == pytest.approx(steps["catto_fused"] / steps["trl_dpo"], rel=1e-3)


def test_hours_follow_from_the_steps(rows):
    "500 pairs, 2 epochs and one reference pass over them, in hours, by hand."
    steps = rows[(rows["section"] == "step") & (rows["quantity"] == "time")].set_index("method")["value"].astype(float) / 1e3
    pairs_of_a_step = 2
    expected = 500 * (2 * steps["catto_fused"] + steps["reference pass"]) / pairs_of_a_step / 3600
    hours = rows[rows["section"] == "grid"].assign(value=lambda r: r["value"].astype(float))
    catto = hours[(hours["method"] == "dpo_catto") & (hours["case"] == "anli")]["value"]
    assert catto.item() == pytest.approx(expected, rel=1e-3)
    single = hours[hours["case"] != "all tasks and methods"]
    trained = {method for method in METHODS if METHODS[method].kind != "scaled"}
    assert set(zip(single["case"], single["method"])) == {(task, method) for task in (*SETTINGS.tasks, SETTINGS.ood_task) for method in trained}
    rates = [2 if METHODS[r.method].rates and r.case != "mmlu" else 1 for r in single.itertuples()]  # in distribution, from two learning rates
    total = hours[hours["case"] == "all tasks and methods"]["value"].item()
    assert total == pytest.approx(5 * (single["value"] * rates).sum(), rel=1e-3)


def test_table12_row_by_row(rows, repo):
    if not (repo / "data" / "paper" / "table12.csv").exists():
        pytest.skip("data/paper/table12.csv is not in this tree")
    table = rows[rows["section"] == "table12"]
    assert len(table) == 15 and set(table["method"]) == {"dpo", "rcft", "dpo_catto"}
    assert (table["note"].str.contains("stated") == (table["method"] == "dpo_catto")).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(repo):
    done = bench(repo)
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("bench_gpu: no CUDA device")
    assert "Traceback" not in done.stderr and not done.stdout


def test_real_sizes_are_not_for_a_cpu(repo):
    done = bench(repo, "--device", "cpu")
    assert done.returncode == 2 and "--tiny" in done.stderr
