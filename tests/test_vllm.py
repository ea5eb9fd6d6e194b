"""The adapter for vLLM, on objects of vLLM's shape that answer from a model of transformers. vLLM itself runs only where it is installed."""
import dataclasses
import json
import sys
import weakref
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_predict import Scripted, distribution

import catto.eval
import catto.predict
from catto.confidence import sample_pool
from catto.data import format_prompt, load_questions
from catto.predict import VLLMModel, _from_vllm, _write, answer_logits, load_vllm, predict
from catto.settings import load, run_folder
from catto.train import build_model, mini_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def settings(repo):
    return load("smoke", file=repo / "settings.ini", hidden_size=16, hidden_layers=2, attention_heads=2, key_value_heads=1, mlp_size=32)


@pytest.fixture(scope="module")
def tokenizer(settings):
    return mini_tokenizer(settings)


@pytest.fixture(scope="module")
def model(settings, tokenizer):
    "A random model that is sure of itself, so that probabilities differ."
    made = build_model(settings, tokenizer, 0)
    made.get_input_embeddings().weight.data.mul_(30)
    return made.eval()


# ---------------------------------------------------------------- what stands in for vLLM


@dataclasses.dataclass
class SamplingParams:
    "The fields of vLLM's class that we use, with its defaults and its rules for them (read in its source, 0.3x)."
    temperature: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    detokenize: bool = True

    def __post_init__(self):
        assert 0 <= self.temperature <= 2 and self.max_tokens >= 1 and (self.seed is None or 0 <= self.seed < 2**63)
        assert self.logprobs == -1 if self.logprob_token_ids is None else len(self.logprob_token_ids) == self.logprobs <= 128


class Engine:
    """`vllm.LLM` in mode raw_logprobs. `following` gives the logits after a list of token ids; the tokens of sampled requests
    are given, in the order of the requests."""

    def __init__(self, following, sampled=()):
        self.following, self.sampled, self.asked = following, list(sampled), []

    def generate(self, prompts, sampling_params, use_tqdm=True):
        assert len(prompts) == len(sampling_params) and not use_tqdm
        self.asked.append(list(zip([p["prompt_token_ids"] for p in prompts], sampling_params)))
        return [self._answer(*request) for request in self.asked[-1]]

    @torch.no_grad()
    def _answer(self, prompt, params):
        tokens, logprobs, given = [], [], self.sampled.pop(0) if params.temperature else None
        while len(tokens) < params.max_tokens:
            log_pi = self.following(prompt + tokens).double().log_softmax(-1)
            token = given[len(tokens)] if given else int(log_pi.argmax())
            kept = range(len(log_pi)) if params.logprobs == -1 else {token, *params.logprob_token_ids}
            logprobs.append({i: SimpleNamespace(logprob=float(log_pi[i])) for i in kept})
            tokens.append(token)
            if token in params.stop_token_ids:
                break
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, logprobs=logprobs)])


def engine_of(model, sampled=()):
    return Engine(lambda ids: model(torch.tensor([ids])).logits[0, -1], sampled)


def assert_same(ours, theirs, close):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert list(a) == list(b)
        for name, value in a.items():
            if isinstance(value, float):
                assert value == pytest.approx(b[name], rel=0, abs=close, nan_ok=True), (name, a, b)
            else:
                assert value == b[name], (name, a, b)


# ---------------------------------------------------------------- the same rows


@pytest.mark.parametrize("task", ["snli", "commonsense_qa"])
def test_greedy_rows_are_those_of_transformers(model, tokenizer, task):
    "A random model: responses without a label, which are read again."
    asked = load_questions(task, split="test", n=4)
    engine = engine_of(model)
    ours = predict(VLLMModel(engine, SamplingParams), tokenizer, asked, max_new_tokens=10).to_list()
    assert_same(ours, predict(model, tokenizer, asked, max_new_tokens=10).to_list(), 3e-6)
    assert all(row["fallback"] for row in ours)
    first, again = engine.asked
    assert [p for p, _ in first] == [tokenizer.encode(format_prompt(q)) for q in asked] and len(again) == 4
    assert {s.temperature for _, s in first + again} == {0.0} and {s.max_tokens for _, s in again} == {1}


def scripted(tokenizer, asked):
    "A label after a space, one right after the tag, one in brackets, one that is read again, a text without end, nothing at all."
    planned, model = [], Scripted(tokenizer)
    forms = [["<think> x </think>\n<answer>", " B", " </answer>"], ["<think> y </think>\n<answer>", "C", "</answer>"],
             ["<answer>", " (", "D", ") </answer>"], ["<answer> Z </answer>"], ["and so on"] * 30, []]
    rng = np.random.default_rng(0)
    for q, pieces in zip(asked, forms, strict=True):
        label = next((i for i, piece in enumerate(pieces) if piece.strip() in ("B", "C", "D")), None)
        at = {} if label is None else {label: distribution(model, {pieces[label]: 0.6, " A": 0.2, "E": 0.1}, rng)}
        planned.append(model.plan(q, pieces, at, distribution(model, {" A": 0.1, " B": 0.3, " E": 0.25, "B": 0.01}, rng)))
    return model, planned


@pytest.mark.parametrize("sampled, temperature", [(False, 1.0), (True, 1.0), (False, 0.5), (True, 1.7)])
@pytest.mark.parametrize("leads", [("", " "), ("",)], ids=["kept", "read again"])
def test_every_place_of_a_label_gives_the_same_row(tokenizer, leads, sampled, temperature, monkeypatch):
    "With one lead alone, the probabilities of a label after a space are not kept, but read again; at another temperature than 1, all are."
    asked, kept = load_questions("commonsense_qa", split="test", n=6), []
    model, _ = scripted(tokenizer, asked)
    monkeypatch.setattr("catto.predict._LEADS", leads)
    monkeypatch.setattr("catto.predict._write", lambda *given: kept.append(_write(*given)) or kept[-1])
    options = {"temperature": temperature, **({"candidates": 2, "seed": 3} if sampled else {})}
    theirs = predict(model, tokenizer, asked, batch_size=100, max_new_tokens=40, **options).to_list()
    drawn = [[*ids, tokenizer.eos_token_id] for ids in kept[0].tokens] if sampled else []
    engine = Engine(lambda ids: model._next(ids).float(), drawn)  # as the model itself gives them
    ours = predict(VLLMModel(engine, SamplingParams), tokenizer, asked, batch_size=1, max_new_tokens=40, **options).to_list()
    assert_same(ours, theirs, 1e-9)
    if not sampled:
        assert [row["predicted"] for row in ours[:3]] == ["B", "C", "D"] and [row["parsed"] for row in ours] == [True] * 3 + [False] * 3
        assert [row["finished"] for row in ours] == [True] * 4 + [False, True]
        assert len(engine.asked[1]) == (6 if temperature != 1 else 3 if " " in leads else 4)  # those without a label, and the one after a space
    seeds = [s.seed for _, s in engine.asked[0]]
    assert len(set(seeds)) == (12 if sampled else 1) and (seeds[0] is None) is not sampled
    assert {s.temperature for _, s in engine.asked[0]} == {temperature if sampled else 0.0}


def test_a_sample_keeps_its_seed_whatever_else_is_asked(model, tokenizer):
    asked, seeds = load_questions("snli", split="test", n=3), []
    for questions, candidates in ((asked, 2), (asked.select([2]), 3)):
        engine = engine_of(model, [[tokenizer.eos_token_id]] * 6)
        predict(VLLMModel(engine, SamplingParams), tokenizer, questions, candidates=candidates, max_new_tokens=5)
        seeds.append([s.seed for _, s in engine.asked[0]])
    assert seeds[0][4:] == seeds[1][:2]


def test_outputs_become_numbers():
    "By hand: two sequences, one that ended and one that was cut."
    def step(**found):
        return {int(name[1:]): SimpleNamespace(logprob=np.log(p)) for name, p in found.items()}
    outputs = [SimpleNamespace(outputs=[SimpleNamespace(token_ids=(7, 0), logprobs=[step(_7=0.5, _3=0.25, _4=0.125), step(_0=1.0, _3=0.2, _4=0.1)])]),
               SimpleNamespace(outputs=[SimpleNamespace(token_ids=(3,), logprobs=[step(_3=0.75, _5=0.2)])])]
    written = _from_vllm(outputs, [[3, 4], [5, 3]], 0, sampled=False)
    assert (written.tokens, written.ended) == ([[7], [3]], [True, False])
    np.testing.assert_allclose(written.numbers[0], [[np.log(0.5), 0.5, 0.5, 0.25, 0.125], [0, 1, 1, 0.2, 0.1]])
    np.testing.assert_allclose(written.numbers[1], [[np.log(0.75), 0.75, 0.75, 0.2, 0.75], [np.nan] * 5])
    assert np.isnan(_from_vllm(outputs, [[3, 4], [5, 3]], 0, sampled=True).numbers[:, 0, 2]).all()


# ---------------------------------------------------------------- the setting, and what is refused


def fake_vllm(monkeypatch, engine):
    "A package vllm whose engines are `engine(model folder)`; list of the options that they are made with."
    made, fake = [], ModuleType("vllm")
    fake.SamplingParams, fake.LLM = SamplingParams, lambda **options: made.append(options) or engine(options["model"])
    monkeypatch.setitem(sys.modules, "vllm", fake)
    return made


def test_the_setting_chooses_who_writes(settings, model, tokenizer, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    load_questions("snli", split="test", n=2).to_parquet(str(tmp_path / "test.parquet"))
    made = fake_vllm(monkeypatch, lambda path: engine_of(model))
    rows = {(backend, tau): catto.eval._predict_file(dataclasses.replace(settings, backend=backend, max_new_tokens=8), tmp_path / "test.parquet",
                                                     tmp_path / "model", tau, None)
            for backend in ("transformers", "vllm") for tau in (1.0, 2.0, 2.5)}
    for tau in (1.0, 2.0, 2.5):
        assert_same(rows["vllm", tau].to_dict("records"), rows["transformers", tau].to_dict("records"), 0 if tau == 2.5 else 3e-6)
    assert made == 2 * [dict(model=str(tmp_path / "model"), revision=None, dtype="float32", logprobs_mode="raw_logprobs", max_logprobs=-1,
                             generation_config="vllm")]  # the temperature that vLLM does not take is left to transformers


def test_pools_are_written_by_it_too(settings, model, tokenizer, tmp_path, monkeypatch):
    "At the temperature of the method; each candidate's tokens are those that the engine was told to draw."
    settings = dataclasses.replace(settings, tasks=("snli",), preference_learning_rates=(1e-4,), candidates=2, max_new_tokens=8)
    run = run_folder(tmp_path, settings, "snli", 0, "sft")
    data = run_folder(tmp_path, settings, "snli", 0, "data")
    run.mkdir(parents=True), data.mkdir(parents=True)
    model.save_pretrained(run / "model"), tokenizer.save_pretrained(run / "model")
    load_questions("snli", split="test", n=2).to_parquet(str(data / "test.parquet"))
    (run / "train.json").write_text(json.dumps({"outputs": {}, "temperature": 1.5, "validation_ece": 0.1, "diverged": False}))
    eos, drawn = tokenizer.eos_token_id, [tokenizer.encode(f"<answer> {word}") for word in ("neutral", "entailment", "neutral", "so")]
    made = fake_vllm(monkeypatch, lambda path: engine_of(model, [[*ids, eos] for ids in drawn]))
    pools = {backend: (sample_pool(dataclasses.replace(settings, backend=backend), "snli", 0, "sft", tmp_path),
                       pd.read_parquet(run / "pool_test.parquet")) for backend in ("transformers", "vllm")}
    assert len(made) == 1 and pools["vllm"][0]["key"] != pools["transformers"][0]["key"]
    rows = pools["vllm"][1]
    assert rows["text"].tolist() == [f"<answer> {word}" for word in ("neutral", "entailment", "neutral", "so")]
    assert set(rows["temperature"]) == {1.5} and rows["parsed"].tolist() == [True, True, True, False]
    first = tokenizer.encode(format_prompt(load_questions("snli", split="test", n=2)[0])) + drawn[0][:1]
    with torch.no_grad():
        p = (model(torch.tensor([first])).logits[0, -1].double() / 1.5).softmax(-1)
    assert rows["confidence"][0] == pytest.approx(float(p[drawn[0][1]]), rel=1e-5)


def test_adapters_are_merged_before_it_reads_them(settings, model, tokenizer, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "base"), tokenizer.save_pretrained(tmp_path / "base")
    base, _ = catto.eval.load_model(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapters"), tokenizer.save_pretrained(tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_config.json").is_file()
    loaded, load_adapters = [], catto.predict.load_model

    def seen(*args, **kwargs):
        model, tokenizer = load_adapters(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    def engine(path):
        assert loaded and not any(model() for model in loaded)  # vLLM wants the memory of the device for itself
        return engine_of(load_adapters(path)[0].eval())

    monkeypatch.setattr(catto.predict, "load_model", seen)
    fake_vllm(monkeypatch, engine)
    asked = load_questions("snli", split="test", n=2)
    ours, theirs, plain = (predict(*loaded, asked, max_new_tokens=6).to_list()
                           for loaded in (load_vllm(tmp_path / "adapters"), catto.eval.load_model(tmp_path / "adapters"), (model, tokenizer)))
    assert_same(ours, theirs, 1e-5)
    assert all(a["in_option_mass"] != pytest.approx(b["in_option_mass"], rel=1e-3) for a, b in zip(ours, plain))


def test_what_vllm_cannot_give_is_refused(model, tokenizer):
    asked, other = load_questions("snli", split="test", n=2), VLLMModel(engine_of(model), SamplingParams)
    with pytest.raises(ValueError, match="temperature is 2.5: vLLM accepts at most 2; use backend = transformers"):
        predict(other, tokenizer, asked, temperature=2.5)
    with pytest.raises(ValueError, match="load the model with load_model for answer_logits"):
        answer_logits(other, tokenizer, asked, Dataset.from_dict({"id": asked["id"], "text": ["", ""]}))


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"backend = vllm needs the package vllm.*pip install -e \"\.\[vllm\]\""):
        load_vllm(tmp_path)


def test_the_setting_refuses_other_names(repo):
    with pytest.raises(ValueError, match="setting 'backend' = 'tgi': accepted are transformers, vllm"):
        load("smoke", file=repo / "settings.ini", backend="tgi")


# ---------------------------------------------------------------- vLLM itself


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs vLLM, which needs a GPU")
def test_vllm_itself_writes_the_same_greedy_rows(tokenizer, settings, tmp_path):
    pytest.importorskip("vllm", reason="the extra vllm is not installed")
    made = build_model(dataclasses.replace(settings, hidden_size=64, attention_heads=2, key_value_heads=1), tokenizer, 0)  # heads of 32
    made.save_pretrained(tmp_path / "model"), tokenizer.save_pretrained(tmp_path / "model")
    asked = load_questions("commonsense_qa", split="test", n=8)
    ours = predict(*load_vllm(tmp_path / "model"), asked, max_new_tokens=10).to_list()
    theirs = predict(*catto.eval.load_model(tmp_path / "model"), asked, max_new_tokens=10).to_list()
    assert_same(ours, theirs, 1e-3)
