"""Where the steps run: the profiles, SLURM on this one machine, and training in several processes.

SLURM is tested with its own daemons, which scripts/slurm_single_node.sh installs and starts; that takes root and apt-get."""
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_pipeline import TASK, UNIT, Run, copy_repository, make, manifest, results, write_settings

from catto import train
from catto.data import ANSWER_PREFIX, prepare_data
from catto.methods import METHODS
from catto.settings import fingerprint, load
from catto.train import train_method

REPO = Path(__file__).resolve().parents[1]
SCRIPT = REPO / "scripts" / "slurm_single_node.sh"
# No accounting here, so squeue is asked. The first look comes after 2 s, not 40.
ONE_NODE = "OPTIONS=--slurm-status-command squeue --slurm-no-account --slurm-init-seconds-before-status-checks 2 --seconds-between-status-checks 2"


# --- the word CLUSTER --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("word", ["slrm", "", "local slurm"])
def test_an_unknown_cluster_is_refused_with_what_is_accepted(word):
    tried = subprocess.run(["make", "--no-print-directory", "reproduce", f"CLUSTER={word}"], cwd=REPO, capture_output=True, text=True)
    assert tried.returncode != 0 and not tried.stdout, tried.stdout
    assert f"CLUSTER = '{word}': accepted are local node slurm." in tried.stderr, tried.stderr


@pytest.mark.parametrize("word", ["SEED=1", "JOB=2"])
def test_an_unknown_word_is_refused_with_what_is_accepted(word):
    tried = subprocess.run(["make", "--no-print-directory", "status", word], cwd=REPO, capture_output=True, text=True)
    assert tried.returncode != 0 and not tried.stdout
    assert f"unknown {word.split('=')[0]}: accepted are PYTHON PROFILE SEEDS SWEEPS CLUSTER JOBS GPUS CONFIG SAMPLES OPTIONS" in tried.stderr


@pytest.mark.parametrize("word", ["JOBS=two", "JOBS=0", "GPUS=1.5"])
def test_a_number_of_steps_is_a_whole_number(word):
    tried = subprocess.run(["make", "--no-print-directory", "status", word], cwd=REPO, capture_output=True, text=True)
    assert tried.returncode != 0 and not tried.stdout
    assert f"{word.replace('=', ' is ')}: accepted is a whole number from 1" in tried.stderr


# --- what a step asks for ------------------------------------------------------------------------------------------------------

def test_every_step_asks_for_what_the_settings_say(tmp_path):
    "Dry run of the paper profile for SLURM, one training in two processes."
    words = dict(profile="paper", seeds="0", root=str(tmp_path), settings=str(tmp_path / "settings.ini"))
    text = (REPO / "settings.ini").read_text()
    (tmp_path / "settings.ini").write_text(text.replace("\nparallel = none\n", "\nparallel = ddp\n", 1))
    paper = load("paper", file=tmp_path / "settings.ini")
    assert (paper.parallel, paper.parallel_processes) == ("ddp", 2)
    plain = re.sub(r"\n    message:\n.*", "", (REPO / "Snakefile").read_text())  # without messages of ours Snakemake prints the resources
    (tmp_path / "Snakefile").write_text(plain)
    command = [sys.executable, "-m", "snakemake", "--snakefile", tmp_path / "Snakefile", "--directory", REPO, "--workflow-profile", "profiles/slurm", "--dry-run", "--nolock",
               "--config", *(f"{name}={value}" for name, value in words.items())]
    tried = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert tried.returncode == 0, tried.stdout + tried.stderr
    blocks = re.findall(r"^rule (\w+):.*?^    resources: ([^\n]*)", tried.stdout + tried.stderr, flags=re.M | re.S)
    asked = {rule: dict(pair.split("=", 1) for pair in resources.split(", ")) for rule, resources in blocks}
    asked.pop("all")
    assert set(asked) == {"data", "train", "evaluate", "confidence", "sweep", "report", "experiments"}
    for rule, resources in asked.items():
        kind, processes = "gpu" if rule in ("train", "evaluate", "confidence", "sweep") else "cpu", 2 if rule in ("train", "sweep") else 1
        expected = dict(gpu=processes if kind == "gpu" else 0, nodes=1, cpus_per_task=paper.step_cores * processes,
                        mem_mb=1000 * getattr(paper, f"{kind}_step_memory") * processes, runtime=60 * getattr(paper, f"{kind}_step_hours"))
        assert {name: int(resources[name]) for name in expected} == expected, rule


# --- GPUs of one machine -----------------------------------------------------------------------------------------------------

def on_free_gpus(folder, gpus, *command):
    "A process of scripts/on_free_gpus.py on a machine with these GPUs, its locks below `folder`."
    env = os.environ | {"CUDA_VISIBLE_DEVICES": gpus, "TMPDIR": str(folder)}
    return subprocess.Popen([sys.executable, REPO / "scripts" / "on_free_gpus.py", *command], env=env, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


SHOW = "sh", "-c", "echo $CUDA_VISIBLE_DEVICES; read answer"  # and stay until somebody answers, or goes


def test_steps_on_one_machine_get_gpus_of_their_own(tmp_path):
    first, second = (on_free_gpus(tmp_path, "0,3,5", count, *SHOW) for count in "12")
    held = [process.stdout.readline().strip().split(",") for process in (first, second)]
    assert [len(gpus) for gpus in held] == [1, 2] and sorted(sum(held, [])) == ["0", "3", "5"]
    third = on_free_gpus(tmp_path, "0,3,5", "2", *SHOW)
    with pytest.raises(subprocess.TimeoutExpired):
        third.wait(timeout=2)  # none is free
    second.kill()  # however it ends
    assert third.stdout.readline().strip().split(",") == held[1]
    for process in (first, second, third):
        process.communicate()


def test_a_step_that_takes_more_gpus_than_there_are_is_refused(tmp_path):
    process = on_free_gpus(tmp_path, "0,1", "4", *SHOW)
    assert "this step takes 4 GPUs and 2 are to be had (0, 1)" in process.communicate(timeout=30)[1] and process.returncode == 1


def test_without_gpus_a_step_runs_as_it_is(tmp_path):
    assert on_free_gpus(tmp_path, "", "1", "echo", "here").communicate(timeout=30)[0] == "here\n"


# --- one training in several processes -----------------------------------------------------------------------------------------

on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the processes of these tests are on the CPU; where there are GPUs, they would take these")


ALONE = "import pickle, sys; from catto.train import train_method; args, kwargs = pickle.load(open(sys.argv[1], 'rb')); train_method(*args, **kwargs)"
CHANGES = dict(sft_learning_rate="1e-3", sft_epochs=20, sft_save_steps=10, rcft_batch_size=16, rcft_epochs=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "trained(method, **settings) -> (arguments of `train_method`, for a folder that is not there yet); rows make whole batches."
    root = tmp_path_factory.mktemp("trained")
    ini = write_settings(root / "tiny.ini", **CHANGES)
    one = load("tiny", file=ini)
    prepare_data(one, TASK, 0, root)
    data = {name: Dataset.from_parquet(str(root / UNIT / "data" / f"{name}.parquet")) for name in ("sft", "preferences", "validation")}

    def arguments(method, base=None, **settings):
        rows = data["preferences"].select(range(24)) if METHODS[method].kind == "preference" else data["sft"].select(range(64))
        folder = root / f"{method}_{fingerprint(settings)[:8]}"
        return (load("tiny", file=ini, **settings), rows, method, 0), dict(folder=folder, validation=data["validation"], base=base)
    return arguments


def weights(folder, step):
    "All trained weights of a checkpoint, or its adapters; the output layer is the embedding, and counts once."
    (file,) = (folder / "checkpoints" / f"checkpoint-{step}").glob("*model.safetensors")
    tensors = load_file(file)
    if (head := tensors.pop("lm_head.weight", None)) is not None:  # written by FSDP
        assert torch.equal(head, tensors["model.embed_tokens.weight"])
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())])


def assert_same_training(one, two, facts, tolerance):
    "Weights at the last step differ by `tolerance` of the way they went since the first checkpoint, at most; logs and files agree."
    (one, ours), (two, theirs) = zip((one, two), facts)
    assert [ours[name] for name in ("steps", "tokens", "rows")] == [theirs[name] for name in ("steps", "tokens", "rows")]
    last, (first, *_) = ours["steps"], sorted(map(int, ours["validation_accuracy"]))
    way = (weights(one, last) - weights(one, first)).norm()
    assert way > 0 and (weights(two, last) - weights(one, last)).norm() < tolerance * way, ((weights(two, last) - weights(one, last)).norm() / way)
    losses = [pd.read_csv(folder / "training_log.csv")["loss"].dropna().to_numpy() for folder in (one, two)]
    assert len(losses[0]) and np.allclose(*losses, rtol=1e-3)


def processes_with(text):
    return [p for p in psutil.process_iter(["cmdline", "status"])
            if p.info["status"] != psutil.STATUS_ZOMBIE and any(text in word for word in p.info["cmdline"] or ())]


DDP = dict(parallel="ddp", parallel_processes=2)


@on_the_cpu
def test_two_processes_give_the_weights_of_one_also_when_they_were_killed(trained, one_thread, tmp_path):
    alone, launched = trained("sft"), trained("sft", **DDP)
    folder = launched[1]["folder"]
    (tmp_path / "arguments.pickle").write_bytes(pickle.dumps(launched))
    parent = subprocess.Popen([sys.executable, "-c", ALONE, tmp_path / "arguments.pickle"], env=os.environ | {"TMPDIR": str(tmp_path)})
    end = time.monotonic() + 300
    while not (folder / "checkpoints" / "checkpoint-20" / "whole.json").exists():
        assert parent.poll() is None and time.monotonic() < end, (folder / "launch.log").read_text()
        time.sleep(0.02)
    assert len(processes_with(str(tmp_path))) >= 4  # the parent, the launcher, and two at work
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while processes_with(str(tmp_path)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not processes_with(str(tmp_path))
    there = max(int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("checkpoint-*"))
    facts = [train_method(*args, **kwargs)[1] for args, kwargs in (alone, launched)]
    assert there < facts[1]["steps"] and [f["resumed"] for f in facts] == [False, True]
    assert_same_training(alone[1]["folder"], folder, facts, 1e-4)


@on_the_cpu
@pytest.mark.parametrize("method, rank", [("rcft", 0), ("dpo_catto", 0), ("dpo_catto", 2)])
def test_two_processes_give_the_weights_of_one(method, rank, trained, one_thread):
    base, words = trained("sft"), {}
    if not (base[1]["folder"] / "model").exists():
        train_method(*base[0], **base[1])
    if rank:  # adapters on a model in a folder
        words = dict(model=base[1]["folder"] / "model", lora_rank=rank)
        base = trained("sft", **words)
        train_method(*base[0], **base[1])
    alone, launched = (trained(method, base=base[1]["folder"] / "model", **words, **more) for more in ({}, DDP))
    facts = [train_method(*args, **kwargs)[1] for args, kwargs in (alone, launched)]
    assert_same_training(alone[1]["folder"], launched[1]["folder"], facts, 1e-4)


@on_the_cpu
def test_two_processes_give_the_weights_of_one_where_rows_have_no_label(trained, one_thread):
    "RCFT's penalty is a mean over the rows that have a label, however these are spread."
    base, words = trained("sft"), dict(rcft_batch_size=4)
    if not (base[1]["folder"] / "model").exists():
        train_method(*base[0], **base[1])
    alone, launched = (trained("rcft", base=base[1]["folder"] / "model", **words, **more) for more in ({}, DDP))
    rows = alone[0][1].map(lambda row, i: {"completion": f"{ANSWER_PREFIX} none </answer>"} if i % 2 else {}, with_indices=True)
    facts = [train_method(args[0], rows, *args[2:], **kwargs)[1] for args, kwargs in (alone, launched)]
    assert_same_training(alone[1]["folder"], launched[1]["folder"], facts, 1e-4)
    logs = [pd.read_csv(kwargs["folder"] / "training_log.csv")["rcft/penalty"].dropna().to_numpy() for _, kwargs in (alone, launched)]
    assert len(logs[0]) and np.allclose(*logs, rtol=1e-3)


FSDP = DDP | dict(parallel="fsdp")
SHARES = """# FSDP for processes without a GPU, which accelerate keeps for devices
import os
import accelerate.state, torch
from accelerate.utils import DistributedType

def prepare(self, *args, **kwargs):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU

if "LOCAL_RANK" in os.environ:
    accelerate.state.PartialState._prepare_backend = prepare
    accelerate.state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
"""


@on_the_cpu
@pytest.mark.parametrize("method", ["sft", "dpo_catto"])
def test_shares_of_a_model_give_the_weights_of_the_whole_also_when_resumed(method, trained, one_thread, monkeypatch, tmp_path):
    base = trained("sft")
    if not (base[1]["folder"] / "model").exists():
        train_method(*base[0], **base[1])
    base = base[1]["folder"] / "model" if method != "sft" else None
    (tmp_path / "sitecustomize.py").write_text(SHARES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    alone, launched = (trained(method, base=base, **words) for words in ({}, FSDP))
    folder = launched[1]["folder"]
    facts = [train_method(*args, **kwargs)[1] for args, kwargs in (alone, launched)]
    assert_same_training(alone[1]["folder"], folder, facts, 1e-4)
    assert not facts[1]["resumed"]
    (again, *_) = (folder / "checkpoints" / f"checkpoint-{facts[1]['steps']}").glob("pytorch_model_fsdp*")  # as `checkpoint_bytes` counts
    assert again.stat().st_size == pytest.approx((again.parent / "model.safetensors").stat().st_size, rel=0.05)
    steps = sorted(map(int, facts[1]["validation_accuracy"]))
    if len(steps) > 1:
        for step in steps[1:]:
            shutil.rmtree(folder / "checkpoints" / f"checkpoint-{step}")
        again = train_method(*launched[0], **launched[1])[1]
        assert again["resumed"]
        assert_same_training(alone[1]["folder"], folder, [facts[0], again], 1e-4)


@on_the_cpu
@pytest.mark.parametrize("method, parallel", [("sft", "ddp"), ("dpo_catto", "ddp"), ("sft", "fsdp"), ("dpo_catto", "fsdp")])
def test_processes_in_bfloat16_see_the_probabilities_that_one_sees(method, parallel, trained, one_thread, monkeypatch, tmp_path):
    "Rounded to bfloat16, as FSDP would have it, a response's log-probability is right to half a nat."
    base, low = trained("sft"), dict(dtype="bfloat16")
    if not (base[1]["folder"] / "model").exists():
        train_method(*base[0], **base[1])
    (tmp_path / "sitecustomize.py").write_text(SHARES if parallel == "fsdp" else "")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    base = base[1]["folder"] / "model" if method != "sft" else None
    alone, launched = (trained(method, base=base, **low, **words) for words in ({}, DDP | dict(parallel=parallel)))
    for args, kwargs in (alone, launched):
        train_method(*args, **kwargs)
    one, two = (pd.read_csv(kwargs["folder"] / "training_log.csv") for _, kwargs in (alone, launched))
    for name, tolerance in ({"loss": 0.01} if method == "sft" else {"loss": 0.01, "logps/chosen": 0.02, "logps/rejected": 0.02}).items():
        assert np.allclose(one[name].dropna(), two[name].dropna(), rtol=0, atol=tolerance), (one[name] - two[name]).abs().max()


@on_the_cpu
def test_shares_without_gpus_are_refused(trained, one_thread):
    args, kwargs = trained("sft", **FSDP)
    shutil.rmtree(kwargs["folder"], ignore_errors=True)
    with pytest.raises(ChildProcessError, match="'parallel' = 'fsdp' needs GPUs: none and ddp are accepted without"):
        train_method(*args, **kwargs)


def test_a_process_has_its_gpu_before_a_model_is_loaded(monkeypatch, tmp_path):
    "Else every process would put its model on the first one."
    calls, state = [], train.PartialState
    (tmp_path / "arguments.pickle").write_bytes(pickle.dumps((load("smoke", file=REPO / "settings.ini", parallel="ddp"), "others")))
    monkeypatch.setattr(train.threading, "Thread", lambda **kwargs: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(train, "PartialState", lambda *args, **kwargs: calls.append("state") or state(*args, **kwargs))
    monkeypatch.setattr(train, "_fit", lambda *args: calls.append("fit") or {})
    train.main(tmp_path)
    assert calls[:2] == ["state", "fit"] and (tmp_path / "facts.json").exists()


@on_the_cpu
def test_a_training_that_fails_says_why(trained, one_thread):
    args, kwargs = trained("sft", context_tokens=20, **DDP)
    with pytest.raises(ChildProcessError, match=r"(?s)accelerate launch of sft ended with code 1.*no row fits into context_tokens = 20"):
        train_method(*args, **kwargs)
    assert not (kwargs["folder"] / "model").exists()


# --- SLURM -------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def slurm():
    "SLURM daemons on this machine, ended with the tests."
    if os.getuid() != 0 or not shutil.which("apt-get"):
        pytest.skip("SLURM is set up by root, with apt-get")
    if not shutil.which("slurmctld") and not os.environ.get("CI"):
        pytest.skip("no SLURM here; with CI=true, or after `scripts/slurm_single_node.sh start`, it is installed and tested")
    try:
        started = subprocess.run([SCRIPT, "start"], capture_output=True, text=True, timeout=300)
        if "could not install" in started.stderr or "not from here" in started.stderr or started.returncode and os.environ.get("CI"):
            pytest.skip(started.stderr.strip())  # an unknown machine may not let its daemons run
        assert started.returncode == 0, started.stderr
        yield
    finally:
        subprocess.run([SCRIPT, "stop"], check=True, timeout=120)


def queue():
    "Dict SLURM's number of a job -> its rule, of the jobs that run."
    lines = subprocess.run(["squeue", "--noheader", "--states=running", "--format=%i %k"], capture_output=True, text=True, check=True).stdout
    return {number: rule for number, rule in re.findall(r"^(\d+) rule_([a-z]+)", lines, flags=re.M)}


def wait_for(what, run, seconds=400):
    "What it returns, once that is true; the run must go on meanwhile."
    end = time.monotonic() + seconds
    while not (found := what()):
        assert run.process.poll() is None and time.monotonic() < end, run.log.read_text()
        time.sleep(0.2)
    return found


def test_a_run_through_slurm_with_a_job_killed_gives_the_tables_of_a_local_run(slurm, tmp_path):
    here, there = (copy_repository(tmp_path / name) for name in ("here", "there"))
    local, run = Run(here), Run(there, "CLUSTER=slurm", ONE_NODE)
    try:
        wait_for((there / UNIT / "sft" / "train.json").exists, run)  # the rest of the job is still to come
        (job,) = [number for number, rule in queue().items() if rule == "train"]
        before = manifest(there, "sft/train.json")
        subprocess.run(["scancel", job], check=True)
        assert not (there / UNIT / "train_all.json").exists()
    finally:
        (code, output), (local_code, local_output) = run.end(), local.end()
    assert (code, local_code) == (0, 0), output + local_output
    assert f"SLURM-job '{job}' failed, SLURM status is: 'CANCELLED'" in output and "Trying to restart job" in output, output
    submitted = re.findall(r"has been submitted with SLURM jobid (\d+) \(log: \S*/rule_(\w+)/", output)
    assert sorted(rule for _, rule in submitted) == sorted(["data", "train", "train", "evaluate", "confidence", "sweep", "report", "experiments"])
    assert manifest(there, "sft/train.json") == before  # what was done was not done again
    assert results(there) == results(here)
