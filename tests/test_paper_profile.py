"""What the paper profile adds to the others: adapters, full weights in float32 under bfloat16, its plan, its rehearsal, and what it refuses."""
import dataclasses
import json
import math
import shutil
import subprocess

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_methods import TASK, assert_taken_up, disk_with, files_of, write_data
from test_trainer import Stopped, batch_of, stop_at

from catto import plan, rehearsal, train
from catto.confidence import sample_pool
from catto.data import prepare_data
from catto.eval import evaluate_method
from catto.methods import METHODS, Run, grid
from catto.predict import load_model, load_tokenizer, model_version, predict
from catto.settings import load, run_folder
from catto.train import build_model, check_disk, mini_tokenizer, train_methods

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"adapters": dict(lora_rank=4, lora_alpha=8), "all weights": dict(lora_rank=0)}
METHOD_OF = {"sft": "sft", "preference": "dpo_catto", "rcft": "rcft"}


@pytest.fixture(scope="module")
def base(repo, tmp_path_factory):
    "Folder of a small model with random weights, as one that was had from the hub."
    folder, settings = tmp_path_factory.mktemp("base") / "model", load("smoke", file=repo / "settings.ini", hidden_size=16, hidden_layers=1,
                                                                       attention_heads=2, key_value_heads=1, mlp_size=32)
    tokenizer = mini_tokenizer(settings)
    build_model(settings, tokenizer, 0).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=KINDS)
def study(request, repo, base, tmp_path_factory):
    "(settings, root, manifests) of one method of each kind, in bfloat16, with the paper's learning rate of DPO. No test writes here."
    settings = load(
        "smoke", file=repo / "settings.ini", model=base, dtype="bfloat16", ood_task=TASK, sft_learning_rate=2e-2, sft_batch_size=8, sft_epochs=2, sft_save_steps=4,
        preference_batch_size=4, catto_pairs=16, catto_epochs=2, dpo_epochs=1, preference_save_steps=4, preference_learning_rate=5e-6,
        preference_learning_rates="5e-6", rcft_batch_size=8, rcft_epochs=2, max_new_tokens=6, generation_batch_size=24, **KINDS[request.param])
    root = tmp_path_factory.mktemp("study")
    write_data(settings, root)
    return settings, root, train_methods(settings, TASK, 0, ["sft", "dpo", "rcft", "dpo_catto"], root)


def model_of(study, method, **options):
    settings, root, _ = study
    return load_model(run_folder(root, settings, TASK, 0, method) / "model", settings.dtype, **options)


def test_what_is_kept_loads_in_the_type_of_evaluation(study):
    settings, root, manifests = study
    for method in manifests:
        model, tokenizer = model_of(study, method)
        kinds = {p.dtype for name, p in model.named_parameters() if "lora_" not in name}
        assert kinds == {torch.bfloat16}
        assert isinstance(model, PeftModel) == bool(settings.lora_rank)
        adapters = [p for name, p in model.named_parameters() if "lora_" in name]
        assert bool(adapters) == bool(settings.lora_rank) and all(p.dtype == torch.float32 and not p.requires_grad for p in adapters)
        kept = run_folder(root, settings, TASK, 0, method) / "model"
        names = {path.name for path in kept.iterdir()}
        assert ("adapter_model.safetensors" if settings.lora_rank else "model.safetensors") in names and "ref" not in names


def test_validation_was_answered_by_what_is_kept(study):
    "The adapters are not rounded on their way to the disk: the same answers, with the same confidence."
    settings, root, manifests = study
    questions = Dataset.from_parquet(str(run_folder(root, settings, TASK, 0, "data") / "validation.parquet"))
    for method in manifests:
        again = predict(*model_of(study, method), questions, settings.generation_batch_size, settings.max_new_tokens).to_pandas()
        pd.testing.assert_frame_equal(again, pd.read_parquet(run_folder(root, settings, TASK, 0, method) / "predictions_validation.parquet"))


def kept_weights(study, method):
    settings, root, _ = study
    return load_file(next((run_folder(root, settings, TASK, 0, method) / "model").glob("*.safetensors")))


def test_a_small_learning_rate_moves_the_weights(study):
    "In bfloat16 a step of 5e-6 would leave nearly all of them where they are."
    before, after = kept_weights(study, "sft"), kept_weights(study, "dpo_catto")
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {torch.float32}
    count = sum(t.numel() for t in before.values())
    moved = sum((before[name] != after[name]).sum().item() for name in before) / count
    seen = sum((before[name].bfloat16() != after[name].bfloat16()).sum().item() for name in before) / count
    assert moved > 0.95 and seen < 0.5, (moved, seen)


def trainer_of(study, method, where, base=None):
    settings, root, _ = study
    folder, kind = run_folder(root, settings, TASK, 0, "data"), METHODS[method].kind
    rows, validation = (Dataset.from_parquet(str(folder / f"{name}.parquet")) for name in ("preferences" if kind == "preference" else "sft", "validation"))
    start = train.start_model(settings, rows, 0) if kind == "sft" else load_model(
        run_folder(root, settings, TASK, 0, METHODS[method].base) / "model", train._dtype(settings), trainable=True)
    return train.TRAINERS[kind](settings, method, rows, 0, where, start, validation)


def log_probs(model, batch):
    "Of each response, by hand: chosen, then rejected."
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float().log_softmax(-1)
    of_tokens = logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (of_tokens * batch["completion_mask"][:, 1:]).sum(-1).detach()


def test_the_reference_is_the_sft_model_and_the_first_loss_ln_2(study, tmp_path):
    trainer = trainer_of(study, "dpo_matched", tmp_path)
    batch = batch_of(trainer)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(math.log(2), abs=1e-4)
    reference = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    assert (log_probs(model_of(study, "sft")[0], batch) - reference).abs().max() < 0.5  # of some 150, in bfloat16
    assert (log_probs(load_model(study[0].model)[0], batch) - reference).abs().min() > 0.8  # what SFT started from


def test_every_method_goes_on_with_its_bases_adapters_and_trains_nothing_else(study, tmp_path):
    for method in ("sft", "dpo_matched", "rcft"):
        trainer = trainer_of(study, method, tmp_path / method)
        trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        everything = {name for name, _ in trainer.model.named_parameters()}
        assert trained == ({name for name in everything if "lora_" in name and ".default." in name} if study[0].lora_rank else everything)
        assert trainer.args.bf16 and {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
        if METHODS[method].base:
            saved = kept_weights(study, METHODS[method].base)
            assert all(torch.equal(p, saved[name.replace(".default", "")]) for name, p in trainer.model.named_parameters() if name in trained)


@pytest.fixture
def part(study, tmp_path):
    "part(names) -> root of a copy of the study with the data and these methods alone."
    settings, root, _ = study

    def part(*names):
        for name in ("data", *names):
            shutil.copytree(run_folder(root, settings, TASK, 0, name), run_folder(tmp_path, settings, TASK, 0, name))
        return tmp_path

    return part


@pytest.mark.parametrize("method, bases, step", [("sft", [], 7), ("dpo_catto", ["sft"], 7), ("rcft", ["sft", "dpo"], 11)])
def test_a_stopped_run_ends_as_if_nothing_had_stopped_it(study, part, method, bases, step):
    settings, root, manifests = study
    other = part(*bases)
    folders = [run_folder(where, settings, TASK, 0, method) for where in (other, root)]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stopped):
            train_methods(settings, TASK, 0, [method], other)
    assert len(train.whole_checkpoints(folders[0] / "checkpoints")) == 1
    assert_taken_up(train_methods(settings, TASK, 0, [method], other)[method], manifests[method], *folders)


@pytest.mark.parametrize("method", ["sft", "dpo_matched", "rcft"])
def test_what_checkpoints_take(study, tmp_path, method):
    trainer = trainer_of(study, method, tmp_path / "checkpoints")
    needed = check_disk(trainer)
    with pytest.MonkeyPatch.context() as patch:
        disk_with(patch, needed - 1)
        with pytest.raises(OSError, match="no room for the checkpoints"):
            check_disk(trainer)
    trainer.train()
    folders = list((tmp_path / "checkpoints").glob("checkpoint-*"))
    weights = [t for folder in folders for path in folder.rglob("*.safetensors") for t in load_file(path).values()]
    moments = [t for folder in folders for state in torch.load(folder / "optimizer.pt")["state"].values() for t in state.values() if t.ndim]
    assert len(folders) > 1 and sum(t.nbytes for t in weights + moments) == needed * len(folders) // (len(folders) + 1)


def test_what_is_written_does_not_depend_on_the_process(study):
    settings, root, _ = study
    if settings.lora_rank:
        config = json.loads((run_folder(root, settings, TASK, 0, "dpo_catto") / "model" / "adapter_config.json").read_text())
        assert config["target_modules"] == sorted(config["target_modules"]) and len(config["target_modules"]) == 7
        assert config["base_model_name_or_path"] == settings.model and (config["r"], config["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize("change", [dict(lora_rank=2), dict(lora_alpha=3.0), dict(lora_targets=("q_proj",)), dict(model_revision="abc")])
def test_what_is_trained_is_part_of_the_key(study, change):
    settings, root, _ = study
    keys = [train._key(dataclasses.replace(settings, **c), TASK, 0, Run("sft"), root) for c in ({}, change)]
    assert keys[0] != keys[1]


def test_the_contents_of_a_model_folder_are_part_of_the_key(study, base, tmp_path):
    "Other weights at the same path are another model, and the same at another time are not."
    settings, root, _ = study
    settings = dataclasses.replace(settings, model=str(tmp_path / "model"))

    def write(factor=1.0):
        shutil.copytree(base, settings.model, dirs_exist_ok=True)
        weights = load_file(base / "model.safetensors")
        save_file({name: tensor * factor for name, tensor in weights.items()}, tmp_path / "model" / "model.safetensors", {"format": "pt"})
        return [train._key(settings, TASK, 0, Run(method), root) for method in ("sft", "dpo")]

    first, again, other = write(), write(), write(2.0)
    assert first == again and first[0] != other[0]
    assert first[1] == other[1]  # what is trained from SFT depends on SFT's files, which are made anew


# --- the plan -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["sft", "dpo", "rcft", "dpo_catto"])
def test_the_plan_of_a_run_is_what_the_run_does(study, method):
    settings, root, manifests = study
    manifest = manifests[method]
    load = plan.training_load(settings, Run(method), sft=60, pairs=32)
    assert (load.rows, load.epochs, load.steps, load.checkpoints) == (
        manifest["rows"], manifest["epochs"], manifest["steps"], len(manifest["validation_accuracy"]))
    assert 0 < manifest["tokens"] <= load.sequences * settings.context_tokens
    pairs = METHODS[method].kind == "preference"
    assert load.sequences == load.rows * load.epochs * (2 if pairs else 1)


def test_the_plan_counts_the_bytes_that_are_written(study, tmp_path):
    settings, root, manifests = study
    sizes = plan.model_sizes(settings)
    for method in manifests:
        assert sum(t.nbytes for t in kept_weights(study, method).values()) == sizes.kept
    for method in ("sft", "dpo_matched", "rcft"):
        trainer = trainer_of(study, method, tmp_path / method)
        assert sizes.checkpoint[METHODS[method].kind] == train.checkpoint_bytes(trainer.model)
    assert sizes.trained == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)


def test_the_plan_counts_the_weights_that_fsdp_writes_twice(repo):
    one, shares = (plan.model_sizes(load("paper", file=repo / "settings.ini", methods="sft dpo dpo_catto", lora_rank=0, parallel=word)) for word in ("none", "fsdp"))
    assert shares.checkpoint["sft"] - one.checkpoint["sft"] == 4 * one.parameters and shares.kept == one.kept


def test_the_plan_reads_the_revision_that_is_named(repo, monkeypatch):
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options["revision"]))
        raise OSError("not on this machine")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    assert plan.model_sizes(load("paper", file=repo / "settings.ini", model="nobody/nothing", model_revision="abc")) is None
    assert asked == [("nobody/nothing", "abc")]


def test_rows_are_counted_where_the_data_are(repo, tmp_path):
    paper = load("paper", file=repo / "settings.ini", seeds="0 1", tasks="anli snli")
    folder = run_folder(tmp_path, paper, "anli", 1, "data")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"rows": {"sft": 700, "preferences": 90}}))
    assert plan.training_rows(paper, "anli", 1, tmp_path) == (700, 90, True)
    assert plan.training_rows(paper, "anli", 0, tmp_path) == (paper.train_questions,) * 2 + (False,)
    (folder / "manifest.json").write_text("{")
    assert plan.training_rows(paper, "anli", 1, tmp_path)[2] is False


def test_answers_of_the_plan_by_hand(repo):
    "Of one seed of the mini study: 14 methods, nine of them at a second rate; 12 have a model to sample 8 candidates from; mmlu asks six tasks."
    mini = load("mini", file=repo / "settings.ini")
    assert plan.evaluation_answers(mini, "snli") == (14 + 9 + 12 * 8) * 500
    assert plan.evaluation_answers(mini, "mmlu") == 14 * 6 * 500


def test_hours_of_the_plan_by_hand(repo, tmp_path):
    "Two seeds of two tasks, the pace of each kind a power of ten."
    paper = load("paper", file=repo / "settings.ini", seeds="0 1", tasks="anli", ood_task="mmlu", methods="sft dpo dpo_catto rcft", train_questions=1000)
    pace = {"sft": 1.0, "dpo": 10.0, "catto": 100.0, "reference": 1000.0}
    one = {"sft": 1000 * 3, "dpo": 1000 * (6 * 10 + 1000), "dpo_catto": 500 * (2 * 100 + 1000), "rcft": 1000 * 5}
    anli, mmlu = (sum(seconds * len(grid(paper, task, m)) for m, seconds in one.items()) for task in ("anli", "mmlu"))
    table = plan.plan_table(paper, tmp_path, pace=pace)
    assert table["GPU hours"].astype(float).to_dict() == pytest.approx({"anli": 2 * anli / 3600, "mmlu": 2 * mmlu / 3600, "all": 2 * (anli + mmlu) / 3600})


def test_what_is_not_known_is_called_unknown(repo, tmp_path, capsys):
    bench = pd.DataFrame([("step", "2 pairs x 2048 tokens", m, "time", 3600.0) for m in ("sft", "trl_dpo", "catto_fused", "reference pass")]
                         + [("machine", "", "", "device", "A GPU")], columns=["section", "case", "method", "quantity", "value"])
    bench.to_csv(tmp_path / "bench.csv", index=False)
    paper = load("paper", file=repo / "settings.ini")
    assert "of training alone, on A GPU" in plan.plan_text(paper, tmp_path, tmp_path / "bench.csv")
    for other in (dataclasses.replace(paper, lora_rank=0), dataclasses.replace(paper, model="nobody/nothing")):
        text = plan.plan_text(other, tmp_path, tmp_path / "bench.csv")
        assert "GPU hours: unknown, because `make bench-gpu` measures Qwen3-4B with adapters" in text and text.count("unknown") > 7
    assert plan.main("all", "profile=paper", f"settings={repo / 'settings.ini'}", f"root={tmp_path}") == 0 and "Qwen/Qwen3-4B at main" in capsys.readouterr().out
    assert plan.main("all", "profile=papr") == 1 and "unknown profile 'papr'" in capsys.readouterr().err


# --- the rehearsal ------------------------------------------------------------------------------------------------------

def test_a_cut_of_the_rehearsal(repo, real_samples, tmp_path):
    "The data of all six tasks, and one method of each kind from training to candidates: what `make rehearse` does in full."
    settings = rehearsal.prepare_rehearsal("paper", real_samples, tmp_path, repo / "settings.ini")
    assert settings.profile == "rehearsal" and (settings.dtype, settings.lora_rank) == ("bfloat16", 16)
    size = len(load_tokenizer(settings.model))
    assert size == 151_669 if (real_samples / "qwen_tokenizer").is_dir() else settings.vocab_size < size < 2 * settings.vocab_size
    for task in (*settings.tasks, settings.ood_task):
        rows = prepare_data(settings, task, 0, tmp_path)["rows"]
        assert min(rows.values()) > 0, task
    train.check_model(settings)
    methods = ["sft", "dpo", "rcft", "dpo_catto_label"]
    manifests = train_methods(settings, "snli", 0, methods, tmp_path)
    assert {name.partition("@")[0] for name in manifests} == set(methods) and len(manifests) == 6  # the grid of learning rates
    assert not any(m["diverged"] for m in manifests.values())
    for method in methods:
        assert evaluate_method(settings, "snli", 0, method, tmp_path)["outputs"] and sample_pool(settings, "snli", 0, method, tmp_path)["outputs"]
    assert not (tmp_path / "data" / "runs" / "paper").exists()


@pytest.mark.parametrize("changes", ["parallel = ddp\nparallel_processes = 4\nsft_batch_size = 8\npreference_batch_size = 8\nrcft_batch_size = 8",
                                     "parallel = fsdp\nlora_rank = 0\nmethods = sft dpo dpo_catto"], ids=["ddp", "fsdp"])
def test_a_profile_for_several_gpus_is_rehearsed_in_one_process(repo, tmp_path, changes):
    text = (repo / "settings.ini").read_text()
    (tmp_path / "settings.ini").write_text(text.replace("[paper]\n", f"[paper]\n{changes}\n", 1).replace("\nlora_rank = 16\n", "\n"))
    assert load("paper", file=tmp_path / "settings.ini").parallel != "none"
    settings = rehearsal.write_settings("paper", tmp_path / "out", tmp_path / "settings.ini")
    assert settings.parallel == "none" and settings.preference_batch_size == 2


def test_a_rehearsal_makes_its_model_anew(repo, real_samples, tmp_path):
    "The same settings give the same files, so that nothing is done twice; other sizes give another model."
    text, seen = (repo / "settings.ini").read_text(), []
    for sizes in ("hidden_size = 16", "hidden_size = 16", "hidden_size = 8"):
        (tmp_path / "settings.ini").write_text(text.replace("\nhidden_size = 16\n", f"\n{sizes}\n"))
        settings = rehearsal.prepare_rehearsal("paper", real_samples, tmp_path / "out", tmp_path / "settings.ini")
        seen.append(model_version(settings.model))
    assert seen[0] == seen[1] and seen[1]["config.json"] != seen[2]["config.json"] and seen[1]["tokenizer.json"] == seen[2]["tokenizer.json"]


def test_a_rehearsal_sees_no_gpu_and_waits_for_none(repo):
    "Its steps ask for GPUs as those of the paper profile do; it gets as many as it likes, none of them real."
    told = subprocess.run(["make", "-n", "rehearse", "PROFILE=paper", "SAMPLES=rows"], cwd=repo, capture_output=True, text=True).stdout
    line = next(line for line in told.splitlines() if "snakemake" in line)
    assert "--resources gpu=1000 " in line and "--jobs" not in line and "profile=rehearsal" in line  # as many steps at a time as the machine's profile says
    assert any(line.startswith("CUDA_VISIBLE_DEVICES= ") for line in told.splitlines())


def test_a_rehearsal_without_rows_says_what_to_give(repo, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CATTO_REAL_SAMPLES", raising=False)
    (tmp_path / "snli").mkdir()
    assert rehearsal.main(tmp_path / "out", "paper", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "lacks rows of allenai/reward-bench-2, facebook/anli" in error and "give SAMPLES=<folder>" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


# --- what is refused ----------------------------------------------------------------------------------------------------

@pytest.fixture
def named(repo, base, tmp_path):
    "named(**settings) -> settings whose model is a copy of the base, and the folder of the copy."
    def named(**changes):
        shutil.copytree(base, tmp_path / "model")
        return load("smoke", file=repo / "settings.ini", **{"model": tmp_path / "model", **changes}), tmp_path / "model"

    return named


def no_weights(monkeypatch):
    monkeypatch.setattr(train, "load_model", lambda *args, **kwargs: pytest.fail("the weights were read"))


def test_a_tokenizer_without_a_pad_token_is_refused_before_the_weights_are_read(named, monkeypatch):
    settings, folder = named()
    tokenizer = load_tokenizer(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    no_weights(monkeypatch)
    with pytest.raises(ValueError, match="the tokenizer has no pad token: set tokenizer.pad_token"):
        train.start_model(settings, None, 0)


@pytest.mark.parametrize("changes", [dict(tasks="commonsense_qa", ood_task="snli"), dict(tasks="snli", ood_task="")], ids=["away", "at home"])
def test_labels_that_share_a_token_are_refused_by_name_before_the_weights_are_read(named, monkeypatch, changes):
    settings, _ = named(**changes)
    no_weights(monkeypatch)
    monkeypatch.setitem(train.TASKS, "snli", dataclasses.replace(train.TASKS["snli"], labels=("A", "A or B")))
    with pytest.raises(ValueError, match="labels 'A' and 'A or B' start with the same token"):
        train.start_model(settings, None, 0)


def test_a_model_that_cannot_be_had_says_which_and_how_to_use_a_copy(repo, monkeypatch):
    settings = load("paper", file=repo / "settings.ini", model="nobody/nothing", model_revision="abc")
    with pytest.raises(OSError, match="model 'nobody/nothing' at revision 'abc' cannot be loaded: .*give its folder.*"
                                      "hf download nobody/nothing --revision abc --local-dir <folder>"):
        train.check_model(settings)


def test_weights_that_are_no_safetensors_are_not_read(named):
    _, folder = named()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="cannot be loaded: the folder must hold the model and its tokenizer, the weights as safetensors"):
        load_model(folder)


def test_code_that_comes_with_a_model_is_not_run(named, tmp_path):
    _, folder = named()
    ran = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(ran)!r}, 'w')\nclass OwnModel: pass\nclass OwnConfig: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnModel"],
               "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OSError, match="cannot be loaded: .*nothing that needs code of its own"):
        load_model(folder)
    assert not ran.exists()


def test_adapters_without_their_model_name_it(study, tmp_path):
    settings, root, _ = study
    if settings.lora_rank:
        shutil.copytree(run_folder(root, settings, TASK, 0, "sft") / "model", tmp_path / "model")
        config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
        (tmp_path / "model" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "nobody/nothing", "revision": "abc"}))
        with pytest.raises(OSError, match="model 'nobody/nothing' at revision 'abc' cannot be loaded"):
            load_model(tmp_path / "model")
        (tmp_path / "model" / "adapter_model.safetensors").rename(tmp_path / "model" / "adapter_model.bin")
        with pytest.raises(OSError, match="cannot be loaded: the folder must hold .*it has no adapter_model.safetensors"):
            load_model(tmp_path / "model")


@pytest.mark.parametrize("changes, message", [
    (dict(lora_rank=4), "'lora_rank' = 4: 0 is accepted with model = mini"),
    (dict(lora_rank=-1), "'lora_rank' = -1: at least 0"),
    (dict(lora_alpha=0), "'lora_alpha' = 0.0: at least"),
    (dict(lora_targets=""), "'lora_targets' is empty"),
    (dict(model_revision=""), "'model_revision' is empty: a commit, tag or branch"),
])
def test_settings_that_mean_nothing_are_refused(repo, changes, message):
    with pytest.raises(ValueError, match=message):
        load("smoke", file=repo / "settings.ini", **changes)
