"""Predictions of models whose answers and probabilities are known: planted in a scripted model, or worked out one by one."""
import dataclasses
import itertools
import json
import warnings
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from scipy.stats import chisquare
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, Qwen3Config

from catto.data import TASKS, format_prompt, load_questions
from catto.eval import chosen_run, evaluate_method, first_tokens, fit_temperature, load_model, predict
from catto.methods import Run, grid
from catto.predict import TEMPERATURES, _next_token, _read, _uniform, _write, answer_logits, model_version
from catto.settings import load, run_folder
from catto.train import build_model, build_tokenizer, mini_tokenizer

LETTERS = list("ABCDE")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def settings(repo):
    return load("smoke", file=repo / "settings.ini", hidden_size=16, hidden_layers=2, attention_heads=2, key_value_heads=1, mlp_size=32)


@pytest.fixture(scope="module")
def tokenizer(settings):
    return mini_tokenizer(settings)


@pytest.fixture(scope="module")
def letters_only():
    "A tokenizer without merges: each label word is many tokens, and its first one is a space with its first letter or alone."
    made = build_tokenizer([" e n c"] * 9, 300)
    assert len(made.encode(" entailment")) > 3
    return made


@pytest.fixture(scope="module")
def qwen(real_samples):
    "Qwen3's own vocabulary."
    return AutoTokenizer.from_pretrained(real_samples / "qwen_tokenizer")


def questions(n=6, task="commonsense_qa"):
    return load_questions(task, split="test", n=n)


class Rows:
    "What stands in for a cache: the tokens read so far, without padding, one list for each row."

    def __init__(self, rows):
        self.rows = rows

    def batch_select_indices(self, indices):
        self.rows = [list(self.rows[i]) for i in indices.tolist()]


class Scripted(torch.nn.Module):
    """Writes the response planned for each prompt and then the end token, each with probability close to 1.
    `planted` maps a place in the response to the distribution that comes there; `elsewhere` comes
    after any text that is not on script. `scored` are the texts after which predict() asked for probabilities again."""
    device = torch.device("cpu")

    def __init__(self, tokenizer, size=None, dtype=torch.float32):
        super().__init__()
        self.tokenizer, self.size, self.dtype, self.plans, self.scored = tokenizer, size or len(tokenizer), dtype, {}, []

    def plan(self, question, pieces, planted=None, elsewhere=None):
        "`pieces` are texts; `planted` maps the number of a piece to the distribution of its first token."
        ids = [self.tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
        places = {sum(map(len, ids[:i])): p for i, p in (planted or {}).items()}
        prompt = tuple(self.tokenizer(format_prompt(question))["input_ids"])
        self.plans[prompt] = [*itertools.chain(*ids), self.tokenizer.eos_token_id], places, elsewhere
        return self.plans[prompt][0][:-1]

    def _next(self, row):
        "Logits after one unpadded list of tokens."
        prompt = next(p for p in self.plans if tuple(row[: len(p)]) == p)
        response, places, elsewhere = self.plans[prompt]
        written = row[len(prompt):]
        written = written[: written.index(self.tokenizer.eos_token_id)] if self.tokenizer.eos_token_id in written else written
        if written == response[: len(written)]:
            if len(written) in places:
                return places[len(written)].log() + 3.7  # a softmax does not see the shift
            likely = response[min(len(written), len(response) - 1)]
            return torch.zeros(self.size, dtype=torch.float64).index_fill(0, torch.tensor([likely]), 30.0)
        return elsewhere.log() - 1.3

    def forward(self, input_ids, attention_mask, position_ids, past_key_values, use_cache, logits_to_keep):
        assert logits_to_keep == 1 and use_cache and not self.training and not torch.is_grad_enabled()
        cache = past_key_values or Rows([[] for _ in input_ids])
        for row, ids, mask, positions in zip(cache.rows, input_ids, attention_mask[:, -input_ids.shape[1] :], position_ids, strict=True):
            new = ids[mask.bool()].tolist()
            assert positions[mask.bool()].tolist() == list(range(len(row), len(row) + len(new)))
            row += new
        assert attention_mask.sum(-1).tolist() == [len(row) for row in cache.rows]
        logits = torch.stack([self._next(row) for row in cache.rows])[:, None].to(self.dtype)
        return SimpleNamespace(logits=logits, past_key_values=cache)


def distribution(model, tokens, rng=None):
    "Given probabilities for some tokens (text or id) and the rest spread over all others, evenly or at random; float64, shape (V,)."
    given = {t if isinstance(t, int) else model.tokenizer.encode(t, add_special_tokens=False)[0]: p for t, p in tokens.items()}
    assert len(given) == len(tokens) and sum(given.values()) < 1
    rest = np.ones(model.size) if rng is None else rng.random(model.size)
    rest[list(given)] = 0
    p = rest / rest.sum() * (1 - sum(given.values()))
    p[list(given)] = list(given.values())
    return torch.tensor(p)


def seen(model, rows, **options):
    "Rows of predict(); `model.scored` grows by the texts that were read again."
    def read(model, tokenizer, lists, cache=None, before=None):
        if cache is not None:
            model.scored.extend(map(tokenizer.decode, lists))
        return _read(model, tokenizer, lists, cache, before)

    with mock.patch("catto.predict._read", read):
        return predict(model, model.tokenizer, Dataset.from_list(list(rows)), **{"batch_size": 4, "max_new_tokens": 60, **options}).to_list()


# --- parsed answers ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_confidence_and_mass_are_the_planted_ones(tokenizer, seed, batch_size):
    rng, model, expected, asked = np.random.default_rng(seed), Scripted(tokenizer), [], questions(9)
    for i, q in enumerate(asked):
        p = rng.dirichlet(np.ones(5)) * (0.2, 0.9, 0.99, 0.999999)[i % 4]  # what is left goes to other tokens
        label = LETTERS[p.argmax()]
        planted = distribution(model, {f" {o}": x for o, x in zip(LETTERS, p)}, rng)
        ids = model.plan(q, [f"<think> {'so ' * (2 * i)}</think>\n<answer>", f" {label}", " </answer>"], {1: planted})
        expected.append((label, p.max(), p.sum(), q["posterior"][LETTERS.index(label)], ids))
    rows = seen(model, asked, batch_size=batch_size)
    assert len(rows) == 9
    assert model.scored == []  # one pass
    for q, row, (label, confidence, mass, truth, ids) in zip(asked, rows, expected):
        assert (row["id"], row["task"], row["label"], row["predicted"]) == (q["id"], "commonsense_qa", q["label"], label)
        assert row["confidence"] == pytest.approx(confidence, abs=1e-6)
        assert row["in_option_mass"] == pytest.approx(mass, abs=1e-6)
        assert row["p_correct"] == truth and row["correct"] == (label == q["label"])
        assert row["parsed"] and not row["fallback"] and row["finished"]
        assert (row["tokens"], row["text"]) == (len(ids), tokenizer.decode(ids))


def shares(lead, **changes):
    "Probabilities of the tokens of A to E after `lead`."
    return {f"{lead}{o}": p for o, p in (dict(A=0.05, B=0.5, C=0.15, D=0.02, E=0.08) | changes).items()}


# what a response may look like: (pieces, number of the piece that is the label, probabilities there, mass in the options)
FORMS = {
    "as in the template": (["<think> so </think>\n<answer>", " B", " </answer>"], 1, shares(" "), 0.8),
    "no space": (["<answer>", "B", "</answer>"], 1, shares(""), 0.8),
    "in brackets": (["<think> so </think><answer> (", "B", ")</answer>"], 1, shares(""), 0.8),
    "small letter": (["<answer>", " b", " </answer>"], 1, {" b": 0.5, **shares(" ", B=0.1)}, 0.4),
    "text of the option": (["<answer>", " {text}", " </answer>"], 1, {" {text}": 0.5, **shares(" ", B=0.1)}, 0.4),
    "letter and text": (["<answer>", " B", ": {text} </answer>"], 1, shares(" "), 0.8),
    "never closed": (["<think> so </think>\n<answer>", " B"], 1, shares(" "), 0.8),
    "changed its mind": (["<answer> C </answer> no, <answer>", " B", " </answer>"], 1, shares(" "), 0.8),
    "thought of another": (["<think> <answer> C </answer> </think>\n<answer>", " B", " </answer>"], 1, shares(" "), 0.8),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_label_is_scored_where_it_stands(tokenizer, form):
    pieces, number, probabilities, mass = FORMS[form]
    model, q = Scripted(tokenizer), questions(1)[0]
    text = q["choices"][1]
    probabilities = {token.format(text=text): p for token, p in probabilities.items()}
    model.plan(q, [piece.format(text=text) for piece in pieces], {number: distribution(model, probabilities)})
    row, = seen(model, [q])
    assert row["predicted"] == "B" and row["parsed"] and not row["fallback"]
    assert model.scored == []
    assert row["confidence"] == pytest.approx(0.5, abs=1e-6)
    assert row["in_option_mass"] == pytest.approx(mass, abs=1e-6)


@pytest.mark.parametrize("task", ["snli", "anli"])
def test_words_are_scored_by_their_first_token(letters_only, task):
    model, rows, expected = Scripted(letters_only), questions(4, task), []
    for i, q in enumerate(rows):
        order = [*q["options"][i % 3:], *q["options"][: i % 3]]
        first = {letters_only.encode(f" {word}")[0]: p for word, p in zip(order, (0.6, 0.25, 0.1))}
        model.plan(q, ["<think> so </think>\n<answer>", f" {order[0]}", " </answer>"], {1: distribution(model, first)})
        expected.append(order[0])
    found = seen(model, rows)
    assert [row["predicted"] for row in found] == expected and model.scored == []
    assert [row["confidence"] for row in found] == pytest.approx([0.6] * 4, abs=1e-6)  # not the product over the word's tokens
    assert [row["in_option_mass"] for row in found] == pytest.approx([0.95] * 4, abs=1e-6)
    assert [row["p_correct"] for row in found] == [q["posterior"][q["options"].index(o)] for q, o in zip(rows, expected)]


def test_rows_without_a_posterior_say_so(tokenizer):
    model, (q, other) = Scripted(tokenizer), questions(2)
    for row in (q, other):
        model.plan(row, ["<answer>", " B", " </answer>"], {1: distribution(model, shares(" "))})
    bare = [{k: v for k, v in row.items() if k != "posterior"} for row in (q, other)]
    assert all(np.isnan(row["p_correct"]) for row in seen(model, bare))
    assert all(np.isnan(row["p_correct"]) for row in seen(model, [{**row, "posterior": None} for row in bare]))


# --- no valid answer ---------------------------------------------------------------------------------------------------------

ANSWER = "<think> so </think>\n<answer>"
# what is written instead: (pieces, number of pieces after which max_new_tokens cuts, text after which the labels are scored)
FALLBACKS = {
    "nothing": ([""], None, " </think>\n<answer>"),
    "no answer": (["<think> so </think> I do not know"], None, "<think> so </think> I do not know\n<answer>"),
    "thought alone": (["<think> so </think>\n"], None, ANSWER),
    "answer inside the thought": (["<think> <answer> B </answer> </think>"], None, "<think> <answer> B </answer> </think>\n<answer>"),
    "a label that is none": ([ANSWER, " F </answer>"], None, ANSWER),
    "empty answer": ([ANSWER, " </answer>"], None, ANSWER),
    "valid, then not": ([f"{ANSWER} B </answer> or <answer>", " F </answer>"], None, f"{ANSWER} B </answer> or <answer>"),
    "thought never closed": (["<think> so <answer>", " F </answer>"], None, "<think> so <answer>"),
    "cut in the thought": (["<think> so so", " so so </think>\n<answer> B </answer>"], 1, "<think> so so </think>\n<answer>"),
    "cut in the tag": (["<think> so </think>", "\n<answer>", " the </answer>"], 1, ANSWER),
    "cut before the label": ([ANSWER, " the", " B </answer>"], 1, ANSWER),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_without_a_valid_label_the_label_set_is_scored(tokenizer, case):
    pieces, cut, context = FALLBACKS[case]
    model, q = Scripted(tokenizer), questions(1)[0]
    # The likeliest token is no label: the best label is taken, with its own probability.
    on_script = [i for i in range(1, len(pieces)) if "".join(pieces[:i]) == context]
    first = tokenizer.encode(pieces[on_script[0]] if on_script else " the")[0]
    probabilities = {**shares(" ", B=0.1, D=0.16), first: 0.4}
    planted = distribution(model, probabilities)
    ids = model.plan(q, pieces, dict.fromkeys(on_script, planted), elsewhere=planted)
    limit = len(tokenizer.encode(pieces[0])) if cut else 60
    row, = seen(model, [q], max_new_tokens=limit)
    assert (row["predicted"], row["fallback"], row["parsed"]) == ("D", True, False)
    assert row["confidence"] == pytest.approx(0.16, abs=1e-6)
    assert row["in_option_mass"] == pytest.approx(0.05 + 0.1 + 0.15 + 0.16 + 0.08, abs=1e-6)
    assert (row["correct"], row["p_correct"]) == (q["label"] == "D", q["posterior"][3])
    assert row["finished"] == (not cut) and row["tokens"] == (limit if cut else len(ids))
    assert row["text"] == tokenizer.decode(ids[: row["tokens"]])
    assert model.scored == [context]


def test_a_word_cut_in_its_middle_is_no_label(letters_only):
    model, q = Scripted(letters_only), questions(1, "snli")[0]
    word, other = q["options"][:2]
    planted = distribution(model, {letters_only.encode(f" {word}")[0]: 0.6, letters_only.encode(f" {other}")[0]: 0.3})
    model.plan(q, [ANSWER, f" {word}", " </answer>"], {1: planted})
    limit = len(letters_only.encode(ANSWER)) + 3
    row, = seen(model, [q], max_new_tokens=limit)
    assert (row["predicted"], row["fallback"], row["finished"], row["tokens"]) == (word, True, False, limit)
    assert row["confidence"] == pytest.approx(0.6, abs=1e-6)


def test_answers_and_fallbacks_share_a_batch(tokenizer):
    model, rows = Scripted(tokenizer), questions(8)
    for i, q in enumerate(rows):
        if i % 2:
            model.plan(q, [f"<think> {'so ' * i}</think>\n<answer>", " B", " </answer>"], {1: distribution(model, shares(" "))})
        else:
            model.plan(q, ["so " * i], elsewhere=distribution(model, shares(" ", B=0.1, D=0.16)))
    for batch_size in (1, 3, 8):
        found = seen(model, rows, batch_size=batch_size)
        expected = [(q["id"], "DB"[i % 2], i % 2 == 0) for i, q in enumerate(rows)]
        assert [(row["id"], row["predicted"], row["fallback"]) for row in found] == expected
        assert [row["confidence"] for row in found] == pytest.approx([0.16, 0.5] * 4, abs=1e-6)


# --- numbers -----------------------------------------------------------------------------------------------------------------

def test_a_bfloat16_models_confidence_is_not_rounded(tokenizer):
    "Its logits are bfloat16; the softmax over them is not, and near 1 it keeps what bfloat16 would round away."
    model, rows = Scripted(tokenizer, dtype=torch.bfloat16), questions(5)
    for i, q in enumerate(rows):
        nearly_certain = {f" {o}": 0.998 if o == "B" else 1e-4 for o in LETTERS}
        planted = distribution(model, shares(" ", B=0.55) if i else nearly_certain, np.random.default_rng(i))
        model.plan(q, [ANSWER, " B", " </answer>"], {1: planted})
    exact = []
    for response, places, _ in model.plans.values():
        logits = (next(iter(places.values())).log() + 3.7).to(torch.bfloat16).double()
        exact.append(logits.softmax(-1).max().item())
    found = [row["confidence"] for row in seen(model, rows)]
    assert found == pytest.approx(exact, abs=1e-6)
    rounded = torch.tensor(exact).bfloat16().double().tolist()
    assert all(abs(c - r) > 1e-4 for c, r in zip(found, rounded)) and 0.99 < found[0] < 1


def test_certainty_stays_in_the_unit_interval(tokenizer):
    model, q = Scripted(tokenizer), questions(1)[0]
    certain = torch.full((len(tokenizer),), 1e-30, dtype=torch.float64)
    certain[tokenizer.encode(" B")[0]] = 1.0
    model.plan(q, [ANSWER, " B", " </answer>"], {1: certain})
    row, = seen(model, [q])
    assert row["confidence"] == 1.0 and row["in_option_mass"] == pytest.approx(1, abs=1e-6)


# --- a real model ------------------------------------------------------------------------------------------------------------

def random_model(config):
    "A random model that depends on its whole context: with usual initial weights it would repeat its last token."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if value.ndim > 1:
                    value.mul_(20 if "lm_head" in name else 12)
    return model.eval()


def config_of(kind, size):
    "Qwen3, whose positions are relative, and GPT-2, whose positions are absolute."
    if kind == "qwen3":
        return Qwen3Config(vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                           num_key_value_heads=1, head_dim=8, tie_word_embeddings=False)
    return GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=512, tie_word_embeddings=False,
                      bos_token_id=None, eos_token_id=None)


def one_by_one(model, tokenizer, question, max_new_tokens):
    "Greedy decoding without batch, padding or cache: (tokens, whether they ended by themselves)."
    ids, written = tokenizer.encode(format_prompt(question)), []
    while len(written) < max_new_tokens:
        token = model(torch.tensor([ids + written])).logits[0, -1].argmax().item()
        if token == tokenizer.eos_token_id:
            return written, True
        written.append(token)
    return written, False


@torch.no_grad()
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_batch_and_padding_change_nothing(tokenizer, kind):
    model = random_model(config_of(kind, len(tokenizer)))
    model.lm_head.weight[[i for i in range(len(tokenizer)) if "<" in tokenizer.decode(i)]] = 0  # never the likeliest: no answer by chance
    rows = [q for pair in zip(questions(3), questions(3, "tldr"), questions(3, "snli")) for q in pair]
    rows = [{k: q[k] for k in ("id", "task", "prompt", "options", "choices", "label", "posterior")} for q in rows]
    assert len({len(tokenizer.encode(format_prompt(q))) for q in rows}) > 3
    alone = [one_by_one(model, tokenizer, q, 12) for q in rows]
    expected = []
    for q, (written, _) in zip(rows, alone):  # random words hold no answer, so the label set is scored
        context = format_prompt(q) + tokenizer.decode(written).rstrip() + " </think>\n<answer>"
        assert "<answer>" not in tokenizer.decode(written) and "</think>" not in tokenizer.decode(written)
        p = model(torch.tensor([tokenizer.encode(context)])).logits[0, -1].double().softmax(-1)
        expected.append([p[tokenizer.encode(f" {o}")[0]].item() for o in q["options"]])
    assert len({token for written, _ in alone for token in written}) > 9
    for batch_size in (1, 4, 9):
        found = predict(model, tokenizer, Dataset.from_list(rows), batch_size, 12).to_list()
        assert [(row["text"], row["finished"]) for row in found] == [(tokenizer.decode(written), ended) for written, ended in alone]
        assert [row["predicted"] for row in found] == [q["options"][int(np.argmax(p))] for q, p in zip(rows, expected)]
        for name, values in (("confidence", map(max, expected)), ("in_option_mass", map(sum, expected))):
            np.testing.assert_allclose([row[name] for row in found], list(values), rtol=1e-4, atol=0)  # they are about 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_and_weights_are_left_as_they_were(settings, tokenizer, training):
    model = build_model(settings, tokenizer, 0).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predict(model, tokenizer, questions(2), 2, 3)
    assert model.training == training and all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(KeyError):
        predict(model, tokenizer, Dataset.from_list([{"id": "q"}]), 2, 3)
    assert model.training == training  # after an error, too


@torch.no_grad()
@pytest.mark.parametrize("pieces, lead", [
    (["<think>\nso\n</think>\n<answer", ">A", "</answer>"], ">"),
    (["<think>\nso\n</think>\n<answer>", " A", " </answer>"], " "),
    (["<think>\nso\n</think>\n<answer>\n", "A", "\n</answer>"], ""),
    (["<think>\nso\n</think>\n<answer>(", "A", ")</answer>"], ""),
])
def test_with_qwens_vocabulary_the_token_that_holds_the_label_is_scored(qwen, pieces, lead, monkeypatch):
    response = qwen.encode("".join(pieces))
    before = qwen.encode(pieces[0])
    assert response[: len(before)] == before and qwen.decode(response[len(before)]) == pieces[1]  # the token ">A" is one
    model, q = random_model(config_of("qwen3", 151_936)), questions(1)[0]  # the model has more rows than the tokenizer has entries
    prompt = qwen.encode(format_prompt(q))
    script = iter([*response, qwen.eos_token_id])
    monkeypatch.setattr("catto.predict._next_token", lambda *given: (torch.tensor([[next(script)]]), _next_token(*given)[1]))
    row, = predict(model, qwen, Dataset.from_list([q]), 1, 60).to_list()
    p = model(torch.tensor([prompt + before])).logits[0, -1].double().softmax(-1)
    assert (row["predicted"], row["parsed"], row["text"]) == ("A", True, "".join(pieces))
    assert p.max() > 100 / 151_936  # far from an even spread
    np.testing.assert_allclose(row["confidence"], p.max().item(), rtol=1e-4)
    letters = [qwen.convert_tokens_to_ids(qwen.tokenize(lead + o)[0]) for o in LETTERS]
    assert [qwen.decode(i) for i in letters] == [lead + o for o in LETTERS]
    np.testing.assert_allclose(row["in_option_mass"], p[letters].sum().item(), rtol=1e-4)


@pytest.mark.parametrize("text, label, lead", [("<answer>A</answer>", ">A", ">"), ("<answer> A </answer>", " A", " "), ("<answer>\nA", "A", "")])
def test_planted_probabilities_in_qwens_vocabulary(qwen, text, label, lead):
    model, q = Scripted(qwen, size=151_936), questions(1)[0]
    before, _, after = text.partition("A")
    pieces = [before.removesuffix(lead), label, after]
    model.plan(q, ["<think>\nso\n</think>\n", *pieces], {2: distribution(model, shares(lead, A=0.5, B=0.1))})
    row, = seen(model, [q])
    assert (row["predicted"], row["parsed"]) == ("A", True)
    assert row["confidence"] == pytest.approx(0.5, abs=1e-6)
    assert row["in_option_mass"] == pytest.approx(0.85, abs=1e-6)


# --- one pass --------------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("temperature, sampled", [(1.0, False), (1.0, True), (0.5, True), (2.0, False)])
def test_what_is_kept_while_writing_is_what_a_whole_pass_gives(settings, tokenizer, temperature, sampled, monkeypatch):
    "float32, against one forward pass over each prompt and response, alone and without cache; largest difference about 1e-6."
    model, kept = build_model(settings, tokenizer, 0), []
    for name, value in model.named_parameters():
        if value.ndim > 1:
            value.mul_(4)  # as initialised, it hardly depends on what it reads
    monkeypatch.setattr("catto.predict._write", lambda *given: kept.append((given, _write(*given))) or kept[-1][1])
    asked = questions(7)
    rows = predict(model, tokenizer, asked, 7, 12, temperature=temperature, **({"candidates": 2, "seed": 5} if sampled else {})).to_list()
    writings = [(given[5][b], ids, written.numbers[b]) for given, written in kept for b, ids in enumerate(written.tokens)]
    assert len(writings) == len(rows) == (14 if sampled else 7)
    for row, (watched, ids, numbers), q in zip(rows, writings, [q for q in asked for _ in range(2 if sampled else 1)]):
        prompt = tokenizer.encode(format_prompt(q))
        z = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
        own, p = torch.tensor(ids)[:, None], (z / temperature).softmax(-1)
        whole = torch.cat([z.log_softmax(-1).gather(-1, own), p.gather(-1, own), p.amax(-1, keepdim=True), p[:, watched]], -1)
        np.testing.assert_allclose(numbers[: len(ids)], whole, rtol=0, atol=3e-6)
        log_probs = whole[:, 0]
        found = [row[name] for name in ("mean_log_prob", "mean_prob", "min_prob", "last_prob")]
        expected = [log_probs.mean(), log_probs.exp().mean(), log_probs.min().exp(), log_probs[-1].exp()]
        np.testing.assert_allclose(found, expected, atol=3e-6)
        assert row["tokens"] == len(ids) and row["temperature"] == temperature


@torch.no_grad()
def test_a_greedy_response_is_that_of_generate(tokenizer):
    "Rows are dropped from the batch as they end: the others must not notice."
    model, rows, end = random_model(config_of("qwen3", len(tokenizer))), questions(12), tokenizer.eos_token_id

    def generated(q):
        ids = torch.tensor([tokenizer.encode(format_prompt(q))])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False,
                             pad_token_id=tokenizer.pad_token_id, eos_token_id=end)[0, ids.shape[1] :].tolist()
        return out[: out.index(end)] if end in out else out

    texts = [generated(q) for q in rows]
    firsts = {token: {text.index(token) for text in texts if token in text} for text in texts for token in text}
    often = max(firsts, key=lambda token: len(firsts[token]))  # comes at the most different places: let the end token come there
    model.lm_head.weight[end] = 1.01 * model.lm_head.weight[often]
    expected = [generated(q) for q in rows]
    lengths = [len(ids) for ids in expected]
    assert len(set(lengths)) > 3 and max(lengths) == 30 and sorted(lengths)[6] < 30, lengths
    found = predict(model, tokenizer, rows, 12, 30)
    assert found["text"] == [tokenizer.decode(ids) for ids in expected] and found["tokens"] == lengths
    assert found["finished"] == [n < 30 for n in lengths]


def test_a_prompt_is_read_once_for_all_its_candidates(tokenizer):
    model, asked, read = Scripted(tokenizer), questions(3), []
    for q in asked:
        model.plan(q, ["<answer>", " B", " </answer>"], {1: distribution(model, shares(" "))}, elsewhere=distribution(model, {" A": 0.5}))
    spied = mock.patch.object(Scripted, "forward", autospec=True, side_effect=lambda model, **given: read.append(given["input_ids"].shape) or real(model, **given))
    real = Scripted.forward
    with spied:
        predict(model, tokenizer, asked, 24, 6, candidates=8)
    assert read[0][0] == 3 and read[0][1] > 20 and read[1] == (24, 1)


def test_an_empty_response_has_no_token_probabilities(tokenizer):
    model, q = Scripted(tokenizer), questions(1)[0]
    model.plan(q, [], elsewhere=distribution(model, shares(" ", B=0.1, D=0.16)))
    row, = seen(model, [q])
    assert (row["tokens"], row["text"], row["predicted"]) == (0, "", "D")
    assert all(np.isnan(row[name]) for name in ("mean_log_prob", "mean_prob", "min_prob", "last_prob"))


# --- temperature and samples ---------------------------------------------------------------------------------------------------

def scaled(p, temperature):
    "Eq. 11 for probabilities."
    q = p ** (1 / temperature)
    return q / q.sum()


@pytest.mark.parametrize("lead", ["", " "])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_confidences_are_those_at_the_temperature(tokenizer, temperature, lead):
    model, q = Scripted(tokenizer), questions(1)[0]
    p = distribution(model, shares(lead))
    model.plan(q, ["<answer>", f"{lead}B", " </answer>"], {1: p})
    row, = seen(model, [q], temperature=temperature)
    at, labels = scaled(p, temperature), [tokenizer.encode(lead + o)[0] for o in LETTERS]
    assert (row["predicted"], row["temperature"], model.scored) == ("B", temperature, [])
    assert row["confidence"] == pytest.approx(at[labels[1]].item(), abs=1e-6)
    assert row["in_option_mass"] == pytest.approx(at[labels].sum().item(), abs=1e-6)
    assert row["min_prob"] == pytest.approx(0.5, abs=1e-6)  # of the response itself: at temperature 1


@pytest.mark.parametrize("candidates", [None, 12])
def test_what_is_read_again_is_at_the_temperature_too(tokenizer, qwen, candidates):
    model, q = Scripted(tokenizer), questions(1)[0]  # no label
    p = distribution(model, shares(" ", B=0.1, D=0.16))
    model.plan(q, ["so so"], elsewhere=p)
    row, = seen(model, [q], temperature=0.5)
    at, labels = scaled(p, 0.5), [tokenizer.encode(f" {o}")[0] for o in LETTERS]
    assert row["confidence"] == pytest.approx(at[labels[3]].item(), abs=1e-6)
    assert row["in_option_mass"] == pytest.approx(at[labels].sum().item(), abs=1e-6)
    model = Scripted(qwen)  # `>A` is one token, and no usual lead
    p = distribution(model, shares(">", A=0.5, B=0.1))
    model.plan(q, ["<answer", ">A", "</answer>"], {1: p}, elsewhere=distribution(model, {qwen.eos_token_id: 0.99}))
    at, rows = scaled(p, 0.9), [row for row in seen(model, [q], temperature=0.9, candidates=candidates) if row["text"][7:9] in {f">{o}" for o in LETTERS}]
    assert (len({row["predicted"] for row in rows}) > 1) == (candidates is not None) and "<answer" in model.scored
    for row in rows:
        assert row["confidence"] == pytest.approx(at[qwen.encode(">" + row["predicted"])[0]].item(), abs=1e-6)
        assert row["in_option_mass"] == pytest.approx(sum(at[qwen.encode(f">{o}")[0]].item() for o in LETTERS), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_come_from_the_softmax_at_the_temperature(tokenizer, temperature):
    "Chi-square over the label tokens and one cell for the rest; the confidence of a sample is that of the token drawn."
    model, asked, k = Scripted(tokenizer), questions(4), 500
    p = distribution(model, shares(" "), np.random.default_rng(0))
    for q in asked:
        model.plan(q, ["<answer>", " B", " </answer>"], {1: p}, elsewhere=distribution(model, {tokenizer.eos_token_id: 0.9, " A": 0.01}))
    length = len(tokenizer.encode("<answer>")) + 1  # cut after the label
    rows = seen(model, asked, batch_size=300, max_new_tokens=length, candidates=k, temperature=temperature, seed=7)
    assert [row["candidate"] for row in rows] == [*range(k)] * 4 and [row["id"] for row in rows] == [q["id"] for q in asked for _ in range(k)]
    at = scaled(p, temperature)
    share = {f"<answer> {o}": at[tokenizer.encode(f" {o}")[0]].item() for o in LETTERS}
    counts = [sum(row["text"] == text for row in rows) for text in share]
    expected = [len(rows) * x for x in share.values()]
    counts, expected = [*counts, len(rows) - sum(counts)], [*expected, len(rows) - sum(expected)]
    enough = [i for i, e in enumerate(expected) if e > 5]
    if len(enough) < len(expected):  # cells with too few go to the largest
        counts[1], expected[1] = (x[1] + sum(x[i] for i in range(len(x)) if i not in enough) for x in (counts, expected))
    assert len(enough) >= 4 and chisquare([counts[i] for i in enough], [expected[i] for i in enough]).pvalue > 1e-3
    written = [row for row in rows if row["text"] in share]
    assert len(written) > 200 and all(row["parsed"] and row["predicted"] == row["text"][-1] for row in written)
    assert [row["confidence"] for row in written] == pytest.approx([share[row["text"]] for row in written], abs=1e-6)
    assert [row["last_prob"] for row in written] == pytest.approx([p[tokenizer.encode(row["text"][-2:])[0]].item() for row in written], abs=1e-6)


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-1e4, 0.0, 0.0, -1e4]]).repeat(4, 1)
    uniform = torch.tensor([[0.0], [0.25], [0.5], [1 - 2**-53]], dtype=torch.float64)
    token, _ = _next_token(logits, torch.zeros(4, 1, dtype=int), 1.0, uniform)
    assert token[:, 0].tolist() == [1, 1, 2, 2]


def test_samples_depend_on_seed_question_and_number_alone(settings, tokenizer):
    model, asked = random_model(config_of("qwen3", len(tokenizer))), questions(5)
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.01)  # no part of it
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    texts = predict(model, tokenizer, asked, 4, 8, candidates=3, seed=1)["text"]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    np.random.seed(1)
    for batch_size in (1, 2, 15):
        assert predict(model, tokenizer, asked, batch_size, 8, candidates=3, seed=1)["text"] == texts
    assert predict(model, tokenizer, asked.select([3, 1]), 4, 8, candidates=2, seed=1)["text"] == texts[9:11] + texts[3:5]
    assert predict(model, tokenizer, asked, 4, 8, candidates=3, seed=2)["text"] != texts
    assert len(set(texts)) == 15
    batch = [(q, candidate) for q in asked for candidate in range(3)]
    assert len(np.unique(np.stack([_uniform(seed, batch, 8) for seed in (0, 1)]))) == 2 * 15 * 8  # none twice


def test_a_temperature_changes_no_greedy_answer(settings, tokenizer):
    model, asked = random_model(config_of("qwen3", len(tokenizer))), questions(6)
    one, other = (predict(model, tokenizer, asked, 4, 8, temperature=t).to_pandas() for t in (1.0, 4.0))
    same = ["id", "predicted", "text", "correct", "mean_log_prob", "mean_prob", "min_prob", "last_prob", "tokens"]
    pd.testing.assert_frame_equal(one[same], other[same])
    assert (one["confidence"] != other["confidence"]).all()


@pytest.mark.parametrize("given, message", [
    (dict(temperature=0), "temperature is 0, accepted are finite numbers above 0"),
    (dict(temperature=-1.0), "temperature is -1.0"),
    (dict(temperature=float("inf")), "temperature is inf"),
    (dict(temperature=float("nan")), "temperature is nan"),
    (dict(temperature="1"), "temperature is '1'"),
    (dict(candidates=0), "candidates is 0, accepted are whole numbers from 1, or None for greedy responses"),
    (dict(candidates=2.0), "candidates is 2.0"),
    (dict(candidates=True), "candidates is True"),
    (dict(seed=-1), "seed is -1, accepted are whole numbers from 0"),
    (dict(batch_size=0), "batch_size is 0, accepted are whole numbers from 1"),
    (dict(max_new_tokens=0), "max_new_tokens is 0"),
])
def test_arguments_without_a_meaning_are_refused(tokenizer, given, message):
    with pytest.raises(ValueError, match=message):
        predict(Scripted(tokenizer), tokenizer, questions(1), **given)


@torch.no_grad()
def test_the_answer_logits_are_those_at_the_label(tokenizer):
    model, asked = Scripted(tokenizer), questions(4)
    p = distribution(model, shares(" "))
    other = distribution(model, shares("", B=0.3))
    forced = distribution(model, shares(" ", B=0.1, D=0.16))
    model.plan(asked[0], ["<think> so </think>\n<answer>", " B", " </answer>"], {1: p})
    model.plan(asked[1], ["<answer>", "B", "</answer>"], {1: other})
    model.plan(asked[2], ["so so"], elsewhere=forced)
    model.plan(asked[3], ["<answer> (", "B", ")</answer>"], {1: other})
    rows = predict(model, tokenizer, asked, 4, 30)
    for batch_size in (1, 3):
        model.train(batch_size == 1)
        logits, labels = answer_logits(model, tokenizer, asked, rows, batch_size)
        assert model.training == (batch_size == 1)
        assert (logits.dtype, logits.shape, labels.dtype) == (torch.float32, (4, len(tokenizer)), torch.int64)
        np.testing.assert_allclose(logits.double().softmax(-1), torch.stack([p, other, forced, other]), atol=1e-6)
        leads = " ", "", " ", ""
        assert labels.tolist() == [tokenizer.encode(lead + q["label"])[0] for lead, q in zip(leads, asked)]
    with pytest.raises(ValueError, match="predictions are not rows of these questions"):
        answer_logits(model, tokenizer, asked, rows.select([0, 1, 2]))


# --- the temperature of Eq. 11 -------------------------------------------------------------------------------------------------

def planted(tau, rng, n=400, v=12):
    "Logits, labels drawn from them at tau, and the standard error of log tau."
    z = rng.normal(0, 3 * tau, (n, v))
    p = torch.tensor(z / tau).softmax(-1).numpy()
    y = np.array([rng.choice(v, p=row) for row in p])
    variance = (p * (z / tau) ** 2).sum(-1) - (p * z / tau).sum(-1) ** 2
    return torch.tensor(z), torch.tensor(y), 1 / np.sqrt(n * variance.mean())


@pytest.mark.parametrize("tau", [0.2, 1.0, 5.0])
def test_a_planted_temperature_is_recovered(tau):
    "Each of 40 within 4 standard errors, their mean within 3, and their spread what the standard error says."
    off = []
    for seed in range(40):
        z, y, error = planted(tau, np.random.default_rng([seed, int(10 * tau)]))
        off.append(np.log(fit_temperature(z, y) / tau) / error)
    assert np.abs(off).max() < 4 and abs(np.mean(off)) < 3 / np.sqrt(40) and 0.7 < np.std(off) < 1.3


@pytest.mark.parametrize("tau", [0.2, 1.0, 5.0])
def test_the_fitted_temperature_is_the_minimum_and_changes_no_argmax(tau):
    z, y, _ = planted(tau, np.random.default_rng(0))
    fitted = fit_temperature(z, y)
    nll = [torch.nn.functional.cross_entropy(z / (fitted * factor), y).item() for factor in (1 - 1e-3, 1, 1 + 1e-3)]
    assert nll[1] < min(nll[0], nll[2])
    slope = (nll[2] - nll[0]) / (nll[0] + nll[2] - 2 * nll[1])  # 0 at the minimum of the parabola through the three
    assert abs(slope) < 0.01
    assert torch.equal((z / fitted).argmax(-1), z.argmax(-1))
    assert fit_temperature(z + 1e4, y) == pytest.approx(fitted, rel=1e-6)  # a softmax does not see a shift
    assert fit_temperature(z.float().numpy(), y.tolist()) == pytest.approx(fitted, rel=1e-4)


class Logits(ClassifierMixin, BaseEstimator):
    "A fitted classifier whose decision function is its input."

    def fit(self, X, y):
        self.classes_ = np.unique(y)
        return self

    def decision_function(self, X):
        return X

    def predict(self, X):
        return self.classes_[X.argmax(-1)]


@pytest.mark.parametrize("tau", [0.2, 1.0, 5.0])
def test_scikit_learn_finds_the_same_temperature(tau):
    z, y, _ = planted(tau, np.random.default_rng(3))
    assert len(set(y.tolist())) == z.shape[1]  # scikit-learn counts the classes it sees
    oracle = CalibratedClassifierCV(FrozenEstimator(Logits().fit(z.numpy(), y.numpy())), method="temperature").fit(z.numpy(), y.numpy())
    beta, = (calibrator.beta_ for fitted in oracle.calibrated_classifiers_ for calibrator in fitted.calibrators)
    assert fit_temperature(z, y) == pytest.approx(1 / beta, rel=1e-4)


def test_separable_data_warn_and_give_the_bound():
    z, y, _ = planted(1.0, np.random.default_rng(1))
    with pytest.warns(UserWarning, match="the data are separable"):
        assert fit_temperature(z, z.argmax(-1)) == TEMPERATURES[0]
    with pytest.warns(UserWarning, match="the logits say nothing about the labels"):
        assert fit_temperature(z, z.argmin(-1)) == TEMPERATURES[1]
    with pytest.warns(UserWarning, match="every row's logits are equal"):
        assert fit_temperature(torch.zeros(5, 3), torch.arange(5) % 3) == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_temperature(z, y)


@pytest.mark.parametrize("logits, labels, message", [
    (torch.zeros(4), [0, 1, 2, 3], r"shape \(4,\), accepted are floats of shape \(N, V\)"),
    (torch.zeros(0, 3), [], r"shape \(0, 3\)"),
    (torch.zeros(2, 3, dtype=int), [0, 1], "logits are torch.int64"),
    (torch.zeros(4, 3), [0, 1], r"shape \(2,\), accepted are integers of shape \(4,\)"),
    (torch.zeros(2, 3), [0.0, 1.0], "labels are torch.float32"),
    (torch.zeros(2, 3), [True, False], "labels are torch.bool"),
    (torch.tensor([[0.0, float("nan")]]), [0], "NaN or infinite"),
    (torch.tensor([[0.0, float("-inf")]]), [0], "NaN or infinite"),
    (torch.zeros(2, 3), [0, 3], "labels go from 0 to 3, accepted are 0 to 2"),
    (torch.zeros(2, 3), [-1, 0], "labels go from -1 to 0"),
])
def test_fit_temperature_refuses(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, torch.tensor(labels))


# --- what is refused ---------------------------------------------------------------------------------------------------------

def test_labels_that_begin_alike_are_refused(letters_only, qwen):
    with pytest.raises(ValueError, match="labels 'never' and 'neutral' start with the same token"):
        first_tokens(letters_only, ["entailment", "never", "neutral"], " ")
    with pytest.raises(ValueError, match="labels 'entailment' and 'entailments'"):
        first_tokens(qwen, ["entailment", "neutral", "entailments"], " ")
    for task in TASKS.values():
        ids = first_tokens(qwen, task.labels, " ")
        assert len(set(ids)) == len(task.labels)
        assert all(f" {label}".startswith(qwen.decode(i)) and qwen.decode(i).strip() for i, label in zip(ids, task.labels))


@pytest.mark.parametrize("lead", ["\t", "(", "*", "\"", "\n"])
def test_an_odd_character_before_the_label_does_not_end_the_run(qwen, lead):
    "Qwen joins a tab to `ent` and not to `ne` or `contr`: the labels then have no tokens of their own, but the answer is clear."
    model, q = Scripted(qwen), questions(1, "snli")[0]
    ids = qwen.encode(f"{lead}entailment")
    model.plan(q, ["<answer>", f"{lead}entailment", "</answer>"], {1: distribution(model, {ids[0]: 0.5})})
    row, = seen(model, [q])
    assert (row["predicted"], row["parsed"]) == ("entailment", True)
    assert 0 < row["in_option_mass"] <= 1


def test_a_tokenizer_without_a_pad_token_is_refused(settings, tokenizer):
    bare = build_tokenizer(["a b c"], 300)
    bare.pad_token = None
    with pytest.raises(ValueError, match="the tokenizer has no pad token: set tokenizer.pad_token"):
        predict(build_model(settings, tokenizer, 0), bare, questions(1), 1, 3)


# --- one step of the pipeline ------------------------------------------------------------------------------------------------

@pytest.fixture
def trained(settings, tokenizer, tmp_path):
    "The files that training leaves, around a random model."
    settings = dataclasses.replace(settings, preference_learning_rates=(settings.preference_learning_rate,))  # nothing to choose
    folder = run_folder(tmp_path, settings, "commonsense_qa", 3, "dpo_catto")
    build_model(settings, tokenizer, 0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "train.json").write_text('{"outputs": {"model": "one"}}')
    rows = questions(5)
    (folder.parent / "data").mkdir()
    rows.to_parquet(folder.parent / "data" / "test.parquet")
    return dataclasses.replace(settings, max_new_tokens=4, generation_batch_size=2), tmp_path, folder, rows


def test_a_method_is_evaluated_once_and_saved_with_what_produced_it(trained, tokenizer):
    settings, root, folder, rows = trained
    manifest = evaluate_method(settings, "commonsense_qa", 3, "dpo_catto", root)
    path = folder / "predictions_test.parquet"
    saved, time = pd.read_parquet(path), path.stat().st_mtime_ns
    assert (manifest["n"], manifest["fallbacks"]) == (5, int(saved["fallback"].sum()))
    assert list(manifest["outputs"]) == ["predictions_test.parquet"]
    task = "commonsense_qa"
    rate = settings.preference_learning_rate
    for name, value in dict(profile="smoke", trained_on=task, method="dpo_catto", seed=3, split="test", task=task, learning_rate=rate).items():
        assert (saved[name] == value).all()
    direct = predict(*load_model(folder / "model"), rows, 2, 4).to_pandas()
    pd.testing.assert_frame_equal(saved[direct.columns], direct)
    assert evaluate_method(settings, "commonsense_qa", 3, "dpo_catto", root) == manifest and path.stat().st_mtime_ns == time
    (folder / "train.json").write_text('{"outputs": {"model": "another"}}')
    assert evaluate_method(settings, "commonsense_qa", 3, "dpo_catto", root)["key"] != manifest["key"]
    assert path.stat().st_mtime_ns > time


def test_a_method_that_is_not_trained_or_not_known_is_refused(trained):
    settings, root, folder, _ = trained
    (folder / "train.json").unlink()
    with pytest.raises(FileNotFoundError, match="dpo_catto of commonsense_qa, seed 3, is not trained yet"):
        evaluate_method(settings, "commonsense_qa", 3, "dpo_catto", root)
    with pytest.raises(ValueError, match="unknown method 'ppo': accepted are sft"):
        evaluate_method(settings, "commonsense_qa", 3, "ppo", root)


def test_questions_that_are_not_there_are_named(trained):
    settings, root, *_ = trained
    with pytest.raises(FileNotFoundError, match="no test questions of snli, seed 3: run 02_data_gen"):
        evaluate_method(settings, "commonsense_qa", 3, "dpo_catto", root, tested_on="snli")


def test_models_answer_the_questions_of_other_tasks(trained):
    settings, root, folder, _ = trained
    other = run_folder(root, settings, "snli", 3, "data")
    other.mkdir(parents=True)
    questions(3, "snli").to_parquet(other / "test.parquet")
    own = evaluate_method(settings, "commonsense_qa", 3, "dpo_catto", root, tested_on="commonsense_qa")
    manifest = evaluate_method(settings, "commonsense_qa", 3, "dpo_catto", root, tested_on="snli")
    assert (list(own["outputs"]), list(manifest["outputs"])) == (["predictions_test.parquet"], ["predictions_test_snli.parquet"])
    assert json.loads((folder / "eval_snli.json").read_text()) == manifest
    saved = pd.read_parquet(folder / "predictions_test_snli.parquet")
    assert set(saved["task"]) == {"snli"} and set(saved["trained_on"]) == {"commonsense_qa"}


def write_train(root, settings, task, seed, name, **facts):
    "A hand-made train.json."
    path = run_folder(root, settings, task, seed, name) / "train.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"outputs": {}, "diverged": False, **facts}))
    return path


@pytest.fixture
def choice(settings):
    "Settings with two seeds and three learning rates."
    return dataclasses.replace(settings, seeds=(0, 1), preference_learning_rate=1e-4, preference_learning_rates=(1e-4, 1e-5, 1e-6), ood_task="mmlu")


@pytest.mark.parametrize("scores, best", [
    ([(0.3, 0.1), (0.2, 0.21), (0.4, 0.1)], 0),  # lowest mean, lowest on no seed alone
    ([(0.3, 0.1), (0.1, 0.2), (0.1, 0.3)], 1),
    ([(0.25, 0.25), (0.5, 0.0), (0.5, 0.125)], 0),  # a tie: the first
    ([(0.5, 0.5), (0.5, 0.0), (0.25, 0.25)], 1),
    ([(0.5, 0.5), (None, 0.0), (0.6, 0.6)], 0),  # one that diverged on a seed does not count
    ([(None, 0.1), (0.5, None), (None, 0.05)], 2),  # each diverged on one seed
    ([(None, None), (0.9, None), (None, None)], 1),
    ([(None, None), (None, None), (None, None)], 0),
])
def test_the_run_with_the_lowest_mean_validation_ece_is_chosen(choice, tmp_path, scores, best):
    for run, values in zip(grid(choice, "snli", "dpo"), scores, strict=True):
        for seed, value in enumerate(values):
            write_train(tmp_path, choice, "snli", seed, run.name, **({"diverged": True} if value is None else {"validation_ece": value}))
    assert chosen_run(choice, "snli", "dpo", tmp_path) == grid(choice, "snli", "dpo")[best]


def test_there_is_nothing_to_choose_with_one_run(choice, tmp_path):
    assert chosen_run(choice, "mmlu", "dpo", tmp_path) == Run("dpo")  # trained on ood_task
    assert chosen_run(choice, "snli", "sft", tmp_path) == Run("sft")
    assert chosen_run(choice, "snli", "sft_ts", tmp_path) == Run("sft_ts")


def test_a_run_that_is_missing_or_damaged_is_named(choice, tmp_path):
    for run in grid(choice, "snli", "dpo"):
        paths = [write_train(tmp_path, choice, "snli", seed, run.name, validation_ece=0.1) for seed in (0, 1)]
    paths[1].write_text('{"outputs": {"mod')
    with pytest.raises(ValueError, match="dpo@preference_learning_rate=1e-06 of snli, seed 1, has a damaged train.json"):
        chosen_run(choice, "snli", "dpo", tmp_path)
    paths[1].unlink()
    with pytest.raises(FileNotFoundError, match="dpo@preference_learning_rate=1e-06 of snli, seed 1, is not trained yet"):
        chosen_run(choice, "snli", "dpo", tmp_path)


@pytest.fixture
def tuned(choice, tokenizer, tmp_path):
    "Models of sft and of two learning rates of dpo_catto, all different, and test questions."
    task, settings = "commonsense_qa", dataclasses.replace(choice, seeds=(3,), preference_learning_rates=(1e-4, 1e-5), max_new_tokens=4, generation_batch_size=2)
    for weights, (run, ece) in enumerate([(Run("sft"), 0.5), *zip(grid(settings, task, "dpo_catto"), (0.1, 0.2))]):
        folder = write_train(tmp_path, settings, task, 3, run.name, validation_ece=ece, temperature=2.5, outputs={"model": weights}).parent
        build_model(settings, tokenizer, weights).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
    for name in ("sft_ts", "sft_ts_greedy"):
        write_train(tmp_path, settings, task, 3, name, temperature=2.5)
    data = run_folder(tmp_path, settings, task, 3, "data")
    data.mkdir()
    questions(5).to_parquet(data / "test.parquet")
    return settings, tmp_path, task


def test_the_chosen_runs_model_answers_and_another_choice_answers_again(tuned):
    settings, root, task = tuned
    one, two = (run.name for run in grid(settings, task, "dpo_catto"))
    first = evaluate_method(settings, task, 3, "dpo_catto", root)
    assert (first["run"], evaluate_method(settings, task, 3, "dpo_catto", root, run=Run("dpo_catto"))) == (one, first)
    write_train(root, settings, task, 3, one, validation_ece=0.3, outputs={"model": 1})
    second = evaluate_method(settings, task, 3, "dpo_catto", root)
    assert second["run"] == two and second["key"] != first["key"]
    for name, rate in ((one, 1e-4), (two, 1e-5)):
        folder = run_folder(root, settings, task, 3, name)
        saved = pd.read_parquet(folder / "predictions_test.parquet")
        assert (saved["learning_rate"] == rate).all() and (saved["method"] == "dpo_catto").all()
        direct = predict(*load_model(folder / "model"), questions(5), 2, 4).to_pandas()
        pd.testing.assert_frame_equal(saved[direct.columns], direct)


def test_scaled_methods_use_their_bases_model_at_its_temperature(tuned):
    settings, root, task = tuned
    model = load_model(run_folder(root, settings, task, 3, "sft") / "model")
    expected = {"sft_ts": dict(candidates=1, seed=3), "sft_ts_greedy": {}}
    for method, options in expected.items():
        manifest = evaluate_method(settings, task, 3, method, root)
        assert (manifest["model_of"], manifest["temperature"]) == ("sft", 2.5)
        saved = pd.read_parquet(run_folder(root, settings, task, 3, method) / "predictions_test.parquet")
        direct = predict(*model, questions(5), 2, 4, temperature=2.5, **options).to_pandas()
        pd.testing.assert_frame_equal(saved[direct.columns], direct)
        assert saved["learning_rate"].isna().all() and (saved["method"] == method).all()
        write_train(root, settings, task, 3, "sft", validation_ece=0.5, temperature=1.5, outputs={"model": 0})
        assert evaluate_method(settings, task, 3, method, root)["key"] != manifest["key"]  # another temperature
        write_train(root, settings, task, 3, "sft", validation_ece=0.5, temperature=2.5, outputs={"model": 0})


def test_a_run_that_diverged_says_so_and_leaves_no_predictions(tuned):
    settings, root, task = tuned
    folder = run_folder(root, settings, task, 3, "sft_ts")
    assert not evaluate_method(settings, task, 3, "sft_ts", root)["diverged"] and (folder / "predictions_test.parquet").exists()
    write_train(root, settings, task, 3, "sft", diverged=True)
    for method in ("sft", "sft_ts"):
        manifest = evaluate_method(settings, task, 3, method, root)
        assert manifest["diverged"] and manifest["outputs"] == {}
        assert not (run_folder(root, settings, task, 3, method) / "predictions_test.parquet").exists()
    for run in grid(settings, task, "dpo_catto"):
        write_train(root, settings, task, 3, run.name, diverged=True)
    assert evaluate_method(settings, task, 3, "dpo_catto", root)["diverged"]


@pytest.mark.parametrize("path", ["./nowhere/model", "/nowhere/model"])
def test_a_model_path_that_does_not_exist_is_refused(path):
    with pytest.raises(FileNotFoundError, match=f"model folder '{path}' does not exist"):
        load_model(path)


def test_a_model_that_cannot_be_had_is_named_with_a_way_out(settings, tokenizer, tmp_path):
    with pytest.raises(OSError, match="model 'nobody/nothing' at revision 'abc' cannot be loaded: to use a local copy, give its folder"):
        load_model("nobody/nothing", revision="abc")
    with pytest.raises(OSError, match=f"model '{tmp_path}' cannot be loaded: the folder must hold the model and its tokenizer"):
        load_model(tmp_path)
    build_model(settings, tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load_model(tmp_path)
    with pytest.raises(ValueError, match="has no revision 'main': a revision belongs to a name on the hub"):
        load_model(tmp_path, revision="main")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(OSError, match=f"model '{tmp_path}' cannot be loaded"):
        load_model(str(tmp_path))


def test_the_version_of_a_name_is_the_commit_that_it_stands_for(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--nobody--nothing" / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        (tmp_path / "models--nobody--nothing" / "snapshots" / commit).mkdir(parents=True)
        (tmp_path / "models--nobody--nothing" / "snapshots" / commit / "config.json").write_text("{}")
        (tmp_path / "models--nobody--nothing" / "refs" / "main").write_text(commit)
        assert model_version("nobody/nothing", "main") == commit
    assert model_version("nobody/nothing", "a" * 40) == "a" * 40
    with pytest.raises(OSError, match="model 'nobody/nothing' at revision 'v2' cannot be loaded: to use a local copy, give its folder"):
        model_version("nobody/nothing", "v2")
    with pytest.raises(FileNotFoundError, match="model folder './nowhere/model' does not exist"):
        model_version("./nowhere/model")
