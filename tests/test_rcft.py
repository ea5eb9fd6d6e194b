"""Label smoothing and RCFT on small random models: what they take from TRL, what they add to its loss, and what survives a stop."""
import dataclasses
import inspect
import json
import warnings

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import TrainerState
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from catto import rcft
from catto.data import ANSWER_PREFIX, SamplingTeacher, build_sft, load_questions
from catto.rcft import RCFTConfig, RCFTTrainer, SmoothedSFTConfig, SmoothedSFTTrainer, greedy_calibration
from catto.settings import load
from catto.train import build_model, mini_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = "A", "B", "C", "D", "E"
RIGHT = np.array([9, 9, 8, 7, 6, 5, 4, 3, 2, 1])  # of ten answers in each bin, against the confidence


@pytest.fixture(scope="module")
def settings(repo):
    small = dict(hidden_size=16, hidden_layers=1, attention_heads=2, key_value_heads=1, mlp_size=32)
    return load("smoke", file=repo / "settings.ini", **small)


@pytest.fixture(scope="module")
def tokenizer(settings):
    return mini_tokenizer(settings)


def rows(n=16, options=lambda i: LABELS[: 2 + i % 4]):
    "SFT rows whose prompts and responses differ in length and whose options differ in number."
    return Dataset.from_list([{
        "prompt": f"Question {'a b ' * (i % 3)}: which?\n", "options": list(options(i)),
        "completion": f"<think>{' so' * (i % 5)}</think>\n{ANSWER_PREFIX} {LABELS[i % 2]} </answer>"} for i in range(n)])


def every_bin(model):
    "A calibration set with these answers."
    return np.repeat(np.arange(10) / 10 + 0.05, 10), (np.arange(10) < RIGHT[:, None]).ravel()


def of_the_weights(model):
    "A calibration whose accuracies depend on the weights."
    share = float(model.get_input_embeddings().weight.double().sum().sin() ** 2)
    return np.repeat(np.arange(10) / 10 + 0.05, 100), np.tile(np.arange(100) < 100 * share, 10)


@pytest.fixture
def make(tmp_path, settings, tokenizer):
    "make(class, ...) -> a trainer of a sharp random model."

    def make(cls, data=None, seed=0, trainer=None, **options):
        config = {SFTTrainer: SFTConfig, SmoothedSFTTrainer: SmoothedSFTConfig, RCFTTrainer: RCFTConfig}[cls]
        arguments = dict(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
                         per_device_train_batch_size=4, learning_rate=1e-2, max_length=256, gradient_checkpointing=False,
                         dataloader_pin_memory=False, num_train_epochs=1, logging_steps=1)
        model = build_model(settings, tokenizer, seed)
        model.get_input_embeddings().weight.data.mul_(20)  # tied: it is the head too
        given = dict(processing_class=tokenizer) | (dict(calibration=every_bin) if cls is RCFTTrainer else {}) | (trainer or {})
        made = cls(model=model, args=config(**arguments | options), train_dataset=rows() if data is None else data, **given)
        made.remove_callback(PrinterCallback)
        return made

    return make


def batch_of(trainer, places=range(4)):
    return trainer.data_collator([trainer.train_dataset[i] for i in places])


def loss_of(trainer, batch=None, **kwargs):
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, dict(batch_of(trainer) if batch is None else batch), **kwargs)


def trained(trainer, **kwargs):
    trainer.train(**kwargs)
    return torch.cat([w.detach().flatten() for w in trainer.model.parameters()])


def plain_logits(trainer, batch):
    with torch.no_grad():
        return trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# --- what is taken from TRL and transformers

def spied(trainer, lowered=0.0):
    "How TRL's own `compute_loss` calls the model it is given, and the loss when its log-probabilities are lower."
    calls = []

    def policy(**kwargs):
        calls.append(kwargs)
        output = trainer.model(**kwargs)
        output.log_probs = output.log_probs - lowered * output.label_mask
        return output

    with torch.no_grad():
        return calls, SFTTrainer.compute_loss(trainer, policy, dict(batch_of(trainer)))


INTERNALS = {  # name of what catto.rcft uses -> is it as expected in a TRL trainer
    "SFTTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)": lambda t:
        list(inspect.signature(SFTTrainer.compute_loss).parameters) == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "one call of its `model`, with fused_lm_head=True and labels": lambda t:
        [(c["fused_lm_head"], torch.equal(c["labels"], batch_of(t)["labels"])) for c in spied(t)[0]] == [(True, True)],
    "the loss is minus the mean of the answer's log_probs": lambda t: torch.isclose(spied(t, 0.5)[1], spied(t)[1] + 0.5),
    "FusedCausalLMOutput.log_probs, entropy, is_top1, label_mask": lambda t:
        {"log_probs", "entropy", "is_top1", "label_mask"} <= {f.name for f in dataclasses.fields(FusedCausalLMOutput)},
    "SFTTrainer._prepare_dataset(...)": lambda t: list(inspect.signature(SFTTrainer._prepare_dataset).parameters)
        == ["self", "dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"],
    "a prepared row has input_ids and labels, -100 in the prompt, and keeps its other columns": lambda t:
        {"input_ids", "labels", "completion", "options"} <= set(t.train_dataset.column_names) and t.train_dataset[0]["labels"][0] == -100,
    "_set_signature_columns_if_needed sets the list _signature_columns": lambda t:
        (t._set_signature_columns_if_needed(), isinstance(t._signature_columns, list))[1],
    "_metrics['train'] and ['eval'], lists by name": lambda t: all(t._metrics[mode]["any name"] == [] for mode in ("train", "eval")),
    "_tokenizer": lambda t: t._tokenizer is t.processing_class,
    "an attention mask in the batch": lambda t: batch_of(t)["attention_mask"].shape == batch_of(t)["input_ids"].shape,
    "current_gradient_accumulation_steps": lambda t: "current_gradient_accumulation_steps" in inspect.getsource(SFTTrainer.compute_loss),
    "accelerator.gather_for_metrics": lambda t: t.accelerator.gather_for_metrics(torch.tensor(2.0)) == 2,
    "TrainerState.stateful_callbacks, a dict": lambda t: t.state.stateful_callbacks.setdefault("any name", []) == [],
    "the head of catto.fused": lambda t: callable(rcft.add_calibrated_head),
}


@pytest.mark.parametrize("name", INTERNALS)
def test_internals_of_trl(make, name):
    assert INTERNALS[name](make(SFTTrainer)), f"catto.rcft relies on {name}, which has changed"


def test_the_state_is_kept_by_a_checkpoint_as_it_is(tmp_path):
    state = TrainerState()
    state.stateful_callbacks["RCFT"] = [{"epoch": 0, "accuracy": [None, 1 / 3]}]
    state.save_to_json(str(tmp_path / "state.json"))
    assert TrainerState.load_from_json(str(tmp_path / "state.json")).stateful_callbacks["RCFT"] == state.stateful_callbacks["RCFT"]


def test_epochs_begin_with_their_number(make):
    seen = []

    class Note(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            seen.append(state.epoch)

    trainer = make(SFTTrainer, rows(7), num_train_epochs=3, gradient_accumulation_steps=2, per_device_train_batch_size=1)
    trainer.add_callback(Note())
    trainer.train()
    assert [int(epoch) for epoch in seen] == seen == [0, 1, 2]


# --- label smoothing

def naive_smoothing(trainer, batch, epsilon):
    logits, labels = plain_logits(trainer, batch)[:, :-1].double(), batch["labels"][:, 1:]
    logits, labels = logits[labels != -100], labels[labels != -100]
    target = (1 - epsilon) * torch.nn.functional.one_hot(labels, logits.shape[-1]) + epsilon / logits.shape[-1]
    return -(target * logits.log_softmax(-1)).sum(-1).mean().item()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
def test_smoothing_is_the_definition(make, epsilon, fused):
    trainer = make(SmoothedSFTTrainer, label_smoothing=epsilon, use_fused_head=fused)
    assert loss_of(trainer).item() == pytest.approx(naive_smoothing(trainer, batch_of(trainer), epsilon), rel=1e-5)


def test_smoothing_trains_as_trls_own_in_half_the_passes(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        stock = make(SFTTrainer, label_smoothing_factor=0.1)
    ours, plain = make(SmoothedSFTTrainer, label_smoothing=0.1), make(SmoothedSFTTrainer)
    with rcft._hidden_states(stock.model) as two, rcft._hidden_states(ours.model) as one:
        a, b = trained(stock), trained(ours)
    assert (len(one), len(two)) == (4, 8)
    assert (a - b).abs().max() < 2e-4 and (trained(plain) - b).abs().max() > 2e-3


def test_plain_sft_is_trls_own(make):
    stock = trained(make(SFTTrainer))
    assert torch.equal(trained(make(SmoothedSFTTrainer, use_fused_head=False)), stock)
    assert 0 < (trained(make(SmoothedSFTTrainer)) - stock).abs().max() < 2e-4


def test_smoothing_does_not_depend_on_how_a_step_is_split(make):
    one = trained(make(SmoothedSFTTrainer, label_smoothing=0.2))
    parts = trained(make(SmoothedSFTTrainer, label_smoothing=0.2, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    assert (one - parts).abs().max() < 2e-4


# --- the penalty

def naive_distributions(trainer, batch, tokenizer, data):
    "q over the options, from the logits of every position, one row at a time."
    for logits, ids, options in zip(plain_logits(trainer, batch).double(), batch["input_ids"].tolist(), data["options"]):
        answer = max(i for i, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids(ANSWER_PREFIX))
        yield logits[answer][[tokenizer.encode(" " + option)[0] for option in options]].softmax(0)


def naive_bin(q):
    return int(np.ceil(10 * q.max().item())) - 1


def naive_penalty(trainer, batch, tokenizer, data):
    total = []
    for q in naive_distributions(trainer, batch, tokenizer, data):
        a = RIGHT[naive_bin(q)] / 10
        target = torch.tensor([a if k == int(q.argmax()) else (1 - a) / (len(q) - 1) for k in range(len(q))])
        total.append(((q - target) ** 2).sum().item())
    return np.mean(total)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_loss_is_sft_plus_the_squared_distance(make, tokenizer, weight, fused):
    trainer, plain = make(RCFTTrainer, rcft_weight=weight, use_fused_head=fused), make(SmoothedSFTTrainer, use_fused_head=fused)
    batch = batch_of(trainer)
    penalty = naive_penalty(trainer, batch, tokenizer, rows())
    assert penalty > 0.05
    assert (loss_of(trainer) - loss_of(plain)).item() == pytest.approx(weight * penalty, rel=1e-4)


def test_one_pass(make):
    trainer = make(RCFTTrainer, label_smoothing=0.1)
    trainer.estimate()
    with rcft._hidden_states(trainer.model) as states:
        loss_of(trainer)
    assert len(states) == 1


def test_padding_on_either_side_does_not_matter(make):
    trainer = make(RCFTTrainer)
    alone = batch_of(trainer, [0])
    tokens = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    left, right = ({**alone, **{k: torch.nn.functional.pad(alone[k], sides, value=v) for k, v in tokens.items()}} for sides in ((3, 0), (0, 3)))
    assert left["attention_mask"][0, 0] == 0 and left["label_place"].equal(alone["label_place"])
    assert loss_of(trainer, right).item() == pytest.approx(loss_of(trainer, alone).item(), rel=1e-5)
    place, ids, mask = left["label_place"], left["option_ids"], left["attention_mask"]
    with torch.no_grad(), rcft._hidden_states(trainer.model) as states:
        for one in (alone, left):
            positions = (one["attention_mask"].cumsum(-1) - 1).clamp(min=0)
            trainer.model(input_ids=one["input_ids"], attention_mask=one["attention_mask"], position_ids=positions)
        a, b = (trainer._penalty(h, m, place, ids) for h, m in zip(states, (alone["attention_mask"], mask)))
    assert b.item() == pytest.approx(a.item(), rel=1e-4) and a > 1e-3


def test_the_penalty_does_not_depend_on_how_a_step_is_split(make):
    one = trained(make(RCFTTrainer, rcft_weight=5.0))
    parts = trained(make(RCFTTrainer, rcft_weight=5.0, per_device_train_batch_size=1, gradient_accumulation_steps=4))
    assert (one - parts).abs().max() < 5e-4
    assert (one - trained(make(RCFTTrainer, rcft_weight=1.25))).abs().max() > 5e-3  # as if it were divided by the steps twice


@pytest.mark.parametrize("fused", [True, False])
def test_weight_0_is_plain_sft_to_the_last_bit(make, fused):
    options = dict(num_train_epochs=2, use_fused_head=fused)
    plain = trained(make(SmoothedSFTTrainer, **options))
    assert torch.equal(plain, trained(make(RCFTTrainer, rcft_weight=0.0, trainer=dict(calibration=None), **options)))
    assert not torch.equal(plain, trained(make(RCFTTrainer, **options)))


def test_rows_without_label_or_target_have_no_penalty(make, capsys):
    data = rows(4).to_list()
    data[1]["completion"] = "<think> so </think> I do not know"
    trainer = make(RCFTTrainer, Dataset.from_list(data))
    assert "1 of 4 train responses name none of their options" in capsys.readouterr().out
    assert trainer.train_dataset["label_place"][1] == -1
    all_rows, without = batch_of(trainer), batch_of(trainer, [0, 2, 3])
    trainer.estimate()
    penalties = []
    for batch in (all_rows, without, batch_of(trainer, [1])):
        with torch.no_grad(), rcft._hidden_states(trainer.model) as states:
            trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        penalties.append(trainer._penalty(states[0], *(batch[k] for k in ("attention_mask", "label_place", "option_ids"))).item())
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-4) and penalties[2] == 0
    empty = make(RCFTTrainer, trainer=dict(calibration=lambda model: (np.array([0.01]), np.array([1]))))  # no q is so small
    assert loss_of(empty).item() == loss_of(make(SmoothedSFTTrainer)).item()
    assert empty._metrics["train"]["rcft/without_target"] == [1.0]


def test_a_label_set_for_all_rows(make):
    same = rows(options=lambda i: LABELS)
    one, other = make(RCFTTrainer, same), make(RCFTTrainer, same.remove_columns("options"), options=list(LABELS))
    assert loss_of(one).item() == loss_of(other).item()


@pytest.mark.parametrize("options, error, words", [
    (dict(trainer=dict(calibration=None)), TypeError, "calibration must be a function"),
    (dict(data=rows().remove_columns("options")), ValueError, "give options"),
    (dict(data=rows(options=lambda i: ["no", "yes"])), ValueError, "there is nothing to calibrate"),
    (dict(data=rows(options=lambda i: ["A", "A"])), ValueError, "there is nothing to calibrate"),
    (dict(data=rows().to_iterable_dataset(), max_steps=2), TypeError, "RCFT takes a Dataset"),
])
def test_what_cannot_be_calibrated_is_refused(make, options, error, words):
    with pytest.raises(error, match=words):
        make(RCFTTrainer, **options)


def test_a_label_that_would_be_cut_off_is_refused(make):
    trainer = make(RCFTTrainer)
    longest, place = max((len(row["input_ids"]), row["label_place"]) for row in trainer.train_dataset)
    make(RCFTTrainer, max_length=longest)
    with pytest.raises(ValueError, match=f"max_length = {place} cuts the label off a train response"):
        make(RCFTTrainer, max_length=place)


def test_a_calibration_that_is_no_calibration_is_refused(make):
    with pytest.raises(ValueError, match="confidence"):
        make(RCFTTrainer, trainer=dict(calibration=lambda model: (np.array([1.5]), np.array([1])))).train()


# --- the E-step in a run

def test_an_e_step_before_every_epoch(make):
    modes, steps = [], []
    trainer = make(RCFTTrainer, num_train_epochs=3)

    def calibration(model):
        modes.append((model.training, torch.is_grad_enabled()))
        steps.append(trainer.state.global_step)
        return of_the_weights(model)

    trainer.calibration = calibration
    trainer.train()
    assert steps == [0, 4, 8] and set(modes) == {(False, False)} and trainer.model.training
    assert [record["epoch"] for record in trainer.estimates] == [0, 1, 2]
    assert len({tuple(record["accuracy"]) for record in trainer.estimates}) > 1
    assert {"rcft/penalty", "rcft/confidence", "rcft/without_target"} <= set(trainer.state.log_history[0])


def test_bins_stay_those_of_the_e_step_through_an_epoch(make, tokenizer):
    trainer, noted, used = make(RCFTTrainer, num_train_epochs=2), [], []

    def calibration(model):
        noted.append([naive_bin(q) for q in naive_distributions(trainer, batch_of(trainer, range(16)), tokenizer, rows())])
        return every_bin(model)

    def noted_bins(row, original=trainer._noted_bins):
        used.append((len(noted) - 1, row.tolist(), original(row).tolist()))
        return original(row)

    trainer.calibration, trainer._noted_bins = calibration, noted_bins
    trainer.train()
    assert all(bins == [noted[epoch][i] for i in row] for epoch, row, bins in used)
    assert [sorted(i for epoch, row, _ in used if epoch == e for i in row) for e in (0, 1)] == [list(range(16))] * 2
    assert noted[0] != noted[1]  # while the confidences leave them
    assert trainer.estimates[1]["bins"] == noted[1] and "bins" not in trainer.estimates[0]


def test_the_loss_takes_the_noted_bins_in_training_alone(make):
    trainer, plain = make(RCFTTrainer), loss_of(make(SmoothedSFTTrainer)).item()
    before = loss_of(trainer).item()
    trainer._bins.fill_(-1)
    assert loss_of(trainer).item() == pytest.approx(plain, rel=1e-6) and before > plain + 0.05
    trainer.model.eval()
    assert loss_of(trainer).item() == pytest.approx(before, rel=1e-6)


def test_a_row_without_label_has_no_bin(make):
    data = rows(6).to_list()
    data[1]["completion"] = "<think> so </think> I do not know"
    trainer = make(RCFTTrainer, Dataset.from_list(data), per_device_eval_batch_size=1)  # so a batch without any label comes too
    trainer.estimate()
    assert [b < 0 for b in trainer.estimates[0]["bins"]] == [i == 1 for i in range(6)]


@pytest.mark.parametrize("stop", [4, 6], ids=["between epochs", "within an epoch"])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(make, tmp_path, stop):
    options = dict(num_train_epochs=3, save_strategy="steps", save_steps=2, trainer=dict(calibration=of_the_weights), rcft_weight=5.0)
    whole = make(RCFTTrainer, **options)
    weights, estimates = trained(whole), whole.estimates
    checkpoint = tmp_path / "out" / f"checkpoint-{stop}"
    calls = []
    again = make(RCFTTrainer, seed=1, **options | dict(trainer=dict(calibration=lambda model: calls.append(1) or of_the_weights(model))))
    assert torch.equal(trained(again, resume_from_checkpoint=str(checkpoint)), weights)
    assert again.estimates == estimates and len(calls) == (2 if stop == 4 else 1)
    # and the saved estimate is what makes it so: measured again in the middle of an epoch, it is another
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["stateful_callbacks"]["RCFT"] = []
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    forgetful = make(RCFTTrainer, seed=1, **options)
    forgot = trained(forgetful, resume_from_checkpoint=str(checkpoint))
    assert forgetful.estimates[0]["step"] == stop
    assert torch.equal(forgot, weights) == (stop == 4)


def test_evaluation_has_the_penalty_too(make):
    trainer = make(RCFTTrainer, trainer=dict(eval_dataset=rows(8), calibration=every_bin), per_device_eval_batch_size=8)
    plain = make(SmoothedSFTTrainer, trainer=dict(eval_dataset=rows(8)), per_device_eval_batch_size=8)
    first, second = trainer.evaluate(), plain.evaluate()
    assert first["eval_loss"] - second["eval_loss"] == pytest.approx(first["eval_rcft/penalty"], rel=1e-3)


def test_lora(make):
    lora = LoraConfig(target_modules=["q_proj"], r=2)
    trainer = make(RCFTTrainer, trainer=dict(peft_config=lora, calibration=every_bin), label_smoothing=0.1)
    plain = make(RCFTTrainer, label_smoothing=0.1)
    assert loss_of(trainer).item() == pytest.approx(loss_of(plain).item(), rel=1e-5)  # an untrained adapter changes nothing
    head = trainer.model.get_base_model().lm_head.weight.clone()
    trainer.train()
    assert torch.equal(trainer.model.get_base_model().lm_head.weight, head) and len(trainer.estimates) == 1


def test_questions_of_the_mini_world(make, settings, tokenizer):
    questions = load_questions("snli", split="train", n=12)
    teacher = SamplingTeacher()
    data, _ = build_sft(questions, [teacher.respond(question, 0, temperature=0.1) for question in questions])
    calibration = greedy_calibration(load_questions("snli", split="validation", n=6), tokenizer, 3, 8)
    trainer = make(RCFTTrainer, data, options=sorted(questions[0]["options"]), trainer=dict(calibration=calibration),
                   max_length=settings.context_tokens)
    assert (torch.tensor(trainer.train_dataset["label_place"]) > 0).all()
    assert {tuple(ids) for ids in trainer.train_dataset["option_ids"]} == {
        tuple(tokenizer.encode(" " + option)[0] for option in sorted(questions[0]["options"]))}
    trainer.train()
    assert sum(trainer.estimates[0]["count"]) == 6
