"""Data of one's own: a file of questions becomes prompts, pairs, a trained model and a report; preference rows of a TRL user, plain or as messages."""
import copy
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset

from catto.data import (RehearsalTeacher, build_preferences, check_leakage, check_tokenizer, format_prompt, format_response, label_token,
                        load_questions, prompt_lengths, read_questions, system_prompt, validate_questions)
from catto.eval import calibration_report, load_model, plot_reliability, predict, reliability_curve
from catto.settings import load
from catto.train import CATTOConfig, CATTOTrainer, build_model, build_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TEAMS = ["billing", "delivery", "repair"]
WORDS = dict(role="expert in customer support", description="select the team that should answer", annotation="Ticket", options=TEAMS, task="tickets")
LINES = [{"prompt": f"Ticket number {i}: the {('invoice', 'parcel', 'screen')[i % 3]}, once more.", "label": TEAMS[i % 3]} for i in range(60)]


@pytest.fixture
def write(tmp_path):
    "write(lines) -> path of a .jsonl file with them; a line may be text."
    def write(lines):
        path = tmp_path / "tickets.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
        return path
    return write


@pytest.fixture(scope="module")
def folder(tmp_path_factory, repo):
    "A folder with a small random model and a tokenizer that knows the words of the tickets, as a user may have one."
    small = load("smoke", file=repo / "settings.ini", hidden_size=16, hidden_layers=1, attention_heads=2, key_value_heads=1, mlp_size=32)
    question = {"prompt": "Ticket number 0123456789: the invoice parcel screen, once more.", "choices": [], **WORDS}
    texts = [format_prompt({**question, "options": TEAMS})] + [format_response("It speaks of it.", team) for team in TEAMS]
    tokenizer = build_tokenizer(texts * 50, 1000)
    folder = tmp_path_factory.mktemp("own") / "model"
    build_model(small, tokenizer, 0).save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


def config(tmp_path, **options):
    return CATTOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no",
                       gradient_checkpointing=False, dataloader_pin_memory=False, learning_rate=1e-2, max_length=256,
                       **{"calibration_tokens": "label", "calibration_form": "bce", "per_device_train_batch_size": 8, **options})


# ---------------------------------------------------------------- the file


def test_a_question_carries_the_words_of_its_prompt(write):
    questions = read_questions(write(LINES), **WORDS)
    text = format_prompt(questions[0])
    assert text.startswith("You are an expert in customer support.\nGiven a prompt and 3 choices (billing, delivery, repair), select the team that should answer.")
    assert text.endswith("\nTicket: Ticket number 0: the invoice, once more.\n") and text.startswith(system_prompt(questions[0]))
    assert validate_questions(questions) is questions and len(questions) == 60 == len(set(questions["id"]))
    saved = Dataset.from_parquet(str(write_parquet(questions, write([]).parent)))
    assert [format_prompt(q) for q in saved] == [format_prompt(q) for q in questions]  # the words travel with the rows


def write_parquet(rows, folder):
    rows.to_parquet(str(folder / "questions.parquet"))
    return folder / "questions.parquet"


def test_contents_decide_the_split_where_the_file_does_not(write):
    one, other = read_questions(write(LINES), **WORDS), read_questions(write(LINES[::-1]), **WORDS)
    assert dict(zip(one["prompt"], one["split"])) == dict(zip(other["prompt"], other["split"]))
    shares = [one["split"].count(split) / 60 for split in ("train", "validation", "test")]
    assert np.abs(np.subtract(shares, [0.6, 0.2, 0.2])).max() < 0.2
    parts = [one.filter(lambda q: q["split"] == split) for split in ("train", "validation", "test")]
    assert check_leakage(parts[0], [*parts[1], *parts[2]]) == len(parts[1]) + len(parts[2])
    own = read_questions(write([{**line, "split": ("train", "test")[i % 2]} for i, line in enumerate(LINES)]), **WORDS)
    assert own["split"][:4] == ["train", "test"] * 2


def test_letters_with_texts_of_their_own_on_each_line(write):
    lines = [{"prompt": "Which is larger?", "options": ["A", "B"], "choices": ["sea", "pond"], "label": "A", "id": 5, "part": "size"}]
    question = read_questions(write(lines), **{**WORDS, "options": None})[0]
    assert format_prompt(question).endswith("Ticket: Which is larger?\nA: sea\nB: pond\n") and question["id"] == "5"


@pytest.mark.parametrize("line, message", [
    ("{broken", "line 61: Expecting property name.*; a JSON object with the fields prompt, label, options, choices, id, split is accepted"),
    ("[1, 2]", "line 61: it is of type list; a JSON object with the fields prompt, label, options, choices, id, split is accepted"),
    ({"text": "Where?", "label": "billing"}, "line 61: field 'prompt' is missing; there are text, label"),
    ({"prompt": "Where?", "label": None}, "line 61: field 'label' is missing"),
    ({"prompt": 7, "label": "billing"}, "line 61: field prompt is of type int; text is accepted"),
    ({"prompt": "Where?", "label": "Billing"}, r"line 61: label 'Billing' is not among the options \['billing', 'delivery', 'repair'\]"),
    ({"prompt": " ", "label": "billing"}, "line 61: empty prompt"),
    ({"prompt": "a\x00b", "label": "billing"}, "line 61: field 'prompt': control character"),
    ({"prompt": "say <answer> A", "label": "billing"}, "line 61: field 'prompt': reserved tag"),
    ({"prompt": "Where?", "label": "billing", "options": "billing"}, "line 61: field options is of type str; a list of texts is accepted"),
    ({"prompt": "Where?", "label": "billing", "options": ["billing"]}, r"line 61: 1 option\(s\); at least 2 are needed"),
    ({"prompt": "Where?", "label": "A", "options": ["A", "B"], "choices": ["sea"]}, "line 61: 1 choices for 2 options"),
    ({"prompt": "Where?", "label": "U.S.", "options": ["U.S.", "U.K."]}, "line 61: field 'options': 'U.S.' cannot be read back"),
    ({"prompt": "Where?", "label": "billing", "split": "dev"}, "line 61: field 'split' is 'dev'; accepted are train, validation, test"),
    ({**LINES[4], "prompt": LINES[4]["prompt"].upper()}, "line 61: the question of line 5 again; each question is accepted once"),
    ({"prompt": "Where?", "label": "billing", "id": []}, "line 61: field id is of type list; text is accepted"),
])
def test_a_line_that_is_wrong_is_named_with_its_field(write, line, message):
    with pytest.raises(ValueError, match=rf"^tickets.jsonl: 1 of 61 lines cannot be used: {message}"):
        read_questions(write([*LINES, line]), **WORDS)


def test_fields_that_are_not_read_are_named(write, capsys):
    read_questions(write(LINES), **WORDS)
    assert "not read" not in capsys.readouterr().out
    read_questions(write([*LINES, {"prompt": "Where?", "label": "billing", "spilt": "test", "colour": "red"}]), **WORDS)
    assert "tickets.jsonl: fields that are not read: colour, spilt; read are prompt, label, options, choices, id, split" in capsys.readouterr().out


def test_a_file_without_questions_is_named(write):
    with pytest.raises(ValueError, match="^tickets.jsonl has no questions: a JSON object on each line is accepted"):
        read_questions(write([""]), **WORDS)


def test_no_pairs_says_what_the_responses_lacked():
    questions = load_questions("snli", split="train", n=3)
    with pytest.raises(ValueError, match="no preference rows from 3 questions: 3 have fewer than 1 correct responses, 0 fewer than 3 incorrect ones; "
                                         "6 of 12 responses have no valid label in their <answer>"):
        build_preferences(questions, [["so"] * 2 + [f"<answer> {next(o for o in q['options'] if o != q['label'])} </answer>"] * 2 for q in questions])


@pytest.mark.parametrize("rows, message", [
    ({"prompt": ["a"], "choosen": ["b"], "rejected": ["c"]}, "train rows lack chosen: their columns are prompt, choosen, rejected; accepted are prompt, chosen and rejected"),
    ({"prompt": ["a"], "label": ["b"]}, "train rows lack chosen and rejected: their columns are prompt, label")])
def test_rows_without_a_pair_are_named(folder, tmp_path, rows, message):
    model, tokenizer = load_model(folder)
    with pytest.raises(ValueError, match=message):
        CATTOTrainer(model=model, args=config(tmp_path), train_dataset=Dataset.from_dict(rows), processing_class=tokenizer)


def test_a_model_folder_that_is_not_there_is_named_by_the_trainer_too(tmp_path):
    with pytest.raises(FileNotFoundError, match="model folder './nowhere/model' does not exist"):
        CATTOTrainer(model="./nowhere/model", args=config(tmp_path), train_dataset=Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}))


def test_all_wrong_lines_are_counted_and_three_are_told(write, tmp_path):
    lines = [line if i % 10 else {"prompt": line["prompt"]} for i, line in enumerate(LINES)]
    with pytest.raises(ValueError, match="^tickets.jsonl: 6 of 60 lines cannot be used: line 1: .*; line 11: .*; line 21: [^;]*; there are prompt$"):
        read_questions(write(lines), **WORDS)
    path = write(LINES[:2])
    path.write_bytes(path.read_bytes().replace(b"parcel", b"par\xffcel"))
    with pytest.raises(ValueError, match="line 2: field 'prompt': control character"):
        read_questions(path, **WORDS)
    with pytest.raises(FileNotFoundError, match="file of questions .* does not exist"):
        read_questions(tmp_path / "none.jsonl", **WORDS)
    with pytest.raises(ValueError, match="description = '': a text is accepted"):
        read_questions(path, **{**WORDS, "description": ""})


# ---------------------------------------------------------------- from rows to a report


def test_ten_lines_from_a_file_to_a_report_and_a_diagram(write, folder, tmp_path):
    questions = read_questions(write(LINES), **WORDS)
    train, test = (questions.filter(lambda q: q["split"] == split) for split in ("train", "test"))
    model, tokenizer = load_model(folder)
    teacher = RehearsalTeacher()  # a random model writes no answers to choose from
    pairs, counts = build_preferences(train, [[teacher.respond(q, k) for k in range(8)] for q in train], min_incorrect=1)
    assert counts["kept"] > 10 and set(pairs["label"]) == set(TEAMS)
    before = predict(model, tokenizer, test, max_new_tokens=4)
    CATTOTrainer(model=model, args=config(tmp_path, max_steps=4), train_dataset=pairs, processing_class=tokenizer).train()
    rows = predict(model, tokenizer, test, max_new_tokens=4)
    report = calibration_report(rows["confidence"], rows["correct"], parsed=rows["parsed"])
    top, bottom = plot_reliability(reliability_curve(rows["confidence"], rows["correct"]))
    assert rows["id"] == test["id"] and set(rows["predicted"]) <= set(TEAMS) and set(rows["task"]) == {"tickets"}
    assert rows["confidence"] != before["confidence"]
    assert report["n"] == len(test) and report["accuracy"] == np.mean(rows["correct"]) and report["parse_rate"] == np.mean(rows["parsed"])
    assert top.get_ylabel() == "Accuracy" and bottom.get_xlabel() == "Confidence"
    plt.close(top.figure)


def test_prompts_of_own_questions_are_measured_and_their_labels_checked(write, folder):
    _, tokenizer = load_model(folder)
    questions = read_questions(write(LINES), **WORDS)
    assert prompt_lengths(tokenizer, questions, 256, 40)["same text back"] == 60
    assert list(check_tokenizer(tokenizer, {"tickets": TEAMS})) == ["tickets"]
    with pytest.raises(ValueError, match="labels 'billing' and 'billings' start with the same token"):
        check_tokenizer(tokenizer, {"tickets": ["billing", "billings"]})
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="the tokenizer has no pad token: set tokenizer.pad_token"):
        check_tokenizer(tokenizer, {"tickets": TEAMS})
    with pytest.raises(ValueError, match="the tokenizer has no pad token: set tokenizer.pad_token"):
        predict(*load_model(folder)[:1], tokenizer, questions)


# ---------------------------------------------------------------- preference rows of a TRL user

KEEPS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
DROPS = KEEPS.replace("m['content']", "m['content'].split('</think>')[-1]")


def preferences(form, n=8):
    rows = [{"prompt": f"Ticket number {i}, once more.\n", "chosen": format_response("It speaks of it.", TEAMS[i % 3]),
             "rejected": format_response("It speaks.", TEAMS[(i + 1) % 3])} for i in range(n)]
    return rows if form == "standard" else [
        {"prompt": [{"role": "user", "content": r["prompt"]}], **{side: [{"role": "assistant", "content": r[side]}] for side in ("chosen", "rejected")}}
        for r in rows]


@pytest.fixture
def trainer(write, folder, tmp_path):
    "trainer(form) -> a CATTOTrainer on preference rows read from a file, as a TRL user has it."
    def trainer(form, template=KEEPS, streaming=False, **options):
        model, tokenizer = load_model(folder)
        tokenizer.chat_template = template
        path = write(preferences(form))
        rows = load_dataset("json", data_files=str(path), split="train", streaming=streaming, cache_dir=str(tmp_path / "cache"))
        return CATTOTrainer(model=model, args=config(tmp_path, **{"max_steps": 2, **options}), train_dataset=rows, processing_class=tokenizer)
    return trainer


@pytest.mark.parametrize("form", ["standard", "conversational"])
def test_rows_of_both_forms_train_and_calibrate_their_label_tokens(trainer, form):
    made = trainer(form)
    tokenizer = made.processing_class
    for i, row in enumerate(made.train_dataset):
        for side, label in (("chosen", TEAMS[i % 3]), ("rejected", TEAMS[(i + 1) % 3])):
            ids = row[f"{side}_ids"]
            assert tokenizer.decode(ids).startswith("<think> It speaks") and tokenizer.decode(ids).endswith("</answer><|end|>")
            assert tokenizer.decode([ids[label_token(ids, tokenizer)]]).strip() == label
    assert tokenizer.decode(made.train_dataset[0]["prompt_ids"]).endswith("[assistant]" if form == "conversational" else "once more.\n")
    before = copy.deepcopy(made.model.state_dict())
    made.train()
    assert any(not torch.equal(before[name], value) for name, value in made.model.state_dict().items())
    assert any("calibration/loss" in entry for entry in made.state.log_history) or made._metrics["train"]["calibration/loss"]


@pytest.mark.parametrize("tokens", ["all", "label"])
def test_a_template_that_drops_the_thinking_part_is_refused_with_the_row(trainer, tokens):
    with pytest.raises(ValueError, match="train row 0: the chat template drops the thinking part of the chosen response.*give the rows as plain text"):
        trainer("conversational", DROPS, calibration_tokens=tokens)
    made = trainer("conversational", DROPS, streaming=True, calibration_tokens=tokens)
    with pytest.raises(ValueError, match="train row 0: the chat template drops the thinking part"):
        made.train()
    trainer("standard", DROPS, calibration_tokens=tokens)  # plain text passes through no template


def test_another_form_of_answer_has_its_own_prefix(write, folder, tmp_path):
    model, tokenizer = load_model(folder)
    rows = [{**row, **{side: row[side].replace("<answer> ", "Team: ").replace(" </answer>", "") for side in ("chosen", "rejected")}}
            for row in preferences("standard")]
    made = CATTOTrainer(model=model, args=config(tmp_path, answer_prefix="Team:"), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    ids = made.train_dataset[0]["chosen_ids"]
    assert tokenizer.decode(ids[label_token(ids, tokenizer, "Team:"):]).lstrip().startswith(("billing", "b"))
    with pytest.raises(ValueError, match="no train response contains '<answer>': there is no label token to calibrate"):
        CATTOTrainer(model=model, args=config(tmp_path), train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
