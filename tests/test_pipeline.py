"""`make reproduce` as a user runs it, on a profile of a few steps: whole, killed, damaged, on a full disk, doubled, on real rows.

A run starts seven notebooks, and most of its time goes into imports. So the runs that the tests look at go on in the
background, two at a time; all but one of them leave out the notebooks' examples, and faults begin from a finished run.
"""
import configparser
import functools
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from datasets import Dataset

from catto.data import prepare_data
from catto.eval import chosen_run
from catto.methods import METHODS, grid
from catto.settings import file_hash, load
from catto.train import train_methods

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = "02_data_gen", "03_train", "04_eval", "05_confidence_at_k", "06_report", "07_experiments", "07a_sweep"
FEW = "sft", "sft_ts", "dpo", "dpo_matched", "rcft", "dpo_catto", "dpo_catto_label"  # one of each kind, the control, and one that diverges
TASK, AWAY = "commonsense_qa", "mmlu"
RUNS = "data/runs/tiny"
UNIT, ALL = f"{RUNS}/{TASK}/seed0", f"{RUNS}/all/seed0"
REPORT, EXPERIMENTS = f"{RUNS}/report.json", f"{RUNS}/experiments.json"
NOTHING = "Nothing to be done"
MARK = "CATTO_TEST_PIPELINE"  # an environment variable by which the processes of a run are found again

TINY = dict(
    hidden_size=16, hidden_layers=1, attention_heads=2, key_value_heads=1, mlp_size=32, train_questions=120, preference_questions=60,
    preference_samples=6, min_incorrect=2, validation_questions=12, test_questions=16, sft_epochs=3, sft_save_steps=6,
    preference_batch_size=4, catto_pairs=24, preference_save_steps=6, max_new_tokens=24, generation_batch_size=64,
    bootstrap_resamples=20, candidates=2, candidate_counts="1 2", sweep_betas="0.1", methods="sft dpo dpo_matched dpo_catto", ood_task="")


# --- a copy of the repository, and what runs in it --------------------------------------------------------------------------

def write_settings(path, **changes):
    "The repository's settings with a profile `tiny` more: [DEFAULT], then [smoke], then TINY, then the changes."
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(REPO / "settings.ini")
    ini["tiny"] = {key: str(value) for key, value in {**ini["smoke"], **TINY, **changes}.items()}
    with open(path, "w") as file:
        ini.write(file)
    return path


def without_examples(notebook):
    "A notebook of the pipeline with its head, its exported cells and its part \"This run\" alone."
    cells = notebook["cells"]
    text = ["".join(cell["source"]) for cell in cells]
    head = next(i for i, source in enumerate(text) if "load(profile" in source)
    run = next(i for i, source in enumerate(text) if source.startswith("## This run"))
    kept = [cell for i, cell in enumerate(cells) if cell["cell_type"] == "code"
            and (i <= head or i >= run or text[i].startswith("#| export"))]
    assert head < run and len(kept) < len(cells)
    return {**notebook, "cells": kept}


def copy_repository(folder, examples=False, spoil=None, runs=None, **changes):
    """What `make reproduce` needs, below `folder`, with a profile `tiny`; `spoil` maps a notebook to (place, source) of a cell put in,
    `runs` is a folder whose finished runs are copied."""
    folder.mkdir(parents=True)
    for name in ("Makefile", "Snakefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(REPO / name, folder)  # with its time, or make would install everything anew
    for name in (".venv", "catto", "data/paper", "profiles"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(REPO / name)
    (folder / "nbs").mkdir()
    for name in NOTEBOOKS:
        notebook = json.loads((REPO / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
        notebook = notebook if examples else without_examples(notebook)
        if name in (spoil or {}):
            place, source = spoil[name]
            cell = {"cell_type": "code", "id": "spoiled", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
            notebook["cells"].insert(place % (len(notebook["cells"]) + 1), cell)
        (folder / "nbs" / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
        shutil.copystat(REPO / "nbs" / f"{name}.ipynb", folder / "nbs" / f"{name}.ipynb")  # not newer than what it has made
    write_settings(folder / "tiny.ini", **changes)
    for name in ("data/runs", "figures") if runs else ():
        shutil.copytree(runs / name, folder / name)
    return folder


def make_command(folder, *words, target="reproduce", profile="tiny", config=""):
    return ["make", target, f"PROFILE={profile}", f"CONFIG=settings={folder / 'tiny.ini'} {config}", *words]


class Run:
    "One `make reproduce PROFILE=tiny`, or another target, in its own session; its output goes to a file, which no orphan can block."
    numbers = itertools.count()

    def __init__(self, folder, *words, command=None, **options):
        self.mark, self.log = uuid.uuid4().hex, folder / f"make-{next(self.numbers)}.log"
        # A make that runs pytest hands its own flags down.
        ours = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PROFILE", "SEEDS", "SWEEPS", "JOBS", "GPUS", "CLUSTER", "OPTIONS", "CONFIG"}
        env = {k: v for k, v in os.environ.items() if k not in ours} | {"OMP_NUM_THREADS": "1", MARK: self.mark}
        command = command or make_command(folder, *words, **options)
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def end(self):
        "Wait; (exit code, output). No process outlives this, not even if it takes too long."
        try:
            return self.process.wait(timeout=600), self.log.read_text()
        finally:
            self.kill_all()

    def left(self):
        "Processes that carry this run's mark."
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
            except psutil.Error:
                pass  # it has just ended, or it is another user's
        return found

    def kill_all(self):
        while found := self.left():  # one of them may start another in the meantime
            for process in found:
                try:
                    process.kill()
                except psutil.Error:
                    pass
            psutil.wait_procs(found, timeout=10)
        self.process.wait()


def make(folder, *words, **options):
    "Output of a run that has to succeed."
    code, output = Run(folder, *words, **options).end()
    assert code == 0, output
    return output


def results(root):
    "Name -> hash of every table, figure and prediction below `root`, or the lines of a table but for those about times."
    timeless = lambda path: [line for line in path.read_text().splitlines() if "time" not in line]
    files = [*root.glob("figures/tiny/*"), *root.glob(f"{RUNS}/*/*/*/p*_*.parquet")]
    return {path.relative_to(root).as_posix(): timeless(path) if path.suffix in (".csv", ".md") else file_hash(path)
            for path in files if not path.name.startswith("table12")}


def written(root):
    "Every file of the runs below `root` with the time of its last change."
    files = [path for folder in ("data/runs", "figures") for path in (root / folder).rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


def settings_of(copy):
    return load("tiny", file=copy / "tiny.ini")


def predictions(root, run, split="test"):
    return pd.read_parquet(root / UNIT / run / f"predictions_{split}.parquet")


def manifest(root, name):
    return json.loads((root / UNIT / name).read_text())


def retract(copy, *steps):
    "Take back the summaries that Snakemake waits for, of these steps, and what comes after all of them."
    for step in (*steps, "report", "experiments"):
        for path in (copy / RUNS).rglob(f"{step}.json"):
            path.unlink()


# --- runs in the background -------------------------------------------------------------------------------------------------

def runs(*scenarios):
    "Say which scenarios a test looks at, so that they start before it."
    def marked(test):
        test.scenarios = scenarios
        return test
    return marked


@pytest.fixture(scope="module")
def scenario(request, tmp_path_factory):
    "scenario(f) -> what f(folder, scenario, samples) returned; those of the selected tests start at once, two at a time, in order."
    try:
        samples = request.getfixturevalue("real_samples")
    except pytest.skip.Exception:
        samples = None
    if not (REPO / ".venv" / ".installed").exists():
        pytest.skip("no .venv in the repository: `make venv` makes it, `make test` runs in it")
    with ThreadPoolExecutor(2) as pool:
        @functools.cache
        def future(run):
            return pool.submit(run, tmp_path_factory.mktemp(run.__name__), lambda other: future(other).result(), samples)

        for item in request.session.items:
            if item.module is request.module:
                for run in getattr(item.function, "scenarios", ()):
                    if samples or run is not real:
                        future(run)
        yield lambda run: future(run).result()


def whole(folder, *_):
    "The notebooks as they are, all methods, all files below another root; then the same command again, and the state."
    copy, root = copy_repository(folder / "copy", examples=True, methods=" ".join(METHODS), ood_task=AWAY), folder / "root"
    root.mkdir()
    first = make(copy, config=f"root={root}")
    before = written(root)
    again, after = make(copy, config=f"root={root}"), written(root)
    state = make(copy, target="status", config=f"root={root}")
    return root, settings_of(copy), before, again, after, first, state


SOME = dict(ood_task=AWAY, methods=" ".join(FEW), label_weight="1e40")  # a loss with this weight is no number


def some(folder, *_):
    "A few methods, from which the faults begin."
    copy = copy_repository(folder / "copy", **SOME)
    make(copy)
    return copy


# --- the whole pipeline -----------------------------------------------------------------------------------------------------

@runs(whole)
def test_everything_is_there(scenario):
    root, settings, files, *_ = scenario(whole)
    expected = {f"{ALL}/{name}" for name in ("data.json", "eval_all.json", "pool_all.json", "02_data_gen.ipynb", "04_eval_all.ipynb",
                                             "05_confidence_all.ipynb")}
    expected |= {f"{UNIT}/{name}" for name in ("data/manifest.json", "train_all.json", "03_train_all.ipynb", "sweep.json", "07a_sweep.ipynb")}
    for method in METHODS:
        scaled, chosen = METHODS[method].kind == "scaled", chosen_run(settings, TASK, method, root).name
        expected |= {f"{UNIT}/{chosen}/{name}" for name in ("eval.json", "predictions_test.parquet")}
        expected |= {f"{RUNS}/{AWAY}/seed0/{method}/eval_{TASK}.json"}
        expected |= set() if scaled else {f"{UNIT}/{chosen}/{name}" for name in ("pool.json", "pool_test.parquet")}
        for run in grid(settings, TASK, method):
            expected |= {f"{UNIT}/{run.name}/{name}" for name in ("train.json",) + (() if scaled else (
                "training_log.csv", "predictions_validation.parquet", "model/model.safetensors"))}
    expected |= {REPORT, EXPERIMENTS, f"{RUNS}/06_report.ipynb", f"{RUNS}/07_experiments.ipynb"}
    expected |= {f"figures/tiny/table{i:02d}.{kind}" for i in range(1, 13) for kind in ("csv", "md")}
    expected |= {f"figures/tiny/{name}" for name in (
        "scores.csv", "contrasts.csv", "overview.svg", f"figure1_{TASK}.svg", f"reliability_{TASK}.svg", "experiments.md")}
    there = {path.relative_to(root).as_posix() for path in files if path.stat().st_size}
    assert expected <= there, f"missing: {sorted(expected - there)}"
    assert not [name for name in there if "partial" in name or "/checkpoints/" in name]


@runs(whole)
def test_notebooks_are_executed_to_their_end_with_the_runs_parameters(scenario):
    root, _, files, *_ = scenario(whole)
    executed = [path for path in files if path.suffix == ".ipynb"]
    assert len(executed) == len(NOTEBOOKS) + 1  # training runs for each task
    for path in executed:
        notebook = json.loads(path.read_text())
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert all(cell["metadata"]["papermill"]["status"] == "completed" for cell in cells)
        assert notebook["metadata"]["papermill"]["parameters"]["profile"] == "tiny"


@runs(whole)
def test_a_second_call_has_nothing_to_do(scenario):
    _, _, before, output, after, *_ = scenario(whole)
    assert NOTHING in output
    assert {path: time for path, time in after.items() if path.name != "last_run.txt"} == {
        path: time for path, time in before.items() if path.name != "last_run.txt"}


@runs(whole)
def test_progress_is_visible(scenario):
    *_, output, state = scenario(whole)
    lines = re.findall(r"^(?:done: (.*) \| )?(\d+) of (\d+) steps(?: \| running: (.*?))?(?: \| .*)?$", output, flags=re.M)
    counts = [int(done) for _, done, _, _ in lines]
    assert len(lines) > 5 and counts == sorted(counts) and counts[-1] > counts[0], output
    # A line names three of the steps that ended since the last one, so which ones depends on the machine.
    named = re.compile(rf"train \w+(@\S+)? on ({TASK}|{AWAY}), seed 0 \(\d+ s\)")
    assert any(named.search(done) for done, *_ in lines) and any("train " in running for *_, running in lines), output
    steps = int(lines[0][2])
    assert state.startswith("profile tiny, seeds 0\n") and f"{steps} of {steps} steps done\n0 running" in state, state


@runs(whole)
def test_manifests_say_what_made_them(scenario):
    root, settings, *_ = scenario(whole)
    chosen = {m: chosen_run(settings, TASK, m, root).name for m in METHODS}
    names = ["data/manifest.json", *(f"{m}/train.json" for m in METHODS), *(f"{run}/eval.json" for run in chosen.values())]
    made = {name: manifest(root, name) for name in names} | {"report": json.loads((root / REPORT).read_text())}
    for name, found in made.items():
        assert found["seconds"] >= 0 and found["peak_memory_bytes"] > 50e6, name
        assert {"python", "torch", "transformers", "trl", "datasets", "device"} <= found["environment"].keys(), name
        assert re.fullmatch("[0-9a-f]{64}", found["made_from"]["code"]), name
        where = root / REPORT if name == "report" else root / UNIT / name
        assert all(file_hash(where.parent / output) == sha for output, sha in found["outputs"].items()), name
    outputs = {name: made[name]["outputs"] for name in names}
    assert made["data/manifest.json"]["made_from"]["settings"]["test_questions"] == settings.test_questions
    for method in METHODS:
        train = made[f"{method}/train.json"]["made_from"]
        rows, base = "preferences" if METHODS[method].kind == "preference" else "sft", METHODS[method].base
        assert train["settings"]["hidden_size"] == settings.hidden_size
        assert train["data"] == {name: outputs["data/manifest.json"][f"{name}.parquet"] for name in (rows, "validation")}
        assert train["base"]["outputs"] == (outputs[f"{base}/train.json"] if base else None)
        assert outputs[f"{method}/train.json"] or METHODS[method].kind == "scaled"


def check_predictions(root, settings, source="mini", n=TINY["test_questions"]):
    "One complete row for each test question and method, and a confidence that can be one."
    questions = Dataset.from_parquet(str(root / UNIT / "data" / "test.parquet"))
    assert len(questions) == n
    for method in settings.methods:
        rows = predictions(root, chosen_run(settings, TASK, method, root).name)
        assert rows["id"].tolist() == questions["id"] and rows["label"].tolist() == questions["label"]
        assert set(rows.columns) == {
            "id", "task", "candidate", "label", "predicted", "confidence", "in_option_mass", "correct", "fallback", "parsed", "p_correct",
            "bayes", "finished", "tokens", "text", "profile", "trained_on", "method", "seed", "split", "learning_rate", "temperature",
            "mean_log_prob", "mean_prob", "min_prob", "last_prob"}
        assert not rows.drop(columns=["p_correct", "bayes", "learning_rate"]).isna().any(axis=None)
        assert rows["learning_rate"].isna().all() == (METHODS[method].kind == "scaled")
        if source == "mini":
            assert rows["p_correct"].between(0, 1).all() and rows["bayes"].tolist() == [max(p) for p in questions["posterior"]]
        else:
            assert rows["p_correct"].isna().all() and rows["bayes"].isna().all()
        assert all(p in options for p, options in zip(rows["predicted"], questions["options"]))
        assert (rows["correct"] == (rows["predicted"] == rows["label"])).all() and (rows["parsed"] != rows["fallback"]).all()
        assert rows["confidence"].between(0, 1).all() and (rows["confidence"] > 0).all()
        assert (rows["in_option_mass"] <= 1 + 1e-5).all() and (rows["in_option_mass"] > 0).all()
        constant = dict(task=TASK, trained_on=TASK, profile="tiny", method=method, seed=0, split="test", candidate=0)
        assert all((rows[name] == value).all() for name, value in constant.items())


def check_table(root, settings, n=TINY["test_questions"]):
    "A row for every (task, method, metric); accuracy and confidence are those of the predictions, in points."
    table = pd.read_csv(root / "figures" / "tiny" / "table01.csv")
    assert sorted(set(zip(table["task"], table["method"]))) == sorted((TASK, m) for m in settings.methods)
    assert not table.duplicated(["task", "method", "metric"]).any()
    assert (table["n"] == n).all() and (table["seeds"] == 1).all() and table["sd"].isna().all()
    means = table.set_index(["method", "metric"])["mean"]
    for method in settings.methods:
        rows = predictions(root, chosen_run(settings, TASK, method, root).name)
        assert means[method, "accuracy"] == pytest.approx(100 * rows["correct"].mean(), abs=1e-3)
        assert means[method, "mean_confidence"] == pytest.approx(100 * rows["confidence"].mean(), abs=1e-3)
        assert 0 <= means[method, "ece"] <= 100
    return table


@runs(whole)
def test_predictions_are_complete(scenario):
    root, settings, *_ = scenario(whole)
    check_predictions(root, settings)


@runs(whole)
def test_table_holds_every_method_with_the_papers_number(scenario):
    root, settings, *_ = scenario(whole)
    table = check_table(root, settings)
    paper = pd.read_csv(REPO / "data" / "paper" / "table01.csv").query("dataset == @TASK").set_index(["method", "metric"])["value"]
    printed = table.set_index(["method", "metric"])["paper"]
    for method, spec in METHODS.items():
        for metric in ("accuracy", "ece"):
            assert printed[method, metric] == paper[spec.paper, metric] if spec.paper else np.isnan(printed[method, metric])


# --- kill -9 -----------------------------------------------------------------------------------------------------------------

def killed(copy, groups, most):
    """Run and kill, once for each of `groups`, when a drawn number of files, at most `most`, has come to be and a drawn time has passed;
    then run to the end, and once more. Files are counted rather than seconds, so that a busy machine does not move the moments behind the
    end. A true item of `groups` kills make and all that it started, but for the kernels, which have a group of their own."""
    seed = int(os.environ.get("CATTO_KILL_SEED") or random.SystemRandom().randrange(2**32))
    rng, kills, started, orphans = random.Random(f"{seed} {groups}"), [], [], 0
    files = lambda: {path for path in (copy / "data" / "runs").rglob("*") if ".partial" not in path.name}
    try:
        for whole_group in groups:
            wanted, pause, before, seen, run = rng.randint(1, most), rng.uniform(0, 1), files(), set(), Run(copy)
            started.append(run)
            while run.process.poll() is None and len(seen) < wanted:
                seen |= files() - before
                time.sleep(0.05)
            time.sleep(pause)
            kills.append((wanted, round(pause, 2), run.process.poll() is None))
            if whole_group:
                os.killpg(run.process.pid, signal.SIGKILL)
            else:
                run.process.kill()  # snakemake, papermill and the kernel go on
            run.process.wait()
            orphans += len(run.left())
        there = len(results(copy))
        again, third = Run(copy).end(), Run(copy).end()
    finally:
        for run in started:
            run.kill_all()
    story = (f"killed after (files, seconds, still alive) {kills}: {orphans} orphans went on, {there} results were there; "
             f"CATTO_KILL_SEED={seed} draws the same moments")
    return copy, all(alive for *_, alive in kills), orphans, again, third, story


def killed_five_times(folder, *_):
    "Five kills; at the first and the fourth make alone dies, and what it started goes on beside the next run."
    return killed(copy_repository(folder / "copy", **SOME), groups=(False, True, True, False, True), most=40)


SINGLE = "sft", "dpo_matched"


def killed_single_jobs(folder, *_):
    "Each method and each task is a job of its own."
    copy = copy_repository(folder / "copy", group_methods="false", group_tasks="false", methods=" ".join(SINGLE))
    return killed(copy, groups=(True,), most=25)


@runs(some, killed_five_times, killed_single_jobs)
@pytest.mark.parametrize("kill", [killed_five_times, killed_single_jobs])
def test_a_killed_run_goes_on_and_then_has_nothing_to_do(scenario, kill):
    _, alive, orphans, (code, output), (third_code, third_output), story = scenario(kill)
    print(story)
    assert alive, "the run had ended before it was killed, so nothing was tested"
    assert orphans if kill is killed_five_times else True
    assert code == 0, output
    assert third_code == 0 and NOTHING in third_output, third_output


@runs(some, killed_five_times)
def test_a_run_killed_five_times_ends_with_the_same_results(scenario):
    copy, *_, story = scenario(killed_five_times)
    print(story)
    assert results(copy) == results(scenario(some))


@runs(whole, killed_single_jobs)
def test_single_jobs_give_the_same_predictions_and_scores(scenario):
    together, (apart, *_, story) = scenario(whole)[0], scenario(killed_single_jobs)
    print(story)
    summaries = {path.relative_to(apart / RUNS).as_posix() for path in (apart / RUNS).glob("*/seed0/*.json")}
    steps = [f"{step}_{m}" for step in ("train", "eval", "pool") for m in SINGLE]
    assert summaries == {f"{TASK}/seed0/{name}.json" for name in ("data", "sweep", *steps)}
    ours, theirs = ({name: sha for name, sha in results(root).items() if "/seed0/" in name} for root in (apart, together))
    assert len(ours) > 6 and ours.items() <= theirs.items()
    lines = [(root / "figures" / "tiny" / "scores.csv").read_text().splitlines() for root in (apart, together)]
    assert len(lines[0]) > 2 and set(lines[0]) < set(lines[1])


# --- two at once -------------------------------------------------------------------------------------------------------------

def doubled(folder, scenario, _):
    "The same command twice at the same moment on the same files: one method is not trained, none is evaluated."
    copy = copy_repository(folder / "copy", runs=scenario(some), **SOME)
    for path in (copy / UNIT / "dpo_catto" / "train.json", *(copy / RUNS).glob("*/*/*/eval*.json")):
        path.unlink()
    retract(copy, "train_all", "eval_all", "pool_all", "sweep")
    both = [Run(copy), Run(copy)]
    return copy, [run.end() for run in both]


@runs(some, doubled)
def test_two_runs_at_once_both_succeed_with_one_set_of_results(scenario):
    copy, ends = scenario(doubled)
    for code, output in ends:
        assert code == 0, output
    assert results(copy) == results(scenario(some))


# --- damaged files -----------------------------------------------------------------------------------------------------------

def cut_short(path):
    path.write_bytes(path.read_bytes()[:-10])


def wrong_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zeros(path):
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE = {  # file, its step's manifest, what happens to it
    "predictions": (f"{UNIT}/sft/predictions_test.parquet", f"{UNIT}/sft/eval.json", cut_short),
    "candidates": (f"{UNIT}/sft/pool_test.parquet", f"{UNIT}/sft/pool.json", Path.unlink),
    "model": (f"{UNIT}/dpo/model/model.safetensors", f"{UNIT}/dpo/train.json", wrong_byte),
    "training manifest": (f"{UNIT}/rcft/train.json",) * 2 + (cut_short,),
    "evaluation manifest": (f"{RUNS}/{AWAY}/seed0/sft/eval_{TASK}.json",) * 2 + (zeros,),
    "summary": (f"{RUNS}/{AWAY}/seed0/train_all.json",) * 2 + (cut_short,),
}


def damaged(folder, scenario, _):
    "A finished run of which files are spoiled; then the same command, and once more."
    copy = copy_repository(folder / "copy", runs=scenario(some), **SOME)
    for file, _, how in DAMAGE.values():
        how(copy / file)
    before = written(copy)
    return copy, before, Run(copy).end(), written(copy), Run(copy).end()


@runs(some, damaged)
def test_damaged_files_are_named_and_rebuilt(scenario):
    copy, before, (code, output), after, (second_code, second) = scenario(damaged)
    assert code == 0, output
    for file, *_ in DAMAGE.values():
        assert f"missing or damaged: {file};" in output, output
    assert output.count("missing or damaged") == len(DAMAGE)
    assert results(copy) == results(scenario(some))
    assert second_code == 0 and NOTHING in second and "missing or damaged:" not in second, second
    manifests = {path for path in after if path.suffix == ".json" and path.with_suffix(".lock").exists()}
    anew = {path.relative_to(copy).as_posix() for path in manifests if after[path] != before.get(path)}
    # Nothing else was done again, but for the last steps, whose manifests Snakemake takes back before they can look.
    assert anew - {REPORT, EXPERIMENTS} == {step for _, step, _ in DAMAGE.values() if not step.endswith("_all.json")}


# --- a full disk -------------------------------------------------------------------------------------------------------------

def small_disk_possible():
    "May this process mount a file system of its own?"
    return shutil.which("unshare") and subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0


def full_disk(folder, scenario, _):
    "Everything below a root with room for half of the figures, which have to be made again; then the same with space."
    copy, root, out = copy_repository(folder / "copy", **SOME), folder / "root", folder / "out"
    root.mkdir(), out.mkdir()
    cells = json.loads((copy / "nbs" / "06_report.ipynb").read_text())["cells"]
    notebook = round(1.3 * len(json.dumps([cell | {"outputs": []} for cell in cells], indent=1)))
    make = shlex.join(make_command(copy, config=f"root={root}"))
    script = f"""
        mount -t tmpfs -o size=1g tmpfs {root}
        cp -a {scenario(some)}/data {scenario(some)}/figures {root}
        half=$(($(du -sk {root}/figures | cut -f1) / 2))
        rm -r {root}/figures {root}/{REPORT} {root}/{RUNS}/0[67]*.ipynb
        head -c {notebook} /dev/zero > {root}/{RUNS}/06_report.ipynb  # space for the notebook alone, which is written over this
        mount -o remount,size=$(($(du -sk {root} | cut -f1) + half))k {root}
        {make} JOBS=1 > {out}/full 2>&1; echo $? >> {out}/codes
        find {root} -name "*.json" -o -name "*.partial" > {out}/there
        mount -o remount,size=1g {root}
        {make} > {out}/space 2>&1; echo $? >> {out}/codes
        cp -a {root}/data {root}/figures {out}
    """
    code, output = Run(copy, command=["unshare", "-Urm", "bash", "-c", script]).end()
    assert code == 0, output
    return root, out, [int(code) for code in (out / "codes").read_text().split()]


@runs(some, full_disk)
def test_a_full_disk_is_named_and_nothing_half_written_counts(scenario):
    if not small_disk_possible():
        pytest.skip("a small file system cannot be mounted here")
    root, out, (code, again) = scenario(full_disk)
    output, there = (out / "full").read_text(), (out / "there").read_text()
    assert code != 0 and re.search(rf"^The disk that holds {root} is full: 0\.\d MB of \d+ MB are free\.", output, flags=re.M), output
    assert UNIT in there and REPORT not in there and ".json." not in there  # no manifest, and no part of one
    assert again == 0, (out / "space").read_text()
    assert results(out) == results(scenario(some))


# --- divergence --------------------------------------------------------------------------------------------------------------

@runs(whole, some)
def test_a_method_that_diverges_is_reported_and_stops_nothing(scenario):
    copy, bad = scenario(some), "dpo_catto_label"
    for task, names in ((TASK, ("train", "eval", "pool")), (AWAY, ("train", f"eval_{TASK}"))):
        for name in names:
            made = json.loads((copy / RUNS / task / "seed0" / bad / f"{name}.json").read_text())
            assert made["diverged"] and set(made["outputs"]) <= {"training_log.csv"}
    ours, all_ours = ({name: sha for name, sha in results(root).items() if "/seed0/" in name} for root in (copy, scenario(whole)[0]))
    assert len(ours) > 20 and ours.items() <= all_ours.items()  # the other methods are what they are beside one that does not diverge
    for number in (1, 2, 3):
        text = (copy / "figures" / "tiny" / f"table{number:02d}.md").read_text()
        rows = [line.split("|")[1:] for line in text.splitlines() if line.startswith("| `")]
        assert f"Diverged: `{bad}` of {TASK}, seed 0." in text
        assert {name for name, *cells in rows if "diverged" in str(cells)} == {f" `{bad}` "}, text
        assert not [name for name, *cells in rows if name == f" `{bad}` " and re.search(r"\d", str(cells))], text


# --- steps that end early ----------------------------------------------------------------------------------------------------

# rule: (notebook, number of the cell that is put in, its source, its manifest)
TRAPS = {
    "data": ("02_data_gen", 1, "raise SystemExit(0)", f"{ALL}/data.json"),
    "train": ("03_train", -2, "import os; os._exit(1)", f"{UNIT}/train_all.json"),  # everything is trained, all but the summary is written
    "evaluate": ("04_eval", 1, "import sys; sys.exit(0)", f"{ALL}/eval_all.json"),
    "confidence": ("05_confidence_at_k", -2, "raise SystemExit(0)", f"{ALL}/pool_all.json"),
    "sweep": ("07a_sweep", 1, "import os; os._exit(1)", f"{UNIT}/sweep.json"),
    "report": ("06_report", 1, "import os; os._exit(1)", REPORT),
    "experiments": ("07_experiments", 1, "raise SystemExit(0)", EXPERIMENTS),
}
TOGETHER = ("data",), ("train",), ("evaluate", "confidence"), ("sweep",), ("report", "experiments")  # two that start at the same moment


def trapped(folder, scenario, _):
    "A finished run of which one or two steps are taken back, and then end early."
    ends = {}
    for rules in TOGETHER:
        copy = copy_repository(folder / rules[0], runs=scenario(some), spoil={name: trap for name, *trap, _ in map(TRAPS.get, rules)}, **SOME)
        for rule in rules:
            (copy / TRAPS[rule][-1]).unlink()
        code, text = Run(copy).end()
        jobs = re.findall(r"^Job \d+: (\w+)", text, flags=re.M)
        ends |= {rule: (code, text, (copy / TRAPS[rule][-1]).exists(), sorted(jobs), sorted(rules)) for rule in rules}
    return ends


@runs(some, trapped)
@pytest.mark.parametrize("rule", TRAPS)
def test_a_step_that_ends_early_fails_and_leaves_no_manifest(scenario, rule):
    code, text, exists, jobs, rules = scenario(trapped)[rule]
    assert jobs == sorted("candidates" if name == "confidence" else name for name in rules), text
    assert code != 0, text
    assert not exists
    assert ("DeadKernelError" if "_exit" in TRAPS[rule][2] else "MissingOutputException") in text, text


# --- real rows ---------------------------------------------------------------------------------------------------------------

def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def tidy(text):
    return " ".join(text.casefold().split())


def usable(row):
    return len(set(map(tidy, row["choices"]["text"]))) == 5


REAL = dict(source="rows", teacher="rehearsal", train_questions=0, preference_questions=0, context_tokens=512, test_questions=30,
            catto_pairs=8, dpo_epochs=1, preference_save_steps=10, methods="sft dpo dpo_matched dpo_catto")  # CATTO takes 4 steps and logs every 10: its log has no loss


def real(folder, _, samples):
    "Real rows of CommonsenseQA and some that have to be dropped; the copy, the training rows, the counts of dropped rows."
    train, validation, quirks = (read_rows(samples / "commonsense_qa" / f"{name}.jsonl") for name in (
        "train", "validation", "quirks_duplicate_choice_text"))
    good = next(row for row in validation if usable(row))
    train += quirks + [{**good, "id": "leak"}]
    validation += [{**good, "id": "hidden", "answerKey": ""}, {**good, "id": "outside", "answerKey": "F"}]
    dropped = {"repeated choices": sum(not usable(row) for row in train + validation), "hidden label": 1,
               "label 'F' outside the options": 1, "also in the evaluation split": 1}
    copy = copy_repository(folder / "copy", **{**REAL, "source": write_rows(folder / "rows", train=train, validation=validation)})
    make(copy)
    return copy, train, dropped


@runs(real)
def test_real_rows_reach_the_table(scenario, real_samples):
    copy = scenario(real)[0]
    methods = settings_of(copy).methods
    check_predictions(copy, settings_of(copy), source="rows", n=30)
    check_table(copy, settings_of(copy), n=30)
    text = (copy / "figures" / "tiny" / "table01.md").read_text()
    assert "mini world" not in text and "a rehearsal on real questions with invented teacher answers" in text
    assert (copy / "figures" / "tiny" / "figure1_commonsense_qa.svg").read_text().count("ECE ") >= len(methods)
    for method in methods:
        assert manifest(copy, f"{method}/train.json")["steps"] > 0


@runs(real)
def test_real_rows_are_kept_or_counted(scenario, real_samples):
    copy, train, dropped = scenario(real)
    made = manifest(copy, "data/manifest.json")
    assert made["dropped_questions"] == dropped
    lost = sum(not usable(row) for row in train) + 1
    n = made["rows"]["train"]
    assert n == len(train) - lost and [made["rows"][s] for s in ("validation", "test")] == [TINY["validation_questions"], 30]
    assert sum(made["sft"].values()) == n and made["sft"]["kept"] == made["rows"]["sft"]
    assert sum(made["preferences"][key] for key in ("kept", "few_correct", "few_incorrect")) == n
    assert made["rows"]["responses"] == n * (1 + TINY["preference_samples"])
    for method in settings_of(copy).methods:
        facts = manifest(copy, f"{method}/train.json")
        there = made["rows"]["sft" if method == "sft" else "preferences"] - facts["rows_left_out"]
        assert facts["rows"] == (there if method in ("sft", "dpo") else min(REAL["catto_pairs"], there))


@runs(real)
def test_no_real_question_is_in_two_splits(scenario, real_samples):
    data = scenario(real)[0] / UNIT / "data"
    keys = {split: {(tidy(q["prompt"]), frozenset(map(tidy, q["choices"]))) for q in Dataset.from_parquet(str(data / f"{split}.parquet"))}
            for split in ("train", "validation", "test")}
    for one, other in itertools.combinations(keys.values(), 2):
        assert one and other and not one & other
    trained = Dataset.from_parquet(str(data / "sft.parquet"))
    assert {tidy(text) for text in trained["question"]} <= {prompt for prompt, _ in keys["train"]}


# --- refusals ----------------------------------------------------------------------------------------------------------------

@pytest.fixture
def settings(tmp_path):
    "settings(**changes) -> the profile tiny with these changes, through a written file."
    return lambda **changes: load("tiny", file=write_settings(tmp_path / "tiny.ini", **changes))


@pytest.mark.parametrize("changes, message", [
    (dict(tasks="commonsense_qa squad"), "setting 'tasks' = 'squad': accepted are reward_bench_2, .*commonsense_qa"),
    (dict(methods="sft dpo_cato"), "setting 'methods' = 'dpo_cato': accepted are sft, .*did you mean 'dpo_catto'"),
    (dict(learning_rate="1e-3"), "unknown setting 'learning_rate'"),
    (dict(sft_epochs="two"), "setting 'sft_epochs' = 'two' is not of type int: a number such as 1 is accepted"),
    (dict(test_questions=0), "setting 'test_questions' = 0: at least 1"),
    (dict(source="somewhere"), "setting 'source' = 'somewhere' with teacher = sampler, which knows the mini world only: accepted are source = mini"),
])
def test_settings_are_refused_by_name(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_an_unknown_profile_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown profile 'large': tiny.ini has smoke, mini, paper, tiny$"):  # and not what a rehearsal changes
        load("large", file=write_settings(tmp_path / "tiny.ini"))


def test_a_line_that_is_no_setting_is_named(tmp_path):
    path = write_settings(tmp_path / "tiny.ini")
    path.write_text(path.read_text() + "\nsft_epochs 4\n")
    with pytest.raises(ValueError, match="tiny.ini'.*sft_epochs 4.*; lines such as 'name = value' below a .profile. are accepted"):
        load("tiny", file=path)


def test_unknown_task_and_method_are_refused_by_the_steps(settings, tmp_path):
    with pytest.raises(ValueError, match="unknown task 'squad': accepted are"):
        prepare_data(settings(), "squad", 0, tmp_path)
    prepare_data(settings(), "commonsense_qa", 0, tmp_path)
    for methods in (["ppo"], ["sft", "ppo"]):  # before sft is trained, too
        with pytest.raises(ValueError, match="unknown method 'ppo': accepted are sft, sft_ls"):
            train_methods(settings(), "commonsense_qa", 0, methods, tmp_path)
    with pytest.raises(FileNotFoundError, match="dpo starts from sft of commonsense_qa, seed 0"):
        train_methods(settings(), "commonsense_qa", 0, ["dpo"], tmp_path)
    assert not list(tmp_path.rglob("checkpoints"))


def row(number, key="B", **changes):
    return {"id": f"r{number}", "question": f"Where does fish {number} live?", "answerKey": key,
            "choices": {"label": list("ABCDE"), "text": ["tree", "sea", "sky", "desk", "fire"]}, **changes}


def without(key, rows):
    return [{k: v for k, v in row.items() if k != key} for row in rows]


TRAIN, VALIDATION = [row(i) for i in range(20)], [row(i) for i in range(20, 40)]


@pytest.mark.parametrize("splits, message", [
    (dict(train=without("answerKey", TRAIN), validation=VALIDATION), "commonsense_qa .*lacks the columns answerKey"),
    (dict(train=TRAIN, validation=without("choices", VALIDATION)), "commonsense_qa .*lacks the columns choices"),
    (dict(train=[row(i, "F") for i in range(20)], validation=VALIDATION), r"commonsense_qa train.*label 'F' outside the options.*\b20\b"),
    (dict(train=TRAIN, validation=[row(i, "") for i in range(20, 40)]), r"commonsense_qa validation.*hidden label"),
    (dict(train=VALIDATION, validation=VALIDATION), r"commonsense_qa train.*also in the evaluation split.*\b20\b"),
    (dict(train=TRAIN), "no validation.jsonl or validation.parquet"),
], ids=["no answers", "no choices", "labels outside", "labels hidden", "all of train is held out", "no validation"])
def test_unusable_rows_end_the_run_with_one_error(settings, tmp_path, splits, message):
    rows = write_rows(tmp_path / "rows", **splits)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_data(settings(**{**REAL, "source": rows}), "commonsense_qa", 0, tmp_path)
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_context_that_no_row_fits_is_refused_before_training(settings, tmp_path):
    rows = write_rows(tmp_path / "rows", train=TRAIN, validation=VALIDATION)
    small = settings(**{**REAL, "source": rows, "context_tokens": 20})
    prepare_data(small, "commonsense_qa", 0, tmp_path)
    with pytest.raises(ValueError, match=r"no row fits into context_tokens = 20: the shortest has \d+ tokens"):
        train_methods(small, "commonsense_qa", 0, ["sft"], tmp_path)
    assert not list(tmp_path.rglob("train.json")) and not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.parametrize("options, message, jobs", [
    (dict(profile="tinny"), "unknown profile 'tinny': tiny.ini has .*tiny", []),
    (dict(), "commonsense_qa .*lacks the columns answerKey; needed are", ["data"]),
], ids=["profile", "rows"])
def test_make_ends_with_the_message_and_a_failure(scenario, tmp_path, options, message, jobs):
    rows = write_rows(tmp_path / "rows", train=without("answerKey", TRAIN), validation=VALIDATION)
    copy = copy_repository(tmp_path / "copy", **{**REAL, "source": rows})
    code, output = Run(copy, **options).end()
    assert code != 0
    assert re.search(message, output), output
    assert re.findall(r"^Job \d+: (\w+)", output, flags=re.M) == jobs
