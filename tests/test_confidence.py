"""Candidate pools: sampled, saved, damaged and read again; and choices whose probability is known on paper."""
import json

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset

from catto.confidence import RULES, confidence_at_k, pool_methods, read_pool, rule_difference, sample_pool, score_pool, score_pools
from catto.data import prepare_data
from catto.methods import METHODS, Run, grid
from catto.settings import load, run_folder
from catto.train import build_model, mini_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = "commonsense_qa"


# --- choices

def sampled_pool(pi, n, size, seed=0):
    "Candidates drawn from `pi` over labels 0..V-1 and ranked by their own probability, the true label being 0."
    answer = np.random.default_rng(seed).choice(len(pi), p=pi, size=n * size)
    return pd.DataFrame({"id": np.repeat(np.arange(n), size), "candidate": np.tile(np.arange(size), n), "predicted": answer, "label": 0,
                         "confidence": np.asarray(pi)[answer], "correct": answer == 0, "parsed": True})


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_own_probability_tends_to_greedy(k):
    # Sorted from small to large with running sum F, label j is kept with probability F_j^k - F_{j-1}^k.
    pi = np.array([0.1, 0.15, 0.3, 0.45])
    expected = np.diff(np.concatenate([[0], pi.cumsum()]) ** k)
    rows = confidence_at_k(sampled_pool(pi, 3000, 8), k)
    share = np.bincount(rows["predicted"], minlength=4) / len(rows)
    assert np.abs(share - expected).max() < 4 * 0.5 / np.sqrt(len(rows))


def test_votes_have_their_binomial_chance():
    # Two labels, three voters: right with probability p^3 + 3 p^2 (1 - p). With two voters, a tie is a coin toss: p again.
    p, n = 0.7, 4000
    pool = sampled_pool([p, 1 - p], n, 6)
    for k, expected in ((3, p**3 + 3 * p**2 * (1 - p)), (2, p)):
        rows = confidence_at_k(pool, k, "majority")
        assert abs(rows["correct"].mean() - expected) < 4 * 0.5 / np.sqrt(len(rows)), k
    passed = confidence_at_k(pool, 6, "pass")["correct"].mean()
    assert abs(passed - (1 - (1 - p) ** 6)) < 4 * 0.5 / np.sqrt(n)


def test_random_has_the_accuracy_of_one_sample_at_every_k():
    pool = sampled_pool([0.4, 0.6], 400, 8)
    pool["parsed"] = np.random.default_rng(1).random(len(pool)) < 0.7  # random does not look at this either
    alone = (pool["correct"] & pool["parsed"]).mean()
    drawn = [confidence_at_k(pool, 8, "random", seed=s)["correct"].mean() for s in range(60)]
    assert len(set(drawn)) > 10
    assert abs(np.mean(drawn) - alone) < 4 * 0.5 / np.sqrt(400 * 60)


def test_the_seed_breaks_ties_and_nothing_else():
    pool = sampled_pool([0.4, 0.6], 200, 4)
    one, other = (confidence_at_k(pool, 4, seed=s) for s in (0, 1))
    assert (one["candidate"] != other["candidate"]).any()
    pd.testing.assert_series_equal(one["confidence"], other["confidence"])
    pd.testing.assert_frame_equal(one, confidence_at_k(pool, 4, seed=0))


def test_a_longer_pool_keeps_the_first_choices():
    pool = sampled_pool([0.4, 0.6], 100, 8)
    first = confidence_at_k(pool[pool["candidate"] < 4], 4)
    nested = confidence_at_k(pool, 4).query("block == 0").reset_index(drop=True)
    pd.testing.assert_frame_equal(first, nested)


@pytest.mark.parametrize("change", [
    lambda p: p.sample(frac=1, random_state=3), lambda p: Dataset.from_pandas(p), lambda p: p.assign(correct=p["correct"].astype(int)),
    lambda p: p.assign(predicted=p["predicted"].map("ABCD".__getitem__)), lambda p: p.astype({"parsed": "boolean", "confidence": "float32"}),
    lambda p: p.set_index(np.arange(len(p))[::-1])], ids=["shuffled", "Dataset", "0 and 1", "letters", "other dtypes", "index"])
def test_the_same_table_in_another_form(change):
    pool = sampled_pool([0.1, 0.2, 0.3, 0.4], 50, 4).assign(mean_log_prob=-1.0, p_correct=0.5)
    for rule in RULES:
        a, b = confidence_at_k(pool, 4, rule), confidence_at_k(change(pool), 4, rule)
        assert a["candidate"].tolist() == b["candidate"].tolist(), rule
        assert a["correct"].tolist() == b["correct"].tolist(), rule


def test_all_unparsed():
    pool = sampled_pool([0.5, 0.5], 20, 4).assign(parsed=False, mean_log_prob=-1.0, confidence=np.nan)
    for rule in RULES:
        rows = confidence_at_k(pool.assign(p_correct=1.0), 4, rule)
        assert not rows["correct"].any() and not rows["parsed"].any() and rows["predicted"].isna().all(), rule
    table = score_pool(pool, (1, 4))
    assert (table["accuracy"] == 0).all() and (table["unparsed"] == 1).all() and table["oracle_error"].isna().all()


def test_a_label_at_confidence_zero_still_beats_no_label():
    pool = pd.DataFrame([{"id": i, "candidate": j, "predicted": "A", "confidence": 0.0, "correct": True, "parsed": j == 1}
                         for i in range(30) for j in range(3)])
    for rule in ("confidence", "majority", "weighted_vote", "pass"):
        assert confidence_at_k(pool, 3, rule)["candidate"].eq(1).all(), rule


def test_silent_candidates_do_not_vote_together():
    # Three without a label, one for A: the fallback wrote the same letter for all three.
    pool = pd.DataFrame([{"id": 0, "candidate": j, "predicted": "B" if j < 3 else "A", "confidence": 0.9 - 0.2 * j, "correct": j < 3,
                          "parsed": j == 3} for j in range(4)])
    for rule in ("confidence", "majority", "weighted_vote"):
        rows = confidence_at_k(pool, 4, rule)
        assert rows["predicted"].tolist() == ["A"] and not rows["correct"].any(), rule


def test_weights_that_differ_by_rounding_are_a_tie():
    # 0.1 + 0.2 > 0.3 in floating point.
    rows = [{"id": i, "candidate": j, "predicted": label, "confidence": c, "correct": label == "A", "parsed": True}
            for i in range(300) for j, (label, c) in enumerate((("A", 0.1), ("A", 0.2), ("B", 0.3)))]
    share = confidence_at_k(pd.DataFrame(rows), 3, "weighted_vote")["correct"].mean()
    assert abs(share - 2 / 3) < 4 * 0.5 / np.sqrt(300)  # uniform among the three tied candidates


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "4", None, 5])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=r"k is"):
        confidence_at_k(sampled_pool([0.5, 0.5], 3, 4), k)


def test_difference_of_a_rule_to_itself_and_its_sign():
    pools = [sampled_pool([0.3, 0.7], 150, 4, seed=s) for s in (0, 1)]
    assert rule_difference(pools, 4, "majority", "majority")[:3] == (0, 0, 0)
    there, back = rule_difference(pools, 4, "pass", "random"), rule_difference(pools, 4, "random", "pass")
    assert there.mean == -back.mean and there.low > 0 > back.high and there.n == 150
    by_hand = np.mean([confidence_at_k(p, 4, "pass")["correct"].mean() - confidence_at_k(p, 4, "random")["correct"].mean() for p in pools])
    assert there.mean == pytest.approx(by_hand)


def test_questions_that_pools_share_are_drawn_once():
    "Five pools of the same questions teach no more than one; five pools of other questions do."
    one = sampled_pool([0.3, 0.7], 150, 4, seed=0)
    others = [one.assign(id=one["id"].astype(str) + f"-{i}") for i in range(5)]
    width = lambda pools: (d := rule_difference(pools, 4, "majority", "random")).high - d.low
    assert width([one] * 5) == pytest.approx(width(one)) and width(others) < 0.6 * width(one)
    few = rule_difference([sampled_pool([0.3, 0.7], 2, 4, seed=s).assign(id=[f"{s}-{i}" for i in (0, 1) for _ in range(4)]) for s in (0, 1)], 4, "pass", "random")
    assert few.n == 4 and np.isfinite(few).all()


# --- pools on the disk

@pytest.fixture(scope="module")
def settings(repo):
    return load("smoke", file=repo / "settings.ini", hidden_size=16, hidden_layers=1, attention_heads=2, key_value_heads=1, mlp_size=32,
                test_questions=10, validation_questions=10, train_questions=60, preference_questions=40, max_new_tokens=6, candidates=3,
                candidate_counts="1 3", methods="sft dpo sft_ts", ood_task="")


@pytest.fixture
def root(settings, tmp_path):
    "Data, and two methods with a model that was never trained; the second learning rate of dpo has the lower validation ECE."
    prepare_data(settings, TASK, 0, tmp_path)
    tokenizer = mini_tokenizer(settings)
    for number, run in enumerate([Run("sft"), *grid(settings, TASK, "dpo")]):
        folder = run_folder(tmp_path, settings, TASK, 0, run.name)
        build_model(settings, tokenizer, seed=number).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        facts = {"outputs": {"model": run.name}, "validation_ece": 0.3 - 0.1 * number, "temperature": 1.5, "diverged": False}
        (folder / "train.json").write_text(json.dumps(facts))
    return tmp_path


def pool_file(settings, root, run="sft"):
    return run_folder(root, settings, TASK, 0, run) / "pool_test.parquet"


def test_a_pool_is_sampled_once(settings, root, capsys):
    first = sample_pool(settings, TASK, 0, "sft", root)
    rows = pd.read_parquet(pool_file(settings, root))
    assert len(rows) == first["n"] * 3 == 30 and set(rows["candidate"]) == {0, 1, 2}
    assert first["unparsed"] == pytest.approx((~rows["parsed"]).mean())
    assert set(rows["temperature"]) == {1.5} and set(rows["trained_on"]) == {TASK} and set(rows["method"]) == {"sft"}
    assert rows.groupby("id")["text"].nunique().max() > 1, "the candidates of a question are all the same"
    stamp = pool_file(settings, root).stat().st_mtime_ns
    assert sample_pool(settings, TASK, 0, "sft", root) == first
    assert pool_file(settings, root).stat().st_mtime_ns == stamp

    pool_file(settings, root).write_bytes(pool_file(settings, root).read_bytes()[:-40])
    sample_pool(settings, TASK, 0, "sft", root)
    assert "pool_test.parquet of sft is missing or damaged" in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_parquet(pool_file(settings, root)), rows)


def test_another_temperature_makes_another_pool(settings, root):
    sample_pool(settings, TASK, 0, "sft", root)
    trained = run_folder(root, settings, TASK, 0, "sft") / "train.json"
    trained.write_text(json.dumps(json.loads(trained.read_text()) | {"temperature": 0.5}))
    sample_pool(settings, TASK, 0, "sft", root)
    assert set(pd.read_parquet(pool_file(settings, root))["temperature"]) == {0.5}


def test_the_pool_is_that_of_the_chosen_run(settings, root):
    best = grid(settings, TASK, "dpo")[1]
    sample_pool(settings, TASK, 0, "dpo", root)
    assert pool_file(settings, root, best.name).exists() and not pool_file(settings, root, "dpo").exists()
    rows = read_pool(settings, TASK, 0, "dpo", root)
    assert set(rows["learning_rate"]) == {dict(best.changes)["preference_learning_rate"]} and set(rows["method"]) == {"dpo"}
    assert "text" not in rows


def test_a_stop_before_the_manifest_leaves_no_pool_that_counts(settings, root, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(pd.DataFrame, "to_parquet", full_disk)
    with pytest.raises(OSError, match="disk is full"):
        sample_pool(settings, TASK, 0, "sft", root)
    with pytest.raises(FileNotFoundError, match="sft of commonsense_qa, seed 0, has no pool yet"):
        read_pool(settings, TASK, 0, "sft", root)


def test_a_run_that_diverged(settings, root):
    old = run_folder(root, settings, TASK, 0, "dpo") / "pool_test.parquet"
    old.write_text("of an earlier training")
    for run in grid(settings, TASK, "dpo"):
        folder = run_folder(root, settings, TASK, 0, run.name)
        (folder / "train.json").write_text(json.dumps({"outputs": {}, "diverged": True}))
    assert sample_pool(settings, TASK, 0, "dpo", root)["diverged"] and not old.exists()
    sample_pool(settings, TASK, 0, "sft", root)
    assert read_pool(settings, TASK, 0, "dpo", root) is None
    table = score_pools(settings, root)
    dpo, sft = (table[table["method"] == m] for m in ("dpo", "sft"))
    assert dpo["diverged"].all() and dpo["accuracy"].isna().all() and (dpo["n"] == 0).all() and set(dpo["k"]) == {1, 3}
    assert not sft["diverged"].any() and (sft["n"] == 10).all() and sft["accuracy"].notna().all()
    assert set(table["method"]) == {"sft", "dpo"}  # sft_ts has no pool


def test_scores_are_those_of_the_files(settings, root):
    for method in ("sft", "dpo"):
        sample_pool(settings, TASK, 0, method, root)
    table = score_pools(settings, root)
    rows = read_pool(settings, TASK, 0, "sft", root)
    one = table[(table["method"] == "sft") & (table["k"] == 1)]
    assert set(one["rule"]) == set(RULES) and set(one["accuracy"]) == {(rows["correct"] & rows["parsed"]).mean()}
    assert one["unparsed"].iloc[0] == (~rows["parsed"]).mean()


def test_what_has_no_pool(settings, root):
    for method in (m for m, facts in METHODS.items() if facts.kind == "scaled"):
        with pytest.raises(ValueError, match=f"{method} has no model of its own"):
            sample_pool(settings, TASK, 0, method, root)
    with pytest.raises(ValueError, match="unknown method 'dqo'"):
        sample_pool(settings, TASK, 0, "dqo", root)
    with pytest.raises(FileNotFoundError, match="not trained"):
        sample_pool(settings, TASK, 0, "rcft", root)
    with pytest.raises(FileNotFoundError, match="has no pool yet"):
        score_pools(settings, root)
    assert pool_methods(METHODS) == [m for m in METHODS if not m.startswith("sft_ts")]
