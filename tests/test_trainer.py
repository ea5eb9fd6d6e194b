"""The trainer on small random models: what it takes from TRL, what it adds to the loss, and what a run leaves behind."""
import copy
import dataclasses
import inspect
import math
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from catto import train
from catto.data import ANSWER_PREFIX, SamplingTeacher, build_preferences, build_sft, load_questions
from catto.eval import load_model
from catto.loss import FORMS, catto_loss, dpo_loss, reward_calibration_loss
from catto.methods import METHODS
from catto.settings import load
from catto.surrogate import TokenProbs, correctness_surrogate, token_probs
from catto.train import CATTOConfig, CATTOTrainer, _fused_output, build_model, fit_context, mini_tokenizer, train_method

LABELS = "A", "B", "C", "D"
SHARP = 50  # logits of standard deviation 4: probabilities far from uniform, where the forms differ


@pytest.fixture(scope="module")
def settings(repo):
    small = dict(hidden_size=16, hidden_layers=1, attention_heads=2, key_value_heads=1, mlp_size=32)
    return load("smoke", file=repo / "settings.ini", **small)


@pytest.fixture(scope="module")
def tokenizer(settings):
    return mini_tokenizer(settings)


pytestmark = pytest.mark.usefixtures("one_thread")


def response(label, words):
    return f"<think>{' so' * words}</think>\n{ANSWER_PREFIX} {label} </answer>"


def pairs(n=8, chosen=response, rejected=response):
    "Preference rows whose prompts and responses all differ in length."
    return Dataset.from_list([{
        "prompt": f"Question {'a b ' * (i % 3)}: which of A, B, C, D?\n",
        "chosen": chosen(LABELS[i % 4], i % 5), "rejected": rejected(LABELS[(i + 1) % 4], 2 * (i % 3))} for i in range(n)])


@pytest.fixture
def make(tmp_path, settings, tokenizer):
    "make(...) -> a trainer whose policy and reference are different random models; `sharp` makes them surer of themselves."

    def make(cls=CATTOTrainer, rows=None, live=False, reference_seed=1, sharp=1, trainer=None, **options):
        arguments = dict(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
                         save_strategy="no", per_device_train_batch_size=4, learning_rate=1e-2, max_length=256,
                         precompute_ref_log_probs=not live, gradient_checkpointing=False, dataloader_pin_memory=False)
        config = CATTOConfig if issubclass(cls, CATTOTrainer) else DPOConfig
        models = [build_model(settings, tokenizer, seed) for seed in (0, reference_seed)]
        for model in models:
            model.get_input_embeddings().weight.data.mul_(sharp)  # tied: it is the head too
        given = dict(ref_model=models[1], processing_class=tokenizer) | (trainer or {})
        made = cls(model=models[0], args=config(**arguments | options),
                   train_dataset=pairs() if rows is None else rows, **given)
        made.remove_callback(PrinterCallback)
        return made

    return make


def batch_of(trainer, n=4):
    "The first n training rows as the trainer collates them."
    keep = [c for c in trainer.train_dataset.column_names if c.endswith(("_ids", "_logps"))]
    return trainer.data_collator([{c: row[c] for c in keep} for row in trainer.train_dataset.select(range(n))])


def recorded(trainer):
    "The list to which every loss that the trainer computes is appended."
    losses, compute = [], trainer.compute_loss

    def compute_loss(*args, **kwargs):
        losses.append(compute(*args, **kwargs))
        return losses[-1]

    trainer.compute_loss = compute_loss
    return losses


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def calls_of(model):
    "A list that grows by one with every forward of the model's body."
    calls = []
    model.get_submodule("model").register_forward_hook(lambda *_: calls.append(1))
    return calls


def leave_label_out(label, words):
    return f"<think>{' so' * words}</think> I do not know"


# --- one reference pass for all methods

@pytest.mark.parametrize("changes, passes", [
    (dict(loss_type="ipo", beta=0.3, learning_rate=1e-3, calibration_form="bce", reward_calibration_weight=1.0), 0),
    (dict(reference_seed=2), 6), (dict(max_length=255), 6), (dict(per_device_train_batch_size=2), 12), (dict(ld_alpha=0.5), 6),
    (dict(precompute_ref_batch_size=8), 3), (dict(changed_row=17), 6),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value))
def test_the_reference_is_asked_again_only_where_it_would_say_something_else(make, tmp_path, monkeypatch, changes, passes):
    pairs(24).to_parquet(tmp_path / "rows.parquet")
    calls, ask = [], DPOTrainer.compute_ref_log_probs
    monkeypatch.setattr(DPOTrainer, "compute_ref_log_probs", lambda *args: calls.append(1) or ask(*args))

    def rows(changed_row=None, **options):
        stored = Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))
        if changed_row:
            stored = stored.map(lambda row, i: row | {"chosen": response("D", 9)} if i == changed_row else row, with_indices=True)
        trained = make(rows=stored, **dict(share_reference=True) | options).train_dataset
        return [trained["ref_chosen_logps"][:], trained["ref_rejected_logps"][:]]

    first = rows(output_dir=str(tmp_path / "one"))
    assert len(calls) == 6
    second = rows(output_dir=str(tmp_path / "two"), **changes)
    assert len(calls) - 6 == passes
    if not passes:
        third = rows(output_dir=str(tmp_path / "three"), share_reference=False, **changes)  # TRL's own fingerprint
        assert len(calls) == 12 and first == second == third


def test_the_share_inside_counts_both_responses_of_the_last_batch(make):
    "accelerate leaves as many values of the last batch as it has pairs."
    options = dict(rows=pairs(6), per_device_train_batch_size=8, num_train_epochs=1, learning_rate=0.0, logging_steps=1, reward_calibration_weight=1.0)
    trainer = make(**options)
    batch = batch_of(trainer, 6)
    with torch.no_grad():
        policy = trainer.compute_ref_log_probs(trainer.model, batch)
    away = torch.stack([(p - batch[f"ref_{side}_logps"]).abs() for p, side in zip(policy, ("chosen", "rejected"))])
    goals = [goal for goal in away.flatten().add(1e-3).tolist() if (away[0] <= goal).sum() != (away[1] <= goal).sum()]
    trainer = make(reward_goal=goals[0], **options)
    trainer.train()
    assert trainer.state.log_history[0]["reward_calibration/inside"] == pytest.approx((away <= goals[0]).float().mean().item(), abs=1e-4)


# --- what is taken from TRL

def spied(trainer, batch):
    "How TRL's own `_compute_loss` calls the model it is given, and what it does with the answer."
    calls = []

    def policy(**kwargs):
        calls.append(kwargs)
        return trainer.model(**kwargs)

    with torch.no_grad():
        loss = DPOTrainer._compute_loss(trainer, policy, batch, False)
    return calls, loss


def head_fields(trainer, batch):
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with torch.no_grad():
        return trainer.model(**inputs, labels=labels, fused_lm_head=True)


def rows_are_stacked(trainer):
    collated = DataCollatorForPreference(pad_token_id=0)(
        [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]},
         {"prompt_ids": [6], "chosen_ids": [7, 8], "rejected_ids": [9]}])
    return (collated["input_ids"].tolist() == [[1, 2, 3, 0], [6, 7, 8, 0], [1, 2, 4, 5], [6, 9, 0, 0]]
            and collated["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0]])


def reference_matches(trainer, batch):
    with torch.no_grad():
        values = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    return all(torch.allclose(a, batch[k]) for a, k in zip(values, ("ref_chosen_logps", "ref_rejected_logps")))


# name of what catto.train uses -> is it there and as expected; each takes a trainer with precomputed reference and its batch
INTERNALS = {
    "trl.DPOTrainer._compute_loss(self, model, inputs, return_outputs)": lambda t, b:
        list(inspect.signature(DPOTrainer._compute_loss).parameters) == ["self", "model", "inputs", "return_outputs"],
    "one call of DPOTrainer._compute_loss's `model`": lambda t, b: len(spied(t, b)[0]) == 1,
    "fused_lm_head=True in that call": lambda t, b: spied(t, b)[0][0]["fused_lm_head"] is True,
    "labels in that call, -100 outside the completion": lambda t, b: torch.equal(
        spied(t, b)[0][0]["labels"], b["input_ids"].masked_fill(b["completion_mask"] == 0, -100)),
    "a scalar loss from DPOTrainer._compute_loss": lambda t, b: spied(t, b)[1].ndim == 0,
    "DPOTrainer.compute_loss calling self._compute_loss": lambda t, b:
        "self._compute_loss(" in inspect.getsource(DPOTrainer.compute_loss),
    "DPOTrainer._prepare_dataset(self, dataset, processing_class, args, dataset_name)": lambda t, b:
        list(inspect.signature(DPOTrainer._prepare_dataset).parameters)
        == ["self", "dataset", "processing_class", "args", "dataset_name"],
    "DPOTrainer._metrics['train'] and ['eval'], lists by name": lambda t, b:
        all(t._metrics[mode]["any name"] == [] for mode in ("train", "eval")),
    "DPOTrainer._total_train_tokens": lambda t, b: isinstance(t._total_train_tokens, int),
    "DPOTrainer._tokenizer": lambda t, b: t._tokenizer is t.processing_class,
    "DPOTrainer.precompute_ref_logps": lambda t, b: t.precompute_ref_logps is True,
    "DPOTrainer.ref_model": lambda t, b: isinstance(t.ref_model, torch.nn.Module),
    "DPOTrainer.beta": lambda t, b: t.beta == t.args.beta,
    "DPOTrainer.ld_alpha": lambda t, b: t.ld_alpha is None,
    "DPOTrainer.compute_ref_log_probs(model, inputs) -> chosen, rejected": reference_matches,
    "accelerator.gather_for_metrics": lambda t, b: t.accelerator.gather_for_metrics(torch.tensor(2.0)) == 2,
    "Trainer.create_accelerator_and_postprocess(self)": lambda t, b:
        list(inspect.signature(DPOTrainer.create_accelerator_and_postprocess).parameters) == ["self"],
    "the fields of trl.trainer.utils.FusedCausalLMOutput": lambda t, b:
        {f.name for f in dataclasses.fields(FusedCausalLMOutput)} == {
            "loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss"},
    "FusedCausalLMOutput.log_probs of shape (2B, T - 1)": lambda t, b:
        head_fields(t, b).log_probs.shape == b["completion_mask"][:, 1:].shape,
    "batch keys input_ids, attention_mask, completion_mask, ref_chosen_logps, ref_rejected_logps": lambda t, b: set(b) == {
        "input_ids", "attention_mask", "completion_mask", "ref_chosen_logps", "ref_rejected_logps"},
    "chosen rows stacked above rejected rows by DataCollatorForPreference": lambda t, b: rows_are_stacked(t),
    "columns prompt_ids, chosen_ids, rejected_ids of the tokenised rows": lambda t, b:
        {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(t.train_dataset.column_names),
    "DPOConfig.max_length, truncation_mode and precompute_ref_log_probs": lambda t, b:
        (t.args.max_length, t.args.truncation_mode, t.args.precompute_ref_log_probs) == (256, "keep_start", True),
    "transformers.PrinterCallback where the progress bar is off": lambda t, b:
        "PrinterCallback" in inspect.getsource(transformers.Trainer.__init__),
}


def canary(name, trainer, batch):
    try:
        there = INTERNALS[name](trainer, batch)
    except (AttributeError, KeyError, TypeError, IndexError):
        there = False
    assert there, f"catto.train needs {name}: gone or changed in trl {version('trl')}; it is written for trl 1.16"


@pytest.fixture
def subject(make):
    trainer = make()
    return trainer, batch_of(trainer)


def test_canary_everything_taken_from_trl_is_there(subject):
    for name in INTERNALS:
        canary(name, *subject)


def renamed(fields):
    return dataclasses.make_dataclass("FusedCausalLMOutput", [f.name for f in fields if f.name != "log_probs"] + ["per_token"])


SABOTAGE = {  # part of the name -> how to take it away from (monkeypatch, trainer, batch)
    "_compute_loss(self": lambda m, t, b: m.setattr(DPOTrainer, "_compute_loss", lambda self, model, inputs: None),
    "one call": lambda m, t, b: m.setattr(DPOTrainer, "_compute_loss", lambda self, model, inputs, return_outputs: None),
    "fused_lm_head=True": lambda m, t, b: m.setattr(DPOTrainer, "_compute_loss", lambda self, model, inputs, _: model(**inputs)),
    "_metrics": lambda m, t, b: m.delattr(t, "_metrics"),
    "_tokenizer": lambda m, t, b: m.delattr(t, "_tokenizer"),
    "precompute_ref_logps": lambda m, t, b: m.delattr(t, "precompute_ref_logps"),
    "ref_model": lambda m, t, b: m.setattr(t, "ref_model", None),
    "compute_ref_log_probs(": lambda m, t, b: m.delattr(DPOTrainer, "compute_ref_log_probs"),
    "fields of": lambda m, t, b:
        m.setitem(globals(), "FusedCausalLMOutput", renamed(dataclasses.fields(FusedCausalLMOutput))),
    "batch keys": lambda m, t, b: m.delitem(b, "completion_mask"),
    "stacked": lambda m, t, b:
        m.setattr(DataCollatorForPreference, "torch_call", lambda self, rows: {"input_ids": torch.zeros(4, 4)}),
    "columns": lambda m, t, b: m.setattr(t, "train_dataset", t.train_dataset.rename_column("chosen_ids", "chosen_input_ids")),
}


@pytest.mark.parametrize("part", SABOTAGE)
def test_canary_names_what_is_gone(subject, monkeypatch, part):
    name = next(name for name in INTERNALS if part in name)
    SABOTAGE[part](monkeypatch, *subject)
    with pytest.raises(AssertionError) as caught:
        canary(name, *subject)
    assert name in str(caught.value) and "written for trl 1.16" in str(caught.value)


def test_our_head_returns_what_the_fused_head_returns(subject):
    "Every field, not only the log-probabilities: TRL logs them, and weights its loss by one when `use_weighting` is set."
    trainer, batch = subject
    model = copy.deepcopy(trainer.ref_model)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = dict(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with torch.no_grad():
        theirs = model(**inputs, labels=labels, fused_lm_head=True)
        ours, _ = _fused_output(model(**inputs), labels)
    for name in ("loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=2e-6, rtol=1e-5, msg=lambda m: f"{name}: {m}")
    assert torch.equal(ours.is_top1.bool(), theirs.is_top1.bool()) and torch.equal(ours.label_mask, theirs.label_mask)


# --- the loss -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("live", [False, True], ids=["precomputed reference", "live reference"])
def test_weight_zero_is_trls_own_trainer_bit_for_bit(make, live):
    runs = []
    for cls, options in ((DPOTrainer, {}), (CATTOTrainer, {"calibration_weight": 0.0})):
        trainer = make(cls, live=live, max_steps=5, reference_seed=0, rows=pairs(20), **options)
        losses = recorded(trainer)
        start = weights(trainer.model)
        trainer.train()
        runs.append((torch.stack(losses), weights(trainer.model)))
    (theirs, their_weights), (ours, our_weights) = runs
    assert len(ours) == 5 and torch.equal(ours, theirs)
    assert largest_difference(our_weights, their_weights) == 0 < largest_difference(our_weights, start)
    assert ours[0].item() == pytest.approx(math.log(2), abs=1e-6)  # policy and reference are the same model at first


@pytest.mark.parametrize("weight, reward_weight", [(0.1, 0.0), (0.0, 0.5), (0.3, 0.2)])
def test_trls_metrics_do_not_depend_on_the_other_terms(make, weight, reward_weight):
    ours = make(calibration_weight=weight, reward_calibration_weight=reward_weight)
    plain = make(DPOTrainer)
    batch = batch_of(ours)
    for trainer in (ours, plain):
        trainer.compute_loss(trainer.model, batch)
    added = {f"calibration/{name}" for name in ("loss", "confidence", "surrogate", "largest_gradient")} if weight or reward_weight else set()
    added |= {"reward_calibration/inside"} if reward_weight else set()
    assert ours._metrics["train"].keys() - plain._metrics["train"].keys() == added
    for name, values in plain._metrics["train"].items():
        assert ours._metrics["train"][name] == pytest.approx(values, abs=1e-5), name


@pytest.mark.parametrize("weight, reward_weight", [(0.1, 0.0), (0.0, 0.5), (0.3, 0.2)])
def test_the_first_loss_is_ln_2_and_the_terms(make, weight, reward_weight):
    trainer = make(calibration_weight=weight, reward_calibration_weight=reward_weight, reference_seed=0, beta=0.1)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer)).item()
    squares = 2 * (1 / (2 * 0.1)) ** 2  # both log-ratios are 0
    expected = math.log(2) + weight * trainer._metrics["train"]["calibration/loss"][0] + reward_weight * squares
    assert loss == pytest.approx(expected, rel=1e-6)


def by_hand(trainer, batch, tokenizer, label_only):
    "Log-probabilities, TokenProbs and masks of chosen and rejected, from plain logits, token by token."
    ids, counts = batch["input_ids"], batch["completion_mask"].bool()
    inputs = dict(input_ids=ids, attention_mask=batch["attention_mask"])
    policy, reference = trainer.model(**inputs).logits[:, :-1], trainer.ref_model(**inputs).logits[:, :-1].detach()
    place = naive_label_mask(ids, counts, tokenizer, ANSWER_PREFIX) if label_only else counts
    mask, counts, labels = place[:, 1:], counts[:, 1:], ids[:, 1:]

    def summed(logits):
        return (logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0] * counts).sum(-1).chunk(2)

    probs = token_probs(policy, labels)
    chosen, rejected = (TokenProbs(*half) for half in zip(*(field.chunk(2) for field in probs)))
    return *summed(policy), *summed(reference), chosen, rejected, *mask.chunk(2)


def naive_label_mask(ids, counts, tokenizer, prefix):
    "Decode one token more at a time; the label is the first token that brings text after the last prefix."
    found = torch.zeros_like(counts)
    for row in range(len(ids)):
        places = counts[row].nonzero().flatten().tolist()
        texts = [tokenizer.decode(ids[row, places[:n]], clean_up_tokenization_spaces=False) for n in range(len(places) + 1)]
        if prefix in texts[-1]:
            end = texts[-1].rindex(prefix) + len(prefix)
            found[row, next(p for n, p in enumerate(places) if texts[n + 1][end:].strip(" \n([{*\"'`"))] = True
    return found


@pytest.mark.parametrize("tokens", ["all", "label"])
@pytest.mark.parametrize("live", [False, True], ids=["precomputed reference", "live reference"])
def test_total_loss_by_hand(make, tokenizer, tokens, live):
    "Two roads to Eq. 7: the trainer, and catto.loss on plain logits. Value, gradient and what is logged."
    trainer = make(live=live, calibration_tokens=tokens, calibration_weight=0.7, sharp=SHARP)
    trainer.model.double(), trainer.ref_model.double()  # bce is steep where the confidence is near 1
    batch = batch_of(trainer, 5)
    for form in FORMS:
        for detach in (False, True):
            for scale in (1.0, 3.0):
                args = trainer.args
                args.calibration_form, args.detach_surrogate, args.surrogate_scale = form, detach, scale
                trainer._metrics["train"].clear()
                loss = trainer.compute_loss(trainer.model, batch)
                parts = by_hand(trainer, batch, tokenizer, tokens == "label")
                options = dict(form=form, detach_surrogate=detach, scale=scale)
                expected = catto_loss(*parts, beta=0.1, weight=0.7, **options).mean()
                case = f"{form}, detach {detach}, scale {scale}"
                assert loss.item() == pytest.approx(expected.item(), rel=2e-6), case
                logged = trainer._metrics["train"]
                calibration = (expected - dpo_loss(*parts[:4], beta=0.1).mean()) / 0.7
                assert logged["calibration/loss"][0] == pytest.approx(calibration.item(), abs=5e-6), case
                table = trainer.model.get_input_embeddings().weight
                ours, theirs = (torch.autograd.grad(value, table)[0] for value in (loss, expected))
                assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max(), case


@pytest.mark.parametrize("tokens", ["all", "label"])
def test_logged_means_by_hand(make, tokenizer, tokens):
    trainer = make(calibration_tokens=tokens, surrogate_scale=3.0, sharp=SHARP)
    batch = batch_of(trainer, 5)
    trainer.compute_loss(trainer.model, batch)
    *_, chosen, rejected, chosen_mask, rejected_mask = by_hand(trainer, batch, tokenizer, tokens == "label")
    mask = torch.cat([chosen_mask, rejected_mask])
    assert chosen.confidence[chosen_mask].max() > 0.3
    probs = TokenProbs(*(torch.cat(both)[mask] for both in zip(chosen, rejected)))
    surrogate = correctness_surrogate(probs.log_prob.exp(), probs.competitor, 3.0)
    logged = trainer._metrics["train"]
    assert logged["calibration/confidence"][0] == pytest.approx(probs.confidence.mean().item(), rel=1e-5)
    assert logged["calibration/surrogate"][0] == pytest.approx(surrogate.mean().item(), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", ["all", "label"])
def test_largest_gradient_is_that_of_autograd(make, tokens, form):
    "And it is the maximum since the last log, where TRL averages."
    trainer = make(calibration_form=form, calibration_tokens=tokens, surrogate_scale=2.0)
    batch = batch_of(trainer, 4)
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logits = (5 * torch.randn(*labels.shape, 40, generator=torch.Generator().manual_seed(0))).requires_grad_()
    labels = labels.clamp(max=39)
    largest = []
    for factor in (1.0, 0.01):
        _, probs = _fused_output(transformers.modeling_outputs.CausalLMOutput(logits=factor * logits), labels)
        mask = trainer._calibrated_tokens(batch)
        loss = trainer._calibration(probs, batch)
        grad, = torch.autograd.grad(loss, logits)
        per_row = mask.sum(1).clamp(min=1) * len(mask) / 2  # undo the means over tokens and pairs
        largest.append((grad[:, :-1].abs().amax(-1) * per_row[:, None]).max().item() / factor)
    assert largest[1] < largest[0]
    assert trainer._metrics["train"]["calibration/largest_gradient"] == [pytest.approx(largest[0], rel=1e-4)]


@pytest.mark.parametrize("live", [False, True], ids=["precomputed reference", "live reference"])
def test_reward_calibration_by_hand(make, tokenizer, live):
    trainer = make(live=live, calibration_weight=0.7, reward_calibration_weight=0.3, beta=0.2, sharp=SHARP)
    batch = batch_of(trainer, 5)
    loss = trainer.compute_loss(trainer.model, batch)
    parts = by_hand(trainer, batch, tokenizer, False)
    expected = catto_loss(*parts, beta=0.2, weight=0.7).mean() + 0.3 * reward_calibration_loss(*parts[:4], beta=0.2).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=5e-6)
    table = trainer.model.get_input_embeddings().weight
    ours, theirs = (torch.autograd.grad(value, table)[0] for value in (loss, expected))
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_reward_calibration_refuses_length_desensitised_sums(make):
    "TRL's ld_alpha discounts the tail of the longer response; the squared term would compare two different sums."
    with pytest.raises(ValueError, match="ld_alpha"):
        make(reward_calibration_weight=0.1, ld_alpha=0.5)


# --- batches ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tokens", ["all", "label"])
def test_a_batch_of_four_equals_four_accumulated(make, tokens):
    "Plain gradient descent, so that the weights show the gradients and not their signs."
    ends = []
    for size, accumulated in ((4, 1), (1, 4)):
        rows = pairs(12, rejected=lambda label, words: leave_label_out(label, words) if words == 2 else response(label, words))
        trainer = make(rows=rows, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, max_steps=3,
                       optim="sgd", learning_rate=0.1, max_grad_norm=0.0, calibration_weight=5.0, calibration_tokens=tokens,
                       reward_calibration_weight=0.01)
        start = weights(trainer.model)
        trainer.train()
        ends.append(weights(trainer.model))
        assert trainer.state.global_step == 3
    assert largest_difference(*ends) < 1e-5 < 1e-2 < largest_difference(start, ends[0])


@pytest.mark.parametrize("live, reward_weight, per_step", [(False, 0.0, 0), (True, 0.0, 1), (False, 0.1, 0), (True, 0.1, 2)])
def test_one_policy_forward_a_step(make, live, reward_weight, per_step):
    trainer = make(live=live, max_steps=3, reward_calibration_weight=reward_weight)
    policy, reference = calls_of(trainer.model), calls_of(trainer.ref_model)
    trainer.train()
    assert (len(policy), len(reference)) == (3, 3 * per_step)


def shifted_left(batch):
    "The same batch with its padding on the left."
    moved = dict(batch)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        for name in ("input_ids", "attention_mask", "completion_mask"):
            moved[name] = moved[name].clone()
            moved[name][row] = moved[name][row].roll(moved[name].shape[1] - length)
    return moved


@pytest.mark.parametrize("tokens", ["all", "label"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype, options, close", [
    (torch.float32, dict(calibration_weight=0.1), 1e-6),
    (torch.float64, dict(calibration_weight=1.0, reward_calibration_weight=0.01), 1e-7)], ids=["float32", "float64"])
def test_padding_changes_nothing(make, tokens, form, dtype, options, close):
    trainer = make(calibration_tokens=tokens, calibration_form=form, **options)
    longer = make(calibration_tokens=tokens, calibration_form=form, pad_to_multiple_of=64, **options)
    trainer.model.to(dtype)
    batch, padded = batch_of(trainer), batch_of(longer)
    left = shifted_left(padded)
    assert batch["input_ids"].shape[1] < padded["input_ids"].shape[1]
    assert padded["attention_mask"][:, 0].all() and not left["attention_mask"][:, 0].any()
    padded |= {name: batch[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}  # made in float32
    left |= {name: batch[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
    losses = [trainer.compute_loss(trainer.model, b).item() for b in (batch, padded, left)]
    assert losses[1] == pytest.approx(losses[0], abs=close) and losses[2] == pytest.approx(losses[0], abs=close)
    for name in ("calibration/loss", "calibration/confidence", "calibration/surrogate"):
        first, *others = trainer._metrics["train"][name]
        assert others == pytest.approx([first, first], abs=close), name


@pytest.mark.parametrize("tokens", ["all", "label"])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_exactly_zero_outside_the_response(make, tokenizer, tokens, form):
    "For the same logits, what stands in prompt and padding does not count, even if it looks like an answer."
    trainer = make(calibration_tokens=tokens, calibration_form=form)
    batch = batch_of(trainer)
    outside = batch["completion_mask"] == 0
    logits = torch.randn(*outside.shape, len(tokenizer), generator=torch.Generator().manual_seed(0))

    def calibrate(ids):
        logits.requires_grad_(True)
        _, probs = _fused_output(transformers.modeling_outputs.CausalLMOutput(logits=logits), ids.masked_fill(outside, -100))
        loss = trainer._calibration(probs, {**batch, "input_ids": ids})
        return loss.item(), torch.autograd.grad(loss, logits)[0]

    loss, grad = calibrate(batch["input_ids"])
    predicts = torch.zeros_like(outside)
    predicts[:, :-1] = ~outside[:, 1:] if tokens == "all" else trainer._calibrated_tokens(batch)
    assert (grad[predicts].abs().sum(-1) > 0).all() and (grad[~predicts] == 0).all()
    tag = tokenizer.convert_tokens_to_ids(ANSWER_PREFIX)
    other, other_grad = calibrate(batch["input_ids"].masked_fill(outside, tag))
    assert other == loss and torch.equal(other_grad, grad)


# --- label tokens -------------------------------------------------------------------------------------------------------

def twice(label, words):
    "The tag also in the reasoning: the last one counts."
    return f"<think>{' so' * words} maybe {ANSWER_PREFIX} D </answer> no</think>\n{ANSWER_PREFIX} {label} </answer>"


@pytest.mark.parametrize("chosen", [response, twice, lambda label, words: f"{ANSWER_PREFIX}\n({label}) and more </answer>"])
def test_label_tokens_against_a_naive_scan(make, tokenizer, chosen):
    trainer = make(rows=pairs(chosen=chosen), calibration_tokens="label")
    batch = batch_of(trainer, 8)
    mask = trainer._calibrated_tokens(batch)
    naive = naive_label_mask(batch["input_ids"], batch["completion_mask"].bool(), tokenizer, ANSWER_PREFIX)
    assert torch.equal(mask, naive[:, 1:])
    assert (mask.sum(1) == 1).all()
    tokens = [tokenizer.decode(t).strip(" (\n)") for t in batch["input_ids"][:, 1:][mask]]
    assert tokens == [LABELS[i % 4] for i in range(8)] + [LABELS[(i + 1) % 4] for i in range(8)]


def test_label_tokens_of_another_answer_format(make, tokenizer):
    def plain(label, words):
        return f"{ANSWER_PREFIX} D </answer> {'so ' * words}\nThe answer is: {label}."

    trainer = make(rows=pairs(chosen=plain, rejected=plain), calibration_tokens="label", answer_prefix="The answer is:")
    batch = batch_of(trainer)
    mask = trainer._calibrated_tokens(batch)
    assert [tokenizer.decode(t).strip() for t in batch["input_ids"][:, 1:][mask]] == list("ABCDBCDA")


def test_responses_without_a_label_are_counted(make, capsys):
    rows = pairs(8, rejected=lambda label, words: leave_label_out(label, words) if words == 2 else response(label, words))
    trainer = make(rows=rows, calibration_tokens="label")
    assert f"3 of 16 train responses have no {ANSWER_PREFIX!r} and are not calibrated" in capsys.readouterr().out
    batch = batch_of(trainer, 8)
    assert trainer._calibrated_tokens(batch).sum(1).tolist() == [1] * 8 + [1, 0, 1, 1, 0, 1, 1, 0]
    assert trainer.compute_loss(trainer.model, batch).isfinite()


def test_no_response_with_a_label_is_an_error(make):
    rows = pairs(chosen=leave_label_out, rejected=leave_label_out)
    with pytest.raises(ValueError, match="no train response contains '<answer>'"):
        make(rows=rows, calibration_tokens="label")
    with pytest.raises(ValueError, match="no eval response contains '<answer>'"):
        make(calibration_tokens="label", trainer={"eval_dataset": rows})
    assert len(make(rows=rows, calibration_tokens="all").train_dataset) == 8  # all tokens: no label needed


# --- nothing is cut silently --------------------------------------------------------------------------------------------

def lengths(tokenizer, row):
    return {side: len(tokenizer.encode(row["prompt"] + row[side])) for side in ("chosen", "rejected")}


@pytest.fixture
def long_row(tokenizer):
    "Row 5 of 8 is by far the longest, in its rejected response; and the length at which its label is the last token kept."
    rows = pairs().to_list()
    rows[5]["rejected"] = response("A", 60)
    return Dataset.from_list(rows), lengths(tokenizer, rows[5])["rejected"] - 2  # after the label: a space and `</answer>`


@pytest.mark.parametrize("tokens", ["all", "label"])
@pytest.mark.parametrize("live", [False, True], ids=["precomputed reference", "live reference"])
def test_a_cut_that_takes_the_label_is_refused_before_any_work(make, settings, tokenizer, long_row, tokens, live):
    rows, label_at = long_row
    reference = build_model(settings, tokenizer, 1)
    passes = calls_of(reference)
    with pytest.raises(ValueError, match=r"row 5: max_length = \d+ cuts the label off the rejected response"):
        make(rows=rows, live=live, calibration_tokens=tokens, max_length=label_at - 1, trainer={"ref_model": reference})
    assert not passes, "the reference model ran before the rows were checked"
    trainer = make(rows=rows, live=live, calibration_tokens=tokens, max_length=label_at, max_steps=1)
    trainer.train()  # the label is the last token kept
    assert trainer.state.global_step == 1
    cut = batch_of(trainer, 8)
    assert cut["input_ids"].shape[1] == label_at and tokenizer.decode(cut["input_ids"][13, -1]).strip() == "A"


@pytest.mark.parametrize("given", ["eval", "several", "later"])
def test_rows_for_evaluation_are_checked_too(make, long_row, given):
    rows, label_at = long_row
    with pytest.raises(ValueError, match="row 5: max_length"):
        if given == "later":
            make(max_length=label_at - 1, live=True).evaluate(rows)
        make(max_length=label_at - 1, trainer={"eval_dataset": {"one": pairs(), "two": rows} if given == "several" else rows})


def test_streamed_rows_are_checked_when_they_come(make, long_row):
    rows, label_at = long_row
    trainer = make(rows=rows.to_iterable_dataset(), live=True, max_length=label_at - 1, max_steps=4)
    with pytest.raises(ValueError, match="cuts the label off the rejected response"):
        trainer.train()


def test_keeping_the_end_keeps_the_label(make, tokenizer):
    "TRL can cut the start instead; then a label at the end is safe, and one far before the end is not."
    rows = pairs().to_list()
    rows[5]["rejected"] = response("A", 60)
    options = dict(max_length=30, truncation_mode="keep_end")
    trainer = make(rows=Dataset.from_list(rows), calibration_tokens="label", **options)
    assert trainer._calibrated_tokens(batch_of(trainer, 8)).sum(1).tolist() == [1] * 16
    rows[5]["rejected"] = response("A", 0) + " so" * 60
    with pytest.raises(ValueError, match="row 5: max_length = 30"):
        make(rows=Dataset.from_list(rows), **options)


def test_prompts_that_do_not_fit_are_reported(make, capsys):
    rows = pairs().to_list()
    rows[2]["prompt"] = "too long " * 200
    assert len(make(rows=Dataset.from_list(rows)).train_dataset) == 7
    assert "1 of 8 train rows" in capsys.readouterr().out


def test_rows_that_do_not_fit_are_left_out_and_reported(tokenizer, long_row, capsys):
    rows, label_at = long_row
    kept, left_out = fit_context(rows, tokenizer, label_at)
    assert (len(kept), left_out) == (7, 1) and "1 of 8 rows exceed" in capsys.readouterr().out
    assert fit_context(rows, tokenizer, label_at + 3)[1] == 0  # a space, `</answer>` and the end token
    assert fit_context(rows, tokenizer, label_at + 2)[1] == 1
    with pytest.raises(ValueError, match="no row fits into context_tokens = 16"):
        fit_context(rows, tokenizer, 16)


# --- as other TRL users have it -----------------------------------------------------------------------------------------

def test_evaluation_is_logged_beside_training(make):
    trainer = make(trainer={"eval_dataset": pairs(6)}, per_device_eval_batch_size=6, max_steps=2, logging_steps=1)
    trainer.train()
    logged = trainer.evaluate()
    expected = {"loss", "confidence", "surrogate", "largest_gradient"}
    assert {k.removeprefix("eval_calibration/") for k in logged if k.startswith("eval_calibration/")} == expected
    steps = [row for row in trainer.state.log_history if "calibration/loss" in row]
    assert len(steps) == 2 and all(f"calibration/{name}" in row for row in steps for name in expected)
    trainer.model.eval()
    batch = batch_of(trainer, 6)  # the same six rows
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, batch).item()
    assert logged["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert trainer._metrics["eval"]["calibration/loss"] == [pytest.approx(logged["eval_calibration/loss"], rel=1e-5)]


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_outputs_are_returned_when_metrics_ask_for_them(make):
    trainer = make()
    batch = batch_of(trainer)
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert torch.equal(outputs.logits, trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits)
    assert loss.item() == trainer.compute_loss(trainer.model, batch).item()


@pytest.mark.parametrize("live", [False, True], ids=["precomputed reference", "live reference"])
def test_lora_starts_at_the_full_models_loss_and_trains_adapters_alone(make, live):
    options = dict(live=live, reward_calibration_weight=0.1, calibration_weight=1.0)
    full = make(reference_seed=0, **options)
    lora = {"ref_model": None, "peft_config": LoraConfig(r=4, target_modules="all-linear")}
    adapted = make(trainer=lora, max_steps=1, **options)
    expected = full.compute_loss(full.model, batch_of(full)).item()
    assert adapted.compute_loss(adapted.model, batch_of(adapted)).item() == pytest.approx(expected, rel=1e-5)
    before = weights(adapted.model)
    adapted.train()
    changed = {name for name, value in weights(adapted.model).items() if not torch.equal(value, before[name])}
    assert changed and all("lora_" in name for name in changed)


CHAT = ("{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")


def test_conversations(make, tokenizer):
    "Lists of messages with a chat template: the same label tokens, and a step is taken."
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = CHAT
    rows = Dataset.from_list([{
        "prompt": [{"role": "user", "content": row["prompt"]}],
        **{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}} for row in pairs()])
    trainer = make(rows=rows, calibration_tokens="label", max_steps=1, trainer={"processing_class": chatty})
    batch = batch_of(trainer)
    mask = trainer._calibrated_tokens(batch)
    assert [chatty.decode(t).strip() for t in batch["input_ids"][:, 1:][mask]] == list("ABCDBCDA")
    assert chatty.decode(trainer.train_dataset[0]["prompt_ids"]).endswith("[assistant]")
    before = weights(trainer.model)
    trainer.train()
    assert largest_difference(before, weights(trainer.model)) > 0


# --- a whole run --------------------------------------------------------------------------------------------------------

class Stopped(Exception):
    "What the tests raise to stop a run."


@pytest.fixture(scope="module")
def world(settings, tmp_path_factory):
    "Settings for runs of 12 to 16 steps with a checkpoint after every fourth, their rows, and the folder of an SFT model."
    quick = dataclasses.replace(
        settings, sft_batch_size=8, sft_epochs=2, sft_save_steps=4, preference_batch_size=4, catto_pairs=24, catto_epochs=2,
        preference_save_steps=4, preference_learning_rate=3e-3, max_new_tokens=6, generation_batch_size=24)
    questions, teacher = load_questions("commonsense_qa", split="train", n=130), SamplingTeacher()
    sft, _ = build_sft(questions, [teacher.respond(q, 0) for q in questions])
    preferences, _ = build_preferences(questions, [[teacher.respond(q, k, 1.0) for k in range(1, 7)] for q in questions], 1, 1)
    rows = {"sft": sft.select(range(60)), "dpo_catto": preferences.select(range(40))}
    validation = load_questions("commonsense_qa", split="validation", n=24)
    base = tmp_path_factory.mktemp("base")
    train_method(quick, rows["sft"], "sft", 0, folder=base, validation=validation)
    return quick, rows, validation, base / "model"


def run(world, folder, method, seed=0):
    quick, rows, validation, base = world
    base = None if method == "sft" else base
    return train_method(quick, rows[method], method, seed, folder=folder, validation=validation, base=base)


def left_behind(folder):
    "What a run leaves: every tensor and every other file of the model, log, predictions."
    paths = [p for p in (*folder.glob("*.*"), *folder.glob("model/*")) if p.is_file()]
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
    assert {"training_log.csv", "predictions_validation.parquet", "model/model.safetensors", "model/config.json"} <= files.keys()
    return files


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    "method -> (files of a run that nothing stopped, its facts)."
    made = {}
    for method in ("sft", "dpo_catto"):
        folder = tmp_path_factory.mktemp(method)
        made[method] = run(world, folder, method)[1], left_behind(folder)
    return made


def stop_at(monkeypatch, step):
    "Raise in the middle of this optimiser step, counted from 1."
    done, original = [], transformers.Trainer.training_step

    def training_step(self, *args, **kwargs):
        done.append(1)
        if len(done) == step:
            raise Stopped
        return original(self, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)


def stopped(world, folder, method, step=11):
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step)
        with pytest.raises(Stopped):
            run(world, folder, method)
    return sorted(int(p.name.split("-")[1]) for p in (folder / "checkpoints").glob("checkpoint-*"))


def steady(facts):
    "The facts that do not depend on when and in how many pieces a run was made."
    return {name: value for name, value in facts.items() if name not in ("train_seconds", "resumed")}


def assert_resumed(facts, expected):
    assert (expected["resumed"], facts["resumed"]) == (False, True)
    assert steady(facts) == steady(expected)


def assert_same(files, expected):
    assert files.keys() == expected.keys()
    different = [name for name in files if files[name] != expected[name]]
    assert not different, f"resumed run differs in {different}"


@pytest.mark.parametrize("method", ["sft", "dpo_catto"])
def test_resumed_equals_uninterrupted(world, uninterrupted, tmp_path, method):
    facts, files = uninterrupted[method]
    assert stopped(world, tmp_path, method) == [4, 8]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, facts["steps"] - 8 + 1)  # it must not begin anew
        assert_resumed(run(world, tmp_path, method)[1], facts)
    assert_same(left_behind(tmp_path), files)


def test_resuming_a_run_that_had_only_to_select(world, uninterrupted, tmp_path, monkeypatch):
    facts, files = uninterrupted["dpo_catto"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "best_checkpoint", lambda *_: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            run(world, tmp_path, "dpo_catto")
    stop_at(monkeypatch, 1)
    assert_resumed(run(world, tmp_path, "dpo_catto")[1], facts)
    assert_same(left_behind(tmp_path), files)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "state cut short": lambda c: truncate(c / "trainer_state.json"),
    "state empty": lambda c: (c / "trainer_state.json").write_bytes(b""),
    "state missing": lambda c: (c / "trainer_state.json").unlink(),
    "model missing": lambda c: (c / "model.safetensors").unlink(),
    "model cut short": lambda c: truncate(c / "model.safetensors"),
    "model empty": lambda c: (c / "model.safetensors").write_bytes(b""),
    "optimizer cut short": lambda c: truncate(c / "optimizer.pt"),
    "optimizer missing": lambda c: (c / "optimizer.pt").unlink(),
    "scheduler missing": lambda c: (c / "scheduler.pt").unlink(),
    "random state missing": lambda c: (c / "rng_state.pth").unlink(),
    "tokenizer missing": lambda c: (c / "tokenizer.json").unlink(),
}


@pytest.fixture(scope="module")
def stopped_run(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    assert stopped(world, folder, "dpo_catto") == [4, 8]
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_removed_by_name(stopped_run, tmp_path, capsys, damage):
    where = shutil.copytree(stopped_run / "checkpoints", tmp_path / "checkpoints")
    DAMAGE[damage](where / "checkpoint-8")
    assert [step for step, _ in train.whole_checkpoints(where)] == [4]
    assert "checkpoint-8" in capsys.readouterr().out and not (where / "checkpoint-8").exists()


@pytest.mark.parametrize("damage", ["state cut short", "model missing", "model cut short", "optimizer cut short"])
def test_a_damaged_checkpoint_does_not_break_the_resume(world, stopped_run, uninterrupted, tmp_path, damage):
    facts, files = uninterrupted["dpo_catto"]
    folder = shutil.copytree(stopped_run, tmp_path / "run")
    DAMAGE[damage](folder / "checkpoints" / "checkpoint-8")
    assert steady(run(world, folder, "dpo_catto")[1]) == steady(facts)
    assert_same(left_behind(folder), files)


def test_a_damaged_earlier_checkpoint_still_takes_part_in_the_selection(world, stopped_run, uninterrupted, tmp_path):
    "Otherwise the run would quietly choose among fewer checkpoints than the uninterrupted one."
    facts, files = uninterrupted["dpo_catto"]
    folder = shutil.copytree(stopped_run, tmp_path / "run")
    truncate(folder / "checkpoints" / "checkpoint-4" / "model.safetensors")
    assert steady(run(world, folder, "dpo_catto")[1]) == steady(facts)
    assert_same(left_behind(folder), files)


def test_the_seed_decides_everything(world, uninterrupted, tmp_path):
    np.random.seed(7), torch.manual_seed(7)  # what else the process has drawn does not matter
    run(world, tmp_path / "again", "dpo_catto")
    assert_same(left_behind(tmp_path / "again"), uninterrupted["dpo_catto"][1])
    run(world, tmp_path / "sft", "sft", seed=1)
    run(world, tmp_path / "catto", "dpo_catto", seed=1)
    name = "predictions_validation.parquet"
    assert left_behind(tmp_path / "sft")[name] != uninterrupted["sft"][1][name]
    assert left_behind(tmp_path / "catto")[name] != uninterrupted["dpo_catto"][1][name]


@pytest.mark.parametrize("every_pair", [True, False])
def test_the_seed_draws_the_pairs_and_their_order(world, tmp_path, every_pair):
    "The order also where all pairs are taken, so that the draw does not hide it."
    quick, rows, validation, base = world
    method = "dpo" if every_pair else "dpo_catto"
    drawn, first = {}, {}
    for seed in (0, 1):
        trainer = train._preference_trainer(quick, method, rows["dpo_catto"], seed, tmp_path, load_model(base), validation)
        drawn[seed] = sorted(trainer.train_dataset["prompt"])
        transformers.set_seed(3)  # the order comes from the trainer's own arguments
        first[seed] = next(iter(trainer.get_train_dataloader()))["input_ids"].tolist()
    assert len(drawn[0]) == (40 if every_pair else 24) and (drawn[0] == drawn[1]) == every_pair
    assert first[0] != first[1]


def test_what_a_run_reports(uninterrupted):
    facts, files = uninterrupted["dpo_catto"]
    assert {Path(name).stem for name in files if name.startswith("model/")} <= {
        "model", "config", "generation_config", "tokenizer", "tokenizer_config", "special_tokens_map", "chat_template"}
    assert facts["rows"] == 24 and facts["rows_left_out"] == 0 and facts["steps"] == 12
    assert list(facts["validation_accuracy"]) == [4, 8, 12]
    best = max(facts["validation_accuracy"].values())
    assert facts["best_step"] == min(step for step, a in facts["validation_accuracy"].items() if a == best)


# --- bad input ----------------------------------------------------------------------------------------------------------

def test_unknown_method_and_missing_base(world, tmp_path):
    quick, rows, validation, base = world
    with pytest.raises(ValueError, match=f"unknown method 'ppo': accepted are {', '.join(METHODS)}"):
        train_method(quick, rows["sft"], "ppo", 0, folder=tmp_path, validation=validation)
    with pytest.raises(ValueError, match="'dpo' starts from a trained model: give base=<the folder of sft>"):
        train_method(quick, rows["dpo_catto"], "dpo", 0, folder=tmp_path, validation=validation)
    with pytest.raises(ValueError, match="'rcft' starts from a trained model: give base=<the folder of dpo>"):
        train_method(quick, rows["sft"], "rcft", 0, folder=tmp_path, validation=validation)
    with pytest.raises(ValueError, match="'sft_ts' is not trained: it is sft with a temperature"):
        train_method(quick, rows["sft"], "sft_ts", 0, folder=tmp_path, validation=validation, base=base)
    with pytest.raises(FileNotFoundError, match="model folder .*nowhere' does not exist"):
        train_method(quick, rows["dpo_catto"], "dpo", 0, folder=tmp_path, validation=validation, base=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_too_small_a_context(world, tmp_path):
    quick, rows, validation, base = world
    quick = dataclasses.replace(quick, context_tokens=16)
    for method in ("sft", "dpo_catto"):
        with pytest.raises(ValueError, match="no row fits into context_tokens = 16"):
            run((quick, rows, validation, base), tmp_path, method)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("log", [False, True], ids=["TRL's own step", "with calibration logged"])
def test_logging_calibration_trains_the_same_model(make, log):
    "dpo and dpo_matched are trained with `log_calibration`: what is measured must not move the weights."
    ends = []
    for cls, options in ((DPOTrainer, {}), (CATTOTrainer, {"calibration_weight": 0.0, "log_calibration": log})):
        trainer = make(cls, max_steps=3, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, logging_steps=1, sharp=5, **options)
        start = weights(trainer.model)
        trainer.train()
        ends.append(weights(trainer.model))
        logged = {key for row in trainer.state.log_history for key in row if key.startswith("calibration/")}
    assert largest_difference(*ends) < 1e-6 < 1e-3 < largest_difference(start, ends[0])
    assert len(logged) == (4 if log else 0)


@pytest.mark.parametrize("wrong, message", [
    (dict(calibration_form="huber"), "calibration_form = 'huber': accepted are linear, l1, bce, brier"),
    (dict(calibration_tokens="some"), "calibration_tokens = 'some': accepted are all, label"),
    (dict(calibration_weight=-0.1), "calibration_weight = -0.1"),
    (dict(calibration_weight=math.nan), "calibration_weight = nan"),
    (dict(calibration_weight=math.inf), "calibration_weight = inf"),
    (dict(reward_calibration_weight=-1.0), "reward_calibration_weight = -1.0"),
    (dict(reward_calibration_weight=math.inf), "reward_calibration_weight = inf"),
    (dict(surrogate_scale=0.0), "surrogate_scale = 0.0"),
    (dict(surrogate_scale=math.inf), "surrogate_scale = inf"),
    (dict(reward_goal=0.0), "reward_goal = 0.0"),
    (dict(reward_goal=math.nan), "reward_goal = nan"),
    (dict(answer_prefix=""), "answer_prefix = ''"),
])
def test_config_refuses(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        CATTOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **wrong)


@pytest.mark.parametrize("config", [DPOConfig, None])
def test_another_config_is_refused_before_the_reference_runs(tmp_path, settings, tokenizer, config):
    reference = build_model(settings, tokenizer, 1)
    passes = calls_of(reference)
    args = config and config(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", precompute_ref_log_probs=True)
    with pytest.raises(TypeError, match=f"CATTOTrainer takes a CATTOConfig, not a {type(args).__name__}"):
        CATTOTrainer(model=build_model(settings, tokenizer, 0), ref_model=reference, args=args, train_dataset=pairs(),
                     processing_class=tokenizer)
    assert not passes, "the reference model ran before the configuration was checked"


def test_sizes_of_the_mini_model(settings, tokenizer):
    with pytest.raises(ValueError, match="multiple of attention_heads"):
        build_model(dataclasses.replace(settings, attention_heads=3), tokenizer, 0)
    state = torch.get_rng_state()
    one, same, other = (weights(build_model(settings, tokenizer, seed)) for seed in (5, 5, 6))
    assert largest_difference(one, same) == 0 < largest_difference(one, other)
    assert torch.equal(state, torch.get_rng_state())  # no other random number in the process is touched
