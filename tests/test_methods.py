"""The methods of the study as they are trained: what sets each apart, what a run leaves behind, and what a fault stops."""
import dataclasses
import errno
import functools
import json
import math
import shutil
import types

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from test_trainer import Stopped, assert_same, batch_of, by_hand, steady, stop_at, truncate

from catto import train
from catto.data import SamplingTeacher, build_preferences, build_sft, load_questions
from catto.eval import expected_calibration_error
from catto.loss import cal_dpo_loss, catto_loss, dpo_loss, reward_calibration_loss
from catto.methods import METHODS, Run, grid
from catto.predict import answer_logits, fit_temperature, load_model
from catto.settings import file_hash, load, read_manifest, run_folder
from catto.train import check_disk, mini_tokenizer, train_methods, train_runs

TASK = "commonsense_qa"
TRAINED = [name for name, method in METHODS.items() if method.kind != "scaled"]
PREFERENCE = [name for name, method in METHODS.items() if method.kind == "preference"]
MATCHED = [name for name in PREFERENCE if METHODS[name].matched]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def made_once(repo):
    "Every SFT run would learn the same tokenizer again; and the code counts as it was at first, whoever edits it meanwhile."
    tokenizer = mini_tokenizer(load("smoke", file=repo / "settings.ini"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "mini_tokenizer", lambda settings: tokenizer)
        patch.setattr(train, "code_hash", functools.cache(train.code_hash))
        yield


@pytest.fixture(scope="module")
def settings(repo):
    "Runs of 8 to 16 steps. Every number of a loss differs from its default; one learning rate, because the task is the ood_task."
    return load(
        "smoke", file=repo / "settings.ini", hidden_size=16, hidden_layers=1, attention_heads=2, key_value_heads=1, mlp_size=32,
        ood_task=TASK, sft_batch_size=8, sft_epochs=2, sft_save_steps=4, preference_batch_size=4, catto_pairs=16, catto_epochs=2,
        dpo_epochs=1, preference_save_steps=4, preference_learning_rate=3e-3, preference_learning_rates="3e-3 3e-4",
        rcft_learning_rate=3e-3, rcft_batch_size=8, rcft_epochs=2, max_new_tokens=6, generation_batch_size=24, beta=0.2,
        label_smoothing=0.3, calibration_weight=0.3, surrogate_scale=2, label_weight=0.7, label_form="brier", label_scale=3)


def write_data(settings, root, sft_rows=60, pairs=32):
    "What the data step leaves for training."
    folder = run_folder(root, settings, TASK, 0, "data")
    folder.mkdir(parents=True)
    questions, teacher = load_questions(TASK, split="train", n=130), SamplingTeacher()
    sft, _ = build_sft(questions, [teacher.respond(q, 0) for q in questions])
    preferences, _ = build_preferences(questions, [[teacher.respond(q, k, 1.0) for k in range(1, 7)] for q in questions], 1, 1)
    tables = {"sft": sft.select(range(sft_rows)), "preferences": preferences.select(range(pairs)),
              "validation": load_questions(TASK, split="validation", n=24)}
    for name, table in tables.items():
        table.to_parquet(str(folder / f"{name}.parquet"))
    (folder / "manifest.json").write_text(json.dumps({"outputs": {p.name: file_hash(p) for p in folder.glob("*.parquet")}}))


@pytest.fixture(scope="module")
def study(settings, tmp_path_factory):
    "(root, manifests) of every method, trained without a stop. No test writes here."
    root = tmp_path_factory.mktemp("study")
    write_data(settings, root)
    return root, train_methods(settings, TASK, 0, list(METHODS), root)


@pytest.fixture
def folder_of(settings):
    return lambda root, name: run_folder(root, settings, TASK, 0, name)


@pytest.fixture
def part(study, settings, folder_of, tmp_path):
    "part(names) -> root of a copy of the study with the data and these methods alone."
    def part(*names):
        for name in ("data", *names):
            shutil.copytree(folder_of(study[0], name), folder_of(tmp_path, name))
        return tmp_path

    return part


@pytest.fixture
def trained(monkeypatch):
    "Names of the folders of the runs that are really trained from now on."
    names, original = [], train.train_method

    def train_method(*args, folder, **kwargs):
        names.append(folder.name)
        return original(*args, folder=folder, **kwargs)

    monkeypatch.setattr(train, "train_method", train_method)
    return names


def files_of(folder):
    "All that a finished run leaves but its manifest, as bytes."
    paths = [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".json", ".lock") or p.parent.name == "model"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def tensors(folder):
    return load_file(folder / "model" / "model.safetensors")


# --- the table ----------------------------------------------------------------------------------------------------------

def test_every_base_comes_first_and_every_kind_has_a_trainer():
    names = list(METHODS)
    for i, (name, method) in enumerate(METHODS.items()):
        assert method.kind in (*train.TRAINERS, "scaled") and (method.base is None) == (method.kind == "sft")
        assert method.base is None or method.base in names[:i], name
    assert METHODS["rcft"].base == "dpo" and {METHODS[name].base for name in PREFERENCE} == {"sft"}
    assert set(PREFERENCE) - set(MATCHED) == {"dpo"}


def test_the_grid(settings):
    settings = dataclasses.replace(settings, ood_task="mmlu", preference_learning_rates=(1e-5, 3e-3, 3e-4))
    runs = {name: grid(settings, TASK, name) for name in METHODS}
    for name in METHODS:
        rates = [run.settings(settings).preference_learning_rate for run in runs[name]]
        assert rates == ([3e-3, 1e-5, 3e-4] if name in PREFERENCE else [3e-3]), name
        assert runs[name][0] == Run(name) == grid(settings, "mmlu", name)[0] and len(grid(settings, "mmlu", name)) == 1
    assert [run.name for run in runs["dpo"]] == ["dpo", "dpo@preference_learning_rate=1e-05", "dpo@preference_learning_rate=0.0003"]


def test_a_run_is_named_by_what_is_changed(settings):
    run = Run("dpo_catto", {"surrogate_scale": 4.0, "calibration_form": "bce"})
    assert run == Run("dpo_catto", (("calibration_form", "bce"), ("surrogate_scale", 4.0)))
    assert run.name == "dpo_catto@calibration_form=bce,surrogate_scale=4"
    changed = run.settings(settings)
    assert dataclasses.replace(changed, surrogate_scale=2.0, calibration_form="linear") == settings != changed


# --- what sets each method apart ----------------------------------------------------------------------------------------

def moved(model, seed=0):
    "The model a little away from where it was, so that policy and reference differ."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def expected_loss(method, settings, parts, averages):
    "The loss of one method from catto.loss alone."
    s, sums = settings, parts[:4]
    options = {
        "dpo_bce": dict(weight=s.calibration_weight, form="bce", scale=s.surrogate_scale),
        "dpo_catto": dict(weight=s.calibration_weight, form=s.calibration_form, scale=s.surrogate_scale),
        "dpo_catto_label": dict(weight=s.label_weight, form=s.label_form, scale=s.label_scale)}
    if method in options:
        return catto_loss(*parts, beta=s.beta, **options[method]).mean()
    if method == "cal_dpo_ipo":
        # Deviation: TRL divides IPO's log-ratios by the length of the response, as IPO's authors do; the squared term keeps the sums.
        return ((averages[0] - averages[1] - 1 / (2 * s.beta)).square() + reward_calibration_loss(*sums, s.beta)).mean()
    cal = {"cal_dpo": ("sigmoid", "paper"), "cal_dpo_slic": ("hinge", "paper"), "cal_dpo_released": ("sigmoid", "released")}
    return (cal_dpo_loss(*sums, s.beta, *cal[method]) if method in cal else dpo_loss(*sums, s.beta)).mean()


@pytest.fixture(scope="module")
def losses(study, settings, tmp_path_factory):
    "method -> (the trainer's loss of a batch, the same from catto.loss)."
    data, found = run_folder(study[0], settings, TASK, 0, "data"), {}
    rows, validation = (Dataset.from_parquet(str(data / f"{name}.parquet")) for name in ("preferences", "validation"))
    base = run_folder(study[0], settings, TASK, 0, "sft") / "model"
    for method in PREFERENCE:
        model, tokenizer = load_model(base)
        trainer = train._preference_trainer(settings, method, rows.select(range(8)), 0, tmp_path_factory.mktemp(method), (model, tokenizer), validation)
        moved(trainer.model)
        trainer.train_dataset = trainer.train_dataset.sort("ref_chosen_logps")  # the same order for all
        batch = batch_of(trainer, 6)
        pair = types.SimpleNamespace(model=trainer.model, ref_model=load_model(base)[0])
        parts = by_hand(pair, batch, tokenizer, trainer.args.calibration_tokens == "label")
        lengths = batch["completion_mask"].sum(1).chunk(2)
        averages = [(parts[i] - parts[i + 2]) / lengths[i] for i in (0, 1)]
        with torch.no_grad():
            found[method] = (trainer.compute_loss(trainer.model, batch).item(), expected_loss(method, settings, parts, averages).item())
            if method == "cal_dpo_ipo":
                found["IPO of the paper"] = None, cal_dpo_loss(*parts[:4], settings.beta, "ipo").mean().item()
    return found


@pytest.mark.parametrize("method", PREFERENCE)
def test_the_trainers_loss_is_that_of_the_pure_function(losses, method):
    ours, expected = losses[method]
    assert ours == pytest.approx(expected, rel=1e-5)


def test_ipo_is_that_of_trl_and_not_of_the_pure_function(losses):
    "TRL divides by the responses' lengths; the numbers of cal_dpo_ipo are not those of cal_dpo_loss(base='ipo')."
    assert losses["cal_dpo_ipo"][0] != pytest.approx(losses["IPO of the paper"][1], rel=1e-2)


def test_no_two_methods_have_one_loss(losses):
    "But dpo and dpo_matched, which differ in their budget alone."
    values = {method: losses[method][0] for method in PREFERENCE}
    assert values["dpo"] == pytest.approx(values.pop("dpo_matched"), rel=1e-6)
    ordered = sorted(values.values())
    assert min(b / a for a, b in zip(ordered, ordered[1:])) > 1.001, values


def test_label_smoothing_changes_the_loss_of_sft(study, settings, tmp_path):
    data = run_folder(study[0], settings, TASK, 0, "data")
    rows, found = Dataset.from_parquet(str(data / "sft.parquet")).select(range(4)), {}
    for method, smoothing in (("sft", 0.0), ("sft_ls", settings.label_smoothing)):
        trainer = train._sft_trainer(settings, method, rows, 0, tmp_path, load_model(run_folder(study[0], settings, TASK, 0, "sft") / "model"), None)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
        with torch.no_grad():
            logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            found[method] = trainer.compute_loss(trainer.model, dict(batch)).item()
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=smoothing).item()
        assert found[method] == pytest.approx(expected, rel=1e-5), method
    assert abs(found["sft_ls"] / found["sft"] - 1) > 0.01


def test_no_two_methods_give_one_model(study, folder_of):
    weights = {name: torch.cat([w.flatten() for _, w in sorted(tensors(folder_of(study[0], name)).items())]) for name in TRAINED}
    for i, one in enumerate(TRAINED):
        for other in TRAINED[i + 1:]:
            assert (weights[one] - weights[other]).abs().max() > 1e-5, (one, other)


def test_rcft_starts_from_dpo(study, settings, folder_of, part, trained):
    root = part("sft", "dpo")
    still = Run("rcft", {"rcft_learning_rate": 0.0, "rcft_epochs": 1})
    train_runs(settings, TASK, 0, [still], root)
    start, dpo, sft = (tensors(folder_of(root, name)) for name in (still.name, "dpo", "sft"))
    assert all(torch.equal(start[name], dpo[name]) for name in dpo)
    assert any(not torch.equal(start[name], sft[name]) for name in sft)
    key = train._key(settings, TASK, 0, Run("rcft"), root)
    for name, follows in (("sft", False), ("dpo", True)):
        path = folder_of(root, name) / "train.json"
        manifest = json.loads(path.read_text())
        manifest["outputs"]["model/model.safetensors"] = "changed"
        path.write_text(json.dumps(manifest))
        assert (train._key(settings, TASK, 0, Run("rcft"), root) != key) == follows, name
    assert trained == [still.name]


@pytest.mark.parametrize("method", ["sft_ts", "sft_ts_greedy"])
def test_scaled_methods_copy_the_temperature_of_their_base(study, settings, folder_of, part, trained, method):
    root = part("sft", method)
    assert study[1][method]["temperature"] == study[1]["sft"]["temperature"] != 1 and study[1][method]["outputs"] == {}
    path = folder_of(root, "sft") / "train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 3.25}))
    assert train_methods(settings, TASK, 0, [method], root)[method]["temperature"] == 3.25
    assert not trained and sorted(p.name for p in folder_of(root, method).iterdir()) == ["train.json", "train.lock"]


# --- what a run leaves --------------------------------------------------------------------------------------------------

FACTS = {"method", "changes", "rows", "rows_left_out", "steps", "epochs", "best_step", "validation_accuracy", "validation_ece", "temperature",
         "parameters", "tokens", "train_seconds", "resumed", "peak_memory_bytes", "inverted_pairs", "largest_gradient", "rewards_inside", "diverged"}


def test_the_manifests_are_named_by_method_in_order(study):
    assert list(study[1]) == list(METHODS)


@pytest.mark.parametrize("method", TRAINED)
def test_what_a_method_leaves(study, settings, folder_of, method):
    folder, facts, kind = folder_of(study[0], method), study[1][method], METHODS[method].kind
    assert json.loads((folder / "train.json").read_text()) == json.loads(json.dumps(facts)) and FACTS <= facts.keys()
    assert sorted(p.name for p in folder.iterdir()) == ["model", "predictions_validation.parquet", "train.json", "train.lock", "training_log.csv"]
    assert all(file_hash(folder / name) == value for name, value in facts["outputs"].items())
    assert {name for name in facts["outputs"] if name != "train.json"} == set(files_of(folder))
    rows, epochs, size, every = {
        "sft": (60, 2, 8, 4), "rcft": (60, 2, 8, 8), "preference": (16, 2, 4, 4) if method in MATCHED else (32, 1, 4, 4)}[kind]
    steps = math.ceil(rows / size) * epochs
    assert (facts["method"], facts["changes"], facts["rows"], facts["epochs"], facts["steps"]) == (method, {}, rows, epochs, steps)
    accuracy = {int(step): value for step, value in facts["validation_accuracy"].items()}
    assert list(accuracy) == list(range(every, steps + 1, every))
    assert facts["best_step"] == min(step for step, value in accuracy.items() if value == max(accuracy.values()))
    assert (facts["diverged"], facts["resumed"], facts["rows_left_out"]) == (False, False, 0)
    assert facts["train_seconds"] > 0 and facts["peak_memory_bytes"] > 1e7 and facts["parameters"] == study[1]["sft"]["parameters"]
    predictions = pd.read_parquet(folder / "predictions_validation.parquet")
    assert predictions["correct"].mean() == accuracy[facts["best_step"]] and len(predictions) == 24
    assert facts["validation_ece"] == expected_calibration_error(predictions["confidence"].to_numpy(), predictions["correct"].to_numpy(), settings.ece_bins)


@pytest.mark.parametrize("method", ["sft", "rcft", "dpo_catto"])
def test_the_temperature_is_fitted_on_the_kept_model(study, settings, folder_of, method):
    questions = Dataset.from_parquet(str(folder_of(study[0], "data") / "validation.parquet"))
    rows = pd.read_parquet(folder_of(study[0], method) / "predictions_validation.parquet")
    fitted = fit_temperature(*answer_logits(*load_model(folder_of(study[0], method) / "model"), questions, rows, 24))
    assert study[1][method]["temperature"] == pytest.approx(fitted, rel=1e-6)


@pytest.mark.parametrize("method", TRAINED)
def test_the_facts_agree_with_the_log(study, folder_of, method):
    facts, log = study[1][method], pd.read_csv(folder_of(study[0], method) / "training_log.csv")
    assert log["step"].is_monotonic_increasing and log["step"].is_unique and log["step"].iloc[-1] == facts["steps"]
    assert facts["tokens"] == log["num_tokens"].iloc[-1] > 1000
    if METHODS[method].kind != "preference":
        assert facts["inverted_pairs"] is facts["largest_gradient"] is facts["rewards_inside"] is None
        return
    last = log[log["step"] > facts["steps"] * (facts["epochs"] - 1) / facts["epochs"]]
    assert len(last) == len(log) / facts["epochs"]
    assert facts["inverted_pairs"] == pytest.approx((1 - last["rewards/accuracies"]).mean(), abs=1e-9)
    assert facts["largest_gradient"] == pytest.approx(log["calibration/largest_gradient"].max(), rel=1e-9)
    if method.startswith("cal_dpo"):
        assert facts["rewards_inside"] == log["reward_calibration/inside"].iloc[-1]
    else:
        assert facts["rewards_inside"] is None


def test_the_share_of_inverted_pairs_is_not_that_of_all_epochs(study, folder_of):
    "At first every margin is 0 and no pair wins: the first epoch would show."
    log = pd.read_csv(folder_of(study[0], "dpo_matched") / "training_log.csv")
    assert study[1]["dpo_matched"]["inverted_pairs"] < (1 - log["rewards/accuracies"]).mean()


# --- what is trained again ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, again", [
    (dict(calibration_weight=0.4), ["dpo_bce", "dpo_catto"]),
    (dict(surrogate_scale=1.0), ["dpo_bce", "dpo_catto"]),
    (dict(calibration_tokens="label"), ["dpo_bce", "dpo_catto"]),
    (dict(calibration_form="l1"), ["dpo_catto"]),
    (dict(label_weight=0.4), ["dpo_catto_label"]),
    (dict(label_form="bce"), ["dpo_catto_label"]),
    (dict(label_scale=1.0), ["dpo_catto_label"]),
    (dict(label_smoothing=0.2), ["sft_ls"]),
    (dict(rcft_weight=2.0), ["rcft"]),
    (dict(rcft_bins=5), ["rcft"]),
    (dict(rcft_learning_rate=1e-3), ["rcft"]),
    (dict(dpo_epochs=3), ["dpo"]),
    (dict(catto_pairs=12), MATCHED),
    (dict(beta=0.1), PREFERENCE),
    (dict(preference_learning_rate=3e-4), PREFERENCE),
    (dict(preference_save_steps=2), PREFERENCE),
    (dict(sft_epochs=3), ["sft", "sft_ls"]),
    (dict(preference_learning_rates=(3e-3, 3e-4, 3e-5)), []),
    (dict(ood_task="mmlu", candidates=9, bootstrap_resamples=50, seeds=(0, 1), sweeps=True, methods=("sft",)), []),
], ids=str)
def test_a_setting_touches_only_what_depends_on_it(study, settings, folder_of, change, again):
    changed = dataclasses.replace(settings, **change)
    keys = {name: train._key(changed, TASK, 0, Run(name), study[0]) for name in METHODS}
    assert [name for name in METHODS if read_manifest(folder_of(study[0], name) / "train.json", keys[name]) is None] == again


def test_a_new_weight_trains_two_methods_and_a_new_rate_only_its_own_runs(study, settings, part, trained):
    root, names = part("sft", "dpo_matched", "dpo_bce", "dpo_catto", "cal_dpo"), ["sft", "dpo_matched", "dpo_bce", "dpo_catto", "cal_dpo"]
    heavier = dataclasses.replace(settings, calibration_weight=0.6)
    train_methods(heavier, TASK, 0, names, root)
    assert trained == ["dpo_bce", "dpo_catto"]
    wider = dataclasses.replace(heavier, ood_task="mmlu")
    manifests = train_methods(wider, TASK, 0, ["sft", "dpo_matched"], root)
    assert trained[2:] == ["dpo_matched@preference_learning_rate=0.0003"]
    assert list(manifests) == ["sft", "dpo_matched", "dpo_matched@preference_learning_rate=0.0003"]
    assert manifests["dpo_matched"] == json.loads(json.dumps(study[1]["dpo_matched"]))
    train_methods(dataclasses.replace(wider, preference_learning_rates=(3e-3, 3e-4, 3e-5)), TASK, 0, ["dpo_matched"], root)
    assert trained[3:] == ["dpo_matched@preference_learning_rate=3e-05"]


def test_a_run_of_the_grid_is_the_method_with_that_rate(study, settings, folder_of, part):
    root = part("sft")
    wider, direct = dataclasses.replace(settings, ood_task="mmlu"), dataclasses.replace(settings, preference_learning_rate=3e-4)
    by_grid = train_runs(wider, TASK, 0, [grid(wider, TASK, "dpo_catto")[1]], root)["dpo_catto@preference_learning_rate=0.0003"]
    by_hand = train_methods(direct, TASK, 0, ["dpo_catto"], root)["dpo_catto"]
    assert by_grid["changes"] == {"preference_learning_rate": 3e-4} and by_hand["changes"] == {}
    assert by_grid["outputs"] == by_hand["outputs"] != study[1]["dpo_catto"]["outputs"]
    assert_same(files_of(folder_of(root, "dpo_catto@preference_learning_rate=0.0003")), files_of(folder_of(root, "dpo_catto")))


# --- bad input ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, message", [
    (lambda: [Run("sft"), Run("ppo")], "unknown method 'ppo'"),
    (lambda: [Run("sft"), Run("dpo", {"learning_rate": 1e-3})], "learning_rate"),
    (lambda: [Run("sft"), Run("dpo", {"beta": -1.0})], "beta"),
    (lambda: [Run("sft"), Run("dpo_catto", {"calibration_form": "huber"})], "calibration_form"),
], ids=["method", "setting", "range", "choice"])
def test_a_wrong_run_is_refused_before_anything_is_trained(settings, part, trained, wrong, message):
    root = part()
    with pytest.raises(ValueError, match=message):
        train_runs(settings, TASK, 0, wrong(), root)
    assert not trained


def test_an_unknown_method_among_good_ones_is_refused_before_training(settings, part, trained):
    with pytest.raises(ValueError, match="unknown method 'ppo': accepted are sft, sft_ls"):
        train_methods(settings, TASK, 0, ["sft", "ppo"], part())
    assert not trained


def test_a_method_without_its_base(settings, part):
    with pytest.raises(FileNotFoundError, match="rcft starts from dpo of commonsense_qa, seed 0: train dpo first"):
        train_methods(settings, TASK, 0, ["rcft"], part("sft"))


# --- faults -------------------------------------------------------------------------------------------------------------

def check_diverged(manifest, folder):
    assert manifest["diverged"] is True and not (folder / "model").exists()
    assert set(manifest["outputs"]) <= {"training_log.csv"}
    assert json.loads((folder / "train.json").read_text())["diverged"] is True


def test_a_diverged_run_stops_nothing_else(settings, folder_of, part, trained):
    wild = dataclasses.replace(settings, ood_task="mmlu", preference_learning_rate=1e30, preference_learning_rates=(1e30, 3e-3))
    root, names = part("sft"), ["sft", "dpo", "rcft", "dpo_matched", "sft_ts"]
    manifests = train_methods(wild, TASK, 0, names, root)
    for name in ("dpo", "dpo_matched", "rcft"):
        check_diverged(manifests[name], folder_of(root, name))
    assert manifests["rcft"]["base_diverged"] == "dpo" and manifests["rcft"]["outputs"] == {} and manifests["rcft"]["method"] == "rcft"
    for name in ("dpo@preference_learning_rate=0.003", "dpo_matched@preference_learning_rate=0.003", "sft_ts"):
        assert manifests[name]["diverged"] is False
    assert (folder_of(root, "dpo@preference_learning_rate=0.003") / "model").is_dir()
    assert manifests["dpo"]["steps"] < 8, "the rest of a diverged run was trained"
    assert pd.read_csv(folder_of(root, "dpo") / "training_log.csv")["step"].iloc[-1] == manifests["dpo"]["steps"]
    before = list(trained)
    train_methods(wild, TASK, 0, names, root)
    assert trained == before, "what has diverged is done"


@pytest.mark.parametrize("method, rate", [("rcft", "rcft_learning_rate"), ("sft_ls", "sft_learning_rate")])
def test_other_kinds_may_diverge_too(settings, folder_of, part, method, rate):
    root = part("sft", "dpo")
    wild = dataclasses.replace(settings, **{rate: 1e30})
    check_diverged(train_runs(wild, TASK, 0, [Run(method)], root)[method], folder_of(root, method))


def test_spoiled_weights_are_a_divergence(settings, folder_of, part, monkeypatch):
    def spoiled(*args, **kwargs):
        model, tokenizer = load_model(*args, **kwargs)
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = math.nan
        return model, tokenizer

    root = part("sft")
    monkeypatch.setattr(train, "load_model", spoiled)
    check_diverged(train_methods(settings, TASK, 0, ["cal_dpo"], root)["cal_dpo"], folder_of(root, "cal_dpo"))


def test_a_run_that_diverges_after_a_good_one_keeps_no_old_model(settings, folder_of, part):
    root = part("sft", "dpo_matched")
    wild = dataclasses.replace(settings, preference_learning_rate=1e30)
    check_diverged(train_methods(wild, TASK, 0, ["dpo_matched"], root)["dpo_matched"], folder_of(root, "dpo_matched"))


def disk_with(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(total=10**12, used=0, free=free))


def test_a_disk_too_small_is_refused_with_numbers(settings, folder_of, part, monkeypatch):
    root = part("sft")
    disk_with(monkeypatch, 10_000)
    stop_at(monkeypatch, 1)
    with pytest.raises(OSError, match=r"they take \d+\.\d GB and 0\.0 GB are free.*preference_save_steps") as caught:
        train_methods(settings, TASK, 0, ["dpo_matched"], root)  # the error of check_disk, not that of a disk that is full already
    assert "is full" not in str(caught.value) and not (folder_of(root, "dpo_matched") / "train.json").exists()


def trainer_of(settings, root, method, where):
    "The trainer that `train_method` would use."
    folder = run_folder(root, settings, TASK, 0, "data")
    rows, validation = (Dataset.from_parquet(str(folder / f"{name}.parquet")) for name in ("sft" if method == "rcft" else "preferences", "validation"))
    base = load_model(run_folder(root, settings, TASK, 0, METHODS[method].base) / "model")
    return train.TRAINERS[METHODS[method].kind](settings, method, rows, 0, where, base, validation)


@pytest.mark.parametrize("method, checkpoints", [("dpo_matched", 2), ("rcft", 2)])
def test_what_checkpoints_take(study, settings, tmp_path, method, checkpoints):
    trainer = trainer_of(settings, study[0], method, tmp_path / "checkpoints")
    needed = check_disk(trainer)
    assert needed == (checkpoints + 1) * 12 * trainer.model.num_parameters()  # float32: a weight and two moments
    with pytest.MonkeyPatch.context() as patch:
        disk_with(patch, needed)
        assert check_disk(trainer) == needed
        disk_with(patch, needed - 1)
        with pytest.raises(OSError, match="no room for the checkpoints"):
            check_disk(trainer)
    trainer.train()
    written = [p for name in ("model.safetensors", "optimizer.pt") for p in (tmp_path / "checkpoints").glob(f"checkpoint-*/{name}")]
    assert len(written) == 2 * checkpoints
    assert sum(p.stat().st_size for p in written) == pytest.approx(needed * checkpoints / (checkpoints + 1), rel=0.2)


def full(error):
    "An optimizer that cannot be saved, from the second time on."
    saved, original = [], transformers.Trainer._save_optimizer_and_scheduler

    def save(self, *args, **kwargs):
        saved.append(1)
        if len(saved) > 1:
            raise error
        return original(self, *args, **kwargs)

    return save


FULL = {
    "OSError": OSError(errno.ENOSPC, "No space left on device"),
    "safetensors": RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch.save": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),  # what a full disk makes of it
}


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_is_one_named_error_and_the_run_goes_on_later(study, settings, folder_of, part, error):
    root = part("sft")
    folder = folder_of(root, "dpo_catto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", full(FULL[error]))
        free = iter([10**9])  # enough before the training, nothing after
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(total=10**9, used=0, free=next(free, 0)))
        with pytest.raises(OSError, match="the disk is full .*does not count as done") as caught:
            train_methods(settings, TASK, 0, ["dpo_catto"], root)
    assert caught.value.errno == errno.ENOSPC and "dpo_catto" in str(caught.value.filename)
    assert not (folder / "train.json").exists() and not (folder / "model").exists()
    facts = train_methods(settings, TASK, 0, ["dpo_catto"], root)["dpo_catto"]
    assert facts["resumed"] is True and facts["outputs"] == study[1]["dpo_catto"]["outputs"]


# --- stopped and taken up again -----------------------------------------------------------------------------------------

MEASURED = "train_seconds", "resumed", "seconds", "peak_memory_bytes"


def assert_taken_up(manifest, whole, folder, study_folder):
    assert (whole["resumed"], manifest["resumed"]) == (False, True)
    assert_same(files_of(folder), files_of(study_folder))
    assert {k: v for k, v in manifest.items() if k not in MEASURED} == {k: v for k, v in whole.items() if k not in MEASURED}
    assert not (folder / "checkpoints").exists()


@pytest.mark.parametrize("method, bases, step", [("sft", [], 7), ("dpo", ["sft"], 7), ("rcft", ["sft", "dpo"], 11)])
def test_a_stopped_run_ends_as_if_nothing_had_stopped_it(study, settings, folder_of, part, method, bases, step):
    root = part(*bases)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stopped):
            train_methods(settings, TASK, 0, [method], root)
    assert [step for step, _ in train.whole_checkpoints(folder_of(root, method) / "checkpoints")] == [8 if method == "rcft" else 4]
    assert not (folder_of(root, method) / "train.json").exists()
    manifest = train_methods(settings, TASK, 0, [method], root)[method]
    assert_taken_up(manifest, study[1][method], folder_of(root, method), folder_of(study[0], method))


def test_a_run_stopped_after_a_last_checkpoint_off_the_beat(settings, folder_of, part):
    "The last checkpoint is written at the last step, whatever the interval is: 9 steps, checkpoints at 4, 8 and 9."
    uneven = dataclasses.replace(settings, catto_pairs=12, catto_epochs=3)
    root = part("sft")
    whole = train_methods(uneven, TASK, 0, ["dpo_matched"], root)["dpo_matched"]
    kept = files_of(folder_of(root, "dpo_matched"))
    assert list(whole["validation_accuracy"]) == ["4", "8", "9"]
    shutil.rmtree(folder_of(root, "dpo_matched"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "best_checkpoint", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            train_methods(uneven, TASK, 0, ["dpo_matched"], root)
    again = train_methods(uneven, TASK, 0, ["dpo_matched"], root)["dpo_matched"]
    assert_same(files_of(folder_of(root, "dpo_matched")), kept)
    assert steady(again["validation_accuracy"]) == steady(whole["validation_accuracy"])
    assert (again["tokens"], again["inverted_pairs"]) == (whole["tokens"], whole["inverted_pairs"])


def test_a_resumed_run_asks_the_disk_only_for_what_is_not_yet_written(settings, folder_of, part, monkeypatch):
    root = part("sft")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Stopped):
            train_methods(settings, TASK, 0, ["dpo_matched"], root)
    assert (folder_of(root, "dpo_matched") / "checkpoints" / "checkpoint-4").is_dir()
    asked = check_disk(trainer_of(settings, root, "dpo_matched", folder_of(root, "data") / "elsewhere"))
    disk_with(monkeypatch, 0.7 * asked)  # of three parts, one lies there
    assert train_methods(settings, TASK, 0, ["dpo_matched"], root)["dpo_matched"]["resumed"] is True


def test_a_damaged_manifest_of_a_base_is_made_again_and_nothing_else(study, settings, folder_of, part, trained, capsys):
    root = part("sft", "dpo_matched", "sft_ts")
    truncate(folder_of(root, "sft") / "train.json")
    manifests = train_methods(settings, TASK, 0, ["sft", "dpo_matched", "sft_ts"], root)
    assert trained == ["sft"] and "manifest train.json of sft is damaged" in capsys.readouterr().out
    assert manifests["sft"]["outputs"] == study[1]["sft"]["outputs"]


def test_a_damaged_model_is_made_again(study, settings, folder_of, part, trained, capsys):
    root = part("sft", "dpo_matched")
    truncate(folder_of(root, "dpo_matched") / "model" / "model.safetensors")
    manifests = train_methods(settings, TASK, 0, ["sft", "dpo_matched"], root)
    assert trained == ["dpo_matched"] and "model.safetensors of dpo_matched is missing or damaged" in capsys.readouterr().out
    assert manifests["dpo_matched"]["outputs"] == study[1]["dpo_matched"]["outputs"]
