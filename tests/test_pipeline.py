"""`make reproduce` as a user runs it, on a profile of a few steps: whole, killed, in single jobs, doubled, on real rows.

A run starts four notebooks one after another, and most of its time goes into imports. So the runs that the tests look
at go on in the background, two at a time, and all but one of them leave out the notebooks' examples.
"""
import configparser
import functools
import itertools
import json
import os
import random
import re
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
from catto.settings import file_hash, load
from catto.train import train_methods

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = "02_data_gen", "03_train", "04_eval", "06_report"
METHODS = "sft", "dpo", "dpo_matched", "dpo_catto"
UNIT = "data/runs/tiny/commonsense_qa/seed0"
REPORT = "data/runs/tiny/report.json"
MANIFESTS = [f"{UNIT}/data/manifest.json", f"{UNIT}/train_all.json", f"{UNIT}/eval_all.json", REPORT]  # what the steps end with, in order
NOTHING = "Nothing to be done"
MARK = "CATTO_TEST_PIPELINE"  # an environment variable by which the processes of a run are found again

TINY = dict(
    hidden_size=16, hidden_layers=1, attention_heads=2, key_value_heads=1, mlp_size=32, train_questions=120, preference_questions=60,
    preference_samples=6, min_incorrect=2, validation_questions=12, test_questions=16, sft_epochs=3, sft_save_steps=6,
    preference_batch_size=4, catto_pairs=24, preference_save_steps=6, max_new_tokens=24, generation_batch_size=64,
    bootstrap_resamples=20)


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


def copy_repository(folder, examples=False, spoil=None, **changes):
    "What `make reproduce` needs, below `folder`, with a profile `tiny`; `spoil` maps a notebook to (place, source) of a cell put in."
    folder.mkdir(parents=True)
    for name in ("Makefile", "Snakefile", "pyproject.toml", "constraints.txt"):
        shutil.copy2(REPO / name, folder)  # with its time, or make would install everything anew
    for name in (".venv", "catto", "data/paper"):
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
    return folder


class Run:
    "One `make reproduce PROFILE=tiny` in its own session; its output goes to a file, which no orphan can block."
    numbers = itertools.count()

    def __init__(self, folder, *words, profile="tiny", config=""):
        self.mark, self.log = uuid.uuid4().hex, folder / f"make-{next(self.numbers)}.log"
        # A make that runs pytest hands its own flags down.
        ours = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "PROFILE", "SEEDS", "JOBS", "CONFIG"}
        env = {k: v for k, v in os.environ.items() if k not in ours} | {"OMP_NUM_THREADS": "1", MARK: self.mark}
        command = ["make", "reproduce", f"PROFILE={profile}", f"CONFIG=settings={folder / 'tiny.ini'} {config}", *words]
        with open(self.log, "w") as file:
            self.process = subprocess.Popen(command, cwd=folder, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def end(self):
        "Wait; (exit code, output). No process outlives this, not even if it takes too long."
        try:
            return self.process.wait(timeout=300), self.log.read_text()
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
    "Name -> hash of every table, figure and prediction below `root`."
    files = [*root.glob("figures/tiny/*"), *root.glob("data/runs/tiny/*/*/*/predictions_*.parquet")]
    return {path.relative_to(root).as_posix(): file_hash(path) for path in files}


def written(root):
    "Every file of the runs below `root` with the time of its last change."
    files = [path for folder in ("data/runs", "figures") for path in (root / folder).rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


def predictions(root, method, split="test"):
    return pd.read_parquet(root / UNIT / method / f"predictions_{split}.parquet")


def manifest(root, name):
    return json.loads((root / UNIT / name).read_text())


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
    "The notebooks as they are, all files below another root; then the same command again."
    copy, root = copy_repository(folder / "copy", examples=True), folder / "root"
    root.mkdir()
    make(copy, config=f"root={root}")
    before = written(root)
    return root, before, make(copy, config=f"root={root}"), written(root)


# --- the whole pipeline -----------------------------------------------------------------------------------------------------

@runs(whole)
def test_everything_is_there(scenario):
    root, files, _, _ = scenario(whole)
    expected = {f"{UNIT}/{name}" for name in ("data/manifest.json", "train_all.json", "eval_all.json", "02_data_gen.ipynb",
                                              "03_train_all.ipynb", "04_eval_all.ipynb")}
    expected |= {f"{UNIT}/{m}/{name}" for m in METHODS for name in (
        "train.json", "eval.json", "training_log.csv", "predictions_validation.parquet", "predictions_test.parquet",
        "model/model.safetensors")}
    expected |= {REPORT, "data/runs/tiny/06_report.ipynb"}
    expected |= {f"figures/tiny/{name}" for name in (
        "table01.csv", "table01.md", "scores.csv", "contrasts.csv", "overview.svg", "figure1_commonsense_qa.svg")}
    there = {path.relative_to(root).as_posix() for path in files if path.stat().st_size}
    assert expected <= there, f"missing: {sorted(expected - there)}"
    assert not [name for name in there if "partial" in name or "/checkpoints/" in name]


@runs(whole)
def test_notebooks_are_executed_to_their_end_with_the_runs_parameters(scenario):
    root, files, _, _ = scenario(whole)
    executed = [path for path in files if path.suffix == ".ipynb"]
    assert len(executed) == 4
    for path in executed:
        notebook = json.loads(path.read_text())
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        assert all(cell["metadata"]["papermill"]["status"] == "completed" for cell in cells)
        assert notebook["metadata"]["papermill"]["parameters"]["profile"] == "tiny"


@runs(whole)
def test_a_second_call_has_nothing_to_do(scenario):
    _, before, output, after = scenario(whole)
    assert NOTHING in output
    assert after == before


@runs(whole)
def test_manifests_say_what_made_them(scenario):
    root = scenario(whole)[0]
    settings = load("tiny", file=root.parent / "copy" / "tiny.ini")
    names = ["data/manifest.json", *(f"{m}/{step}.json" for m in METHODS for step in ("train", "eval"))]
    made = {name: manifest(root, name) for name in names} | {"report": json.loads((root / REPORT).read_text())}
    for name, found in made.items():
        assert found["seconds"] > 0 and found["peak_memory_bytes"] > 50e6, name
        assert {"python", "torch", "transformers", "trl", "datasets", "device"} <= found["environment"].keys(), name
        assert found["outputs"] and re.fullmatch("[0-9a-f]{64}", found["made_from"]["code"]), name
        where = root / REPORT if name == "report" else root / UNIT / name
        assert all(file_hash(where.parent / output) == sha for output, sha in found["outputs"].items()), name
    outputs = {name: made[name]["outputs"] for name in names}
    assert made["data/manifest.json"]["made_from"]["settings"]["test_questions"] == settings.test_questions
    for method in METHODS:
        train, evaluation = (made[f"{method}/{step}.json"]["made_from"] for step in ("train", "eval"))
        rows = "sft" if method == "sft" else "preferences"
        assert train["settings"]["hidden_size"] == settings.hidden_size
        assert train["data"] == {name: outputs["data/manifest.json"][f"{name}.parquet"] for name in (rows, "validation")}
        assert train["base"] == (None if method == "sft" else outputs["sft/train.json"])
        assert evaluation["questions"] == outputs["data/manifest.json"]["test.parquet"]
        assert evaluation["trained"] == outputs[f"{method}/train.json"]
        hashes = made["report"]["made_from"]["inputs"]
        assert hashes[f"commonsense_qa/0/{method}"] == outputs[f"{method}/eval.json"]["predictions_test.parquet"]


def check_predictions(root, source="mini", n=TINY["test_questions"]):
    "One complete row for each test question and method, and a confidence that can be one."
    questions = Dataset.from_parquet(str(root / UNIT / "data" / "test.parquet"))
    assert len(questions) == n
    for method in METHODS:
        rows = predictions(root, method)
        assert rows["id"].tolist() == questions["id"] and rows["label"].tolist() == questions["label"]
        assert set(rows.columns) == {
            "id", "task", "candidate", "label", "predicted", "confidence", "in_option_mass", "correct", "fallback", "parsed",
            "p_correct", "bayes", "finished", "tokens", "text", "profile", "trained_on", "method", "seed", "split"}
        assert not rows.drop(columns=["p_correct", "bayes"]).isna().any(axis=None)
        if source == "mini":
            assert rows["p_correct"].between(0, 1).all() and rows["bayes"].tolist() == [max(p) for p in questions["posterior"]]
        else:
            assert rows["p_correct"].isna().all() and rows["bayes"].isna().all()
        assert all(p in options for p, options in zip(rows["predicted"], questions["options"]))
        assert (rows["correct"] == (rows["predicted"] == rows["label"])).all() and (rows["parsed"] != rows["fallback"]).all()
        assert rows["confidence"].between(0, 1).all() and (rows["confidence"] > 0).all()
        assert (rows["in_option_mass"] <= 1 + 1e-5).all() and (rows["in_option_mass"] > 0).all()
        task = "commonsense_qa"
        constant = dict(task=task, trained_on=task, profile="tiny", method=method, seed=0, split="test", candidate=0)
        assert all((rows[name] == value).all() for name, value in constant.items())


def check_table(root, n=TINY["test_questions"]):
    "A row for every (task, method, metric); accuracy and confidence are those of the predictions, in points."
    table = pd.read_csv(root / "figures" / "tiny" / "table01.csv")
    assert sorted(set(zip(table["task"], table["method"]))) == sorted(("commonsense_qa", m) for m in METHODS)
    assert not table.duplicated(["task", "method", "metric"]).any()
    assert (table["n"] == n).all() and (table["seeds"] == 1).all() and table["sd"].isna().all()
    means = table.set_index(["method", "metric"])["mean"]
    for method in METHODS:
        rows = predictions(root, method)
        assert means[method, "accuracy"] == pytest.approx(100 * rows["correct"].mean(), abs=1e-3)
        assert means[method, "mean_confidence"] == pytest.approx(100 * rows["confidence"].mean(), abs=1e-3)
        assert 0 <= means[method, "ece"] <= 100
        assert f"| commonsense_qa | {method} |" in (root / "figures" / "tiny" / "table01.md").read_text()
    return table


@runs(whole)
def test_predictions_are_complete(scenario):
    check_predictions(scenario(whole)[0])


@runs(whole)
def test_table_holds_every_method_with_the_papers_number(scenario):
    table = check_table(scenario(whole)[0])
    paper = pd.read_csv(REPO / "data" / "paper" / "table01.csv").query("dataset == 'commonsense_qa'")
    paper = paper.set_index(["method", "metric"])["value"]
    printed = table.set_index(["method", "metric"])["paper"]
    for method in ("sft", "dpo", "dpo_catto"):
        assert all(printed[method, metric] == paper[method, metric] for metric in ("accuracy", "ece"))
    assert np.isnan(printed["dpo_matched", "ece"])  # the control that the paper lacks


# --- kill -9 -----------------------------------------------------------------------------------------------------------------

def killed(copy, whole_group, most):
    """Kill a run when a drawn number of files, at most `most`, has come to be and a drawn time has passed; run it again, and once more.
    Files are counted rather than seconds, so that a busy machine does not move the moment behind the end."""
    seed = int(os.environ.get("CATTO_KILL_SEED") or random.SystemRandom().randrange(2**32))
    rng = random.Random(f"{seed} {whole_group}")
    files, pause, seen, run = rng.randint(1, most), rng.uniform(0, 1), set(), Run(copy)
    try:
        while run.process.poll() is None and len(seen) < files:
            seen |= {path for path in (copy / "data" / "runs").rglob("*") if ".partial" not in path.name}
            time.sleep(0.02)
        time.sleep(pause)
        alive = run.process.poll() is None
        if whole_group:
            os.killpg(run.process.pid, signal.SIGKILL)
        else:
            run.process.kill()  # snakemake, papermill and the kernel go on
        run.process.wait()
        there, orphans = len(results(copy)), len(run.left())
        again, third = Run(copy).end(), Run(copy).end()
    finally:
        run.kill_all()
    story = (f"killed after {files} files and {pause:.2f} s: {orphans} orphans went on, {there} results were there; "
             f"CATTO_KILL_SEED={seed} draws the same moment")
    return copy, alive, orphans, again, third, story


def killed_make(folder, *_):
    "make alone is killed; what it started goes on beside the next run."
    return killed(copy_repository(folder / "copy"), whole_group=False, most=45)


SINGLE = "sft", "dpo_matched"


def killed_single_jobs(folder, *_):
    "make and all its processes are killed (the kernel has a group of its own), each method being a job of its own."
    copy = copy_repository(folder / "copy", group_methods="false", methods=" ".join(SINGLE))
    return killed(copy, whole_group=True, most=25)


@runs(whole, killed_make, killed_single_jobs)
@pytest.mark.parametrize("kill", [killed_make, killed_single_jobs])
def test_a_killed_run_goes_on_and_then_has_nothing_to_do(scenario, kill):
    _, alive, orphans, (code, output), (third_code, third_output), story = scenario(kill)
    print(story)
    assert alive, "the run had ended before it was killed, so nothing was tested"
    assert orphans if kill is killed_make else True
    assert code == 0, output
    assert third_code == 0 and NOTHING in third_output, third_output


@runs(whole, killed_make)
def test_a_killed_run_ends_with_the_same_results(scenario):
    copy, *_, story = scenario(killed_make)
    print(story)
    assert results(copy) == results(scenario(whole)[0])


@runs(whole, killed_single_jobs)
def test_single_jobs_give_the_same_predictions_and_scores(scenario):
    together, (apart, *_, story) = scenario(whole)[0], scenario(killed_single_jobs)
    print(story)
    assert {path.name for path in (apart / UNIT).glob("*.json")} == {f"{step}_{m}.json" for step in ("train", "eval") for m in SINGLE}
    ours, theirs = results(apart), results(together)
    names = [f"{UNIT}/{method}/predictions_{split}.parquet" for method in SINGLE for split in ("validation", "test")]
    assert [ours[name] for name in names] == [theirs[name] for name in names]
    for name in ("table01.csv", "scores.csv"):
        lines = [(root / "figures" / "tiny" / name).read_text().splitlines() for root in (apart, together)]
        assert len(lines[0]) == 1 + (len(lines[1]) - 1) // 2 and set(lines[0]) < set(lines[1])


# --- two at once -------------------------------------------------------------------------------------------------------------

def doubled(folder, scenario, _):
    "The same command twice at the same moment on the same files: one method is not trained, none is evaluated."
    copy = copy_repository(folder / "copy")
    shutil.copytree(scenario(whole)[0] / "data" / "runs", copy / "data" / "runs")
    for path in (copy / UNIT / "dpo_catto" / "train.json", *(copy / UNIT).glob("*/eval.json"), *MANIFESTS[1:]):
        (copy / path).unlink()
    both = [Run(copy), Run(copy)]
    return copy, [run.end() for run in both]


@runs(whole, doubled)
def test_two_runs_at_once_both_succeed_with_one_set_of_results(scenario):
    copy, ends = scenario(doubled)
    for code, output in ends:
        assert code == 0, output
    assert results(copy) == results(scenario(whole)[0])


# --- steps that end early ----------------------------------------------------------------------------------------------------

# notebook: (number of the cell that is put in, its source)
TRAPS = {
    "02_data_gen": (1, "raise SystemExit(0)"),
    "03_train": (-2, "import os; os._exit(1)"),  # everything is trained, all but the summary is written
    "04_eval": (1, "import sys; sys.exit(0)"),
    "06_report": (1, "import os; os._exit(1)"),
}


def trapped(folder, scenario, _):
    "A finished run of which one step and all after it are taken back, and then that step ends early; for each step."
    ends = {}
    for i, (name, trap) in enumerate(TRAPS.items()):
        copy = copy_repository(folder / name, spoil={name: trap})
        shutil.copytree(scenario(whole)[0] / "data" / "runs", copy / "data" / "runs")
        for path in MANIFESTS[i:]:
            (copy / path).unlink()
        code, text = Run(copy).end()
        ends[name] = code, text, (copy / MANIFESTS[i]).exists(), re.findall(r"^Job \d+: (\w+)", text, flags=re.M)
    return ends


@runs(whole, trapped)
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_step_that_ends_early_fails_and_leaves_no_manifest(scenario, name):
    code, text, exists, jobs = scenario(trapped)[name]
    assert jobs == [{"02_data_gen": "data", "03_train": "train", "04_eval": "evaluate", "06_report": "report"}[name]], text
    assert code != 0, text
    assert not exists
    assert ("DeadKernelError" if "_exit" in TRAPS[name][1] else "MissingOutputException") in text, text


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
            catto_pairs=8, dpo_epochs=1, preference_save_steps=10)  # CATTO takes 4 steps and logs every 10: its log has no loss


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
    check_predictions(copy, source="rows", n=30)
    check_table(copy, n=30)
    text = (copy / "figures" / "tiny" / "table01.md").read_text()
    assert "mini world" not in text and "a rehearsal on real questions with invented teacher answers" in text
    assert (copy / "figures" / "tiny" / "figure1_commonsense_qa.svg").read_text().count("ECE ") >= len(METHODS)
    for method in METHODS:
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
    for method in METHODS:
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
    (dict(sft_epochs="two"), "setting 'sft_epochs' = 'two' is not of type int"),
    (dict(test_questions=0), "setting 'test_questions' = 0: at least 1"),
    (dict(source="somewhere"), "'teacher' = 'sampler' knows the mini world only"),
])
def test_settings_are_refused_by_name(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_an_unknown_profile_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown profile 'large': tiny.ini has .*tiny"):
        load("large", file=write_settings(tmp_path / "tiny.ini"))


def test_unknown_task_and_method_are_refused_by_the_steps(settings, tmp_path):
    with pytest.raises(ValueError, match="unknown task 'squad': accepted are"):
        prepare_data(settings(), "squad", 0, tmp_path)
    prepare_data(settings(), "commonsense_qa", 0, tmp_path)
    for methods in (["ppo"], ["sft", "ppo"]):  # before sft is trained, too
        with pytest.raises(ValueError, match="unknown method 'ppo': accepted are sft, dpo"):
            train_methods(settings(), "commonsense_qa", 0, methods, tmp_path)
    with pytest.raises(FileNotFoundError, match="dpo starts from the SFT model of commonsense_qa, seed 0"):
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
