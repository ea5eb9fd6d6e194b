"""What the calibrated head costs on a GPU: checks, kernels, head, whole training steps, and the hours they add up to.

    make bench-gpu                                      # the real sizes; writes data/bench_gpu.csv
    python scripts/bench_gpu.py --tiny --device cpu     # toy sizes on a CPU, to see that the script runs; prints

Everything is timed in one process, methods in turn and round after round, so that what drifts drifts for all. A row of the
result is section, case, method, quantity, value, unit, note.
"""
import argparse
import contextlib
import copy
import functools
import gc
import itertools
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # the tree this script is part of, whether or not it is installed

from catto.plan import QWEN3_4B, TRAIN_QUESTIONS, training_hours  # imports no torch

COLUMNS = "section", "case", "method", "quantity", "value", "unit", "note"
PACKAGES = "torch", "triton", "transformers", "trl", "peft", "accelerate", "datasets"


@dataclass(frozen=True)
class Sizes:
    "What is run; one for a GPU, one to try the script."
    heads: dict        # name: (tokens N, hidden size H, vocabulary V)
    chunks: tuple      # tokens of a chunk, for the kernels alone
    ceiling: int       # side of the square matrices of the ceiling
    copied: int        # bytes copied to see the memory's speed
    model: dict        # fields of Qwen3Config
    tokens: int        # of a sequence, prompt and response
    prompt: int        # of these, the prompt's
    pairs: int         # of a step
    rank: int          # of LoRA
    rounds: int        # in which everything but training is timed
    runs: int          # of training, of each method
    steps: int         # of a training run, the first not counted


FULL = Sizes(
    heads={"small": (1024, 1024, 32_000), "middle": (2048, 2560, 151_936), "qwen3_4b": (4096, 2560, 151_936)},
    chunks=(768, 4096), ceiling=8192, copied=2**32,
    model=dict(**QWEN3_4B, max_position_embeddings=4096),
    tokens=2048, prompt=256, pairs=2, rank=16, rounds=5, runs=3, steps=5)
TINY = Sizes(
    heads={"small": (3, 8, 50), "middle": (3, 16, 300), "qwen3_4b": (4, 16, 300)}, chunks=(2,), ceiling=64, copied=2**16,
    model=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
               intermediate_size=64, vocab_size=300, tie_word_embeddings=True, max_position_embeddings=64),
    tokens=12, prompt=6, pairs=2, rank=2, rounds=1, runs=1, steps=2)


# --- measuring

class Clock:
    "Seconds and bytes on one device."

    def __init__(self, device):
        self.device, self.cuda = device, device.type == "cuda"

    def now(self):
        "Seconds, once everything asked of the device is done."
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def allocated(self):
        "Bytes that tensors hold now; None where the device does not say."
        return torch.cuda.memory_allocated(self.device) if self.cuda else None

    def forget_peak(self):
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self):
        "Most bytes held since `forget_peak`."
        return torch.cuda.max_memory_allocated(self.device) if self.cuda else None

    def run(self, work):
        "(seconds, bytes beyond those held before) of one call."
        self.forget_peak()
        before, start = self.allocated(), self.now()
        work()
        seconds = self.now() - start
        return seconds, None if before is None else self.peak() - before

    def in_turn(self, works, rounds):
        "(median seconds, largest extra bytes) of each name's work; every round runs all of them, after one round to warm up."
        runs = {name: [] for name in works}
        for number in range(rounds + 1):
            for name, work in works.items():
                run = self.run(work)
                if number:
                    runs[name].append(run)
        return {name: (statistics.median(s for s, _ in done), largest(b for _, b in done)) for name, done in runs.items()}


def again(work, times):
    "The work so many times over."
    return lambda: [work() for _ in range(times)] and None


def largest(values):
    "The largest, or None when the device tells none."
    known = [value for value in values if value is not None]
    return max(known) if known else None


class Rows(list):
    "The result, row by row; printed as it comes, because a long run may be cut off."

    def add(self, section, case, method, quantity, value, unit, note=""):
        self.append((section, case, method, quantity, value, unit, note))
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{section:9} {case:28} {method:22} {quantity:24} {shown} {unit}", flush=True)

    def cost(self, section, case, method, seconds, extra):
        self.add(section, case, method, "time", 1e3 * seconds, "ms")
        if extra is not None:
            self.add(section, case, method, "extra_peak_memory", extra / 2**30, "GiB")


@contextlib.contextmanager
def row_work(by):
    "Inside, catto.fused does its row work by `triton` or by `torch`."
    before = triton_head.available
    if by == "torch":
        triton_head.available = lambda device=None: False
    try:
        yield
    finally:
        triton_head.available = before


# --- machine and ceiling

def describe_machine(rows, device):
    "Names and versions, as rows."
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows.add("machine", "", "", "device", name, "")
    rows.add("machine", "", "", "cuda", torch.version.cuda or "none", "")
    for package in PACKAGES:
        try:
            rows.add("machine", "", "", package, version(package), "")
        except PackageNotFoundError:
            rows.add("machine", "", "", package, "none", "")
    rows.add("machine", "", "", "row_work", "triton" if triton_head.available(device) else "torch", "")


def measure_ceiling(rows, sizes, clock, dtype):
    "(FLOP/s of a large square matrix product, bytes/s of a copy) on this device, now."
    a, b = (torch.randn(sizes.ceiling, sizes.ceiling, device=clock.device, dtype=dtype) for _ in range(2))
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    done = clock.in_turn({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 2 * sizes.rounds)
    flops, bandwidth = 2 * sizes.ceiling**3 / done["product"][0], 2 * sizes.copied / done["copy"][0]
    rows.add("ceiling", f"{sizes.ceiling}^3", "matmul", "rate", flops / 1e12, "TFLOP/s", str(dtype))
    rows.add("ceiling", f"{sizes.copied} bytes", "copy", "rate", bandwidth / 1e9, "GB/s", "read + written")
    return flops, bandwidth


# --- equality, before anything is timed

def check_equality(rows, sizes, device):
    "Triton against PyTorch on this device, on fresh inputs; AssertionError where they differ."
    if not triton_head.available(device):
        print("no Triton here: its equality with PyTorch is not checked")
        return
    generator = torch.Generator(device).manual_seed(0)
    vocab = max(v for _, _, v in sizes.heads.values())
    for dtype, tolerance in (torch.float32, 1e-5), (torch.bfloat16, 2**-6):
        for v in (vocab, vocab - 13):  # the second is a multiple of nothing
            logits = (8 * torch.randn(33, v, device=device, generator=generator)).to(dtype)
            labels = torch.randint(v, (33,), device=device, generator=generator)
            factors = [torch.randn(33, device=device, generator=generator) for _ in range(3)]
            ours, theirs = (module.row_statistics(logits, labels) for module in (triton_head, fused))
            assert torch.equal(ours[3], theirs[3]), "the competitors differ"
            worst = max(difference(x, y) for x, y in zip(ours[:3], theirs[:3]))
            # PyTorch's entropy is the difference of two large numbers, so it gets more room.
            extras = [module.row_extras(logits, ours[0].float())[:3] for module in (triton_head, fused)]
            metrics = max(difference(x, y) for x, y in zip(*extras))
            slope = difference(*(module.logits_gradient_(logits.clone(), labels, ours[0], ours[3], *factors)
                                 for module in (triton_head, fused)))
            case = f"{str(dtype)[6:]}, V = {v}"
            for quantity, value, limit in ("statistics", worst, 1e-5), ("metrics", metrics, 1e-3), ("gradient", slope, tolerance):
                rows.add("equality", case, "triton", f"{quantity}_difference", value, "", f"at most {limit:.1g} passes")
                assert value <= limit, f"{quantity} of {case}: Triton and PyTorch differ by {value}"
    check_whole_head(rows, sizes, device, generator)


def difference(x, y):
    "Largest difference, relative where the numbers are above 1."
    return ((x.double() - y.double()).abs() / y.double().abs().clamp(min=1)).max().item()


def check_whole_head(rows, sizes, device, generator):
    "The same of hidden and weight gradients through catto.fused, in float32."
    n, width, vocab = sizes.heads["small"]
    # Divided so that the logits are of size 1, whatever the width.
    inputs = [torch.randn(*shape, device=device, generator=generator) / width**0.25 for shape in ((n, width), (vocab, width))]
    labels, gradients = torch.randint(vocab, (n,), device=device, generator=generator), []
    mix = torch.randn(3, n, device=device, generator=generator)
    for by in ("triton", "torch"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        with row_work(by):
            (torch.stack(tuple(fused.calibrated_log_probs(leaves[0], leaves[1], labels))) * mix).sum().backward()
        gradients.append([x.grad for x in leaves])
    for name, ours, theirs in zip(("hidden", "weight"), *gradients):
        value = difference(ours, theirs)
        rows.add("equality", "head, float32", "triton", f"{name}_gradient_difference", value, "", "at most 1e-4 passes")
        assert value <= 1e-4, f"gradient of {name}: Triton and PyTorch differ by {value}"


# --- the kernels alone

def measure_kernels(rows, sizes, clock, dtype, bandwidth):
    "Time of each pass, and its share of the memory's speed; then other block sizes, which tune nothing by themselves."
    if not triton_head.available(clock.device):
        return
    vocab = sizes.heads["qwen3_4b"][2]
    shipped = triton_head.BLOCK, triton_head.WARPS, triton_head.STAGES
    others = [(1024, 4, 3), (4096, 8, 3), (4096, 16, 2), (2048, 4, 3), (2048, 8, 1)]
    for n, settings in itertools.product(sizes.chunks, [shipped, *others] if clock.cuda else [shipped]):
        logits = torch.randn(n, vocab, device=clock.device).to(dtype)
        labels = torch.randint(vocab, (n,), device=clock.device)
        triton_head.BLOCK, triton_head.WARPS, triton_head.STAGES = settings
        lse, _, _, index = triton_head.row_statistics(logits, labels)
        zero = torch.zeros_like(lse, dtype=torch.float32)
        # The gradient is written over the logits, so each run reads what the last one wrote: as many bytes.
        works = {"row_statistics": lambda: triton_head.row_statistics(logits, labels),
                 "row_extras": lambda: triton_head.row_extras(logits, lse),
                 "logits_gradient_": lambda: triton_head.logits_gradient_(logits, labels, lse, index, zero + 1, zero, zero)}
        case = f"{n} rows, block {settings[0]}, warps {settings[1]}, stages {settings[2]}"
        repeats = 20 if clock.cuda else 1  # a pass is short beside the wait for the device
        for name, (seconds, _) in clock.in_turn({k: again(w, repeats) for k, w in works.items()}, sizes.rounds).items():
            seconds, moved = seconds / repeats, logits.numel() * logits.element_size() * (2 if name == "logits_gradient_" else 1)
            rows.add("kernel", case, name, "time", 1e3 * seconds, "ms", "as shipped" if settings == shipped else "")
            rows.add("kernel", case, name, "share_of_copy_speed", moved / seconds / bandwidth, "")
    triton_head.BLOCK, triton_head.WARPS, triton_head.STAGES = shipped


# --- the head alone

METRICS = "entropy", "mean_logits", "is_top1"  # what TRL's DPO trainer asks of its head


def head_works(hidden, weight, labels, weight_trained, dtype):
    "One forward and backward of each method, by name."
    mix = torch.randn(4, len(labels), device=hidden.device)

    def step(forward):
        def work():
            leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_(weight_trained)
            outputs = forward(*leaves)
            sum((out.float() * m).sum() for out, m in zip(outputs, mix)).backward()
        return work

    def ours(extras):
        return lambda h, w: fused.calibrated_head(h, w, labels, extras=extras)[0]

    def on(kernels, work):
        def run():
            with row_work(kernels):  # around the backward too
                work()
        return run

    def trl(extras):
        def forward(h, w):
            return ChunkedLogProbFunction.apply(h, w, None, labels, 1.0, 32768, None, 1.0, ("log_probs", *extras))[:1]
        return forward

    forwards = {"fused_torch": ours(()), "straightforward": lambda h, w: token_probs(h @ w.t(), labels),
                "trl": trl(()), "trl_with_metrics": trl(METRICS)}
    if triton_head.available(hidden.device):
        forwards = {"fused_triton": ours(()), "fused_triton_with_metrics": ours(METRICS)} | forwards
    else:
        forwards["fused_torch_with_metrics"] = ours(METRICS)
    works = {name: step(forward) for name, forward in forwards.items()}
    return {name: on(name.split("_")[1], work) if name.startswith("fused") else work for name, work in works.items()}


def measure_heads(rows, sizes, clock, dtype, flops):
    "Forward and backward at each size, with the head trained (full fine-tuning) and frozen (LoRA)."
    for (size, (n, width, vocab)), trained in itertools.product(sizes.heads.items(), (True, False)):
        hidden = torch.randn(n, width, device=clock.device).to(dtype)
        weight = (torch.randn(vocab, width, device=clock.device) / width**0.5).to(dtype)
        labels = torch.randint(vocab, (n,), device=clock.device)
        done = clock.in_turn(head_works(hidden, weight, labels, trained, dtype), sizes.rounds)
        case = f"{size}, head {'trained' if trained else 'frozen'}"
        for method, (seconds, extra) in done.items():
            rows.cost("head", case, method, seconds, extra)
            products = 3 if trained else 2  # project, and back to what is trained; a method may do more, none does less
            rows.add("head", case, method, "share_of_ceiling", products * 2 * n * width * vocab / seconds / flops, "",
                     f"of {products} products")
        for metrics in ("", "_with_metrics"):
            best = next(done[name] for name in (f"fused_triton{metrics}", f"fused_torch{metrics}") if name in done)
            rows.add("head", case, f"fused{metrics}", "time_over_trl", best[0] / done[f"trl{metrics}"][0], "")


# --- whole steps

@functools.cache
def word_tokenizer(vocab):
    "One token a word, `t0` to the last, so that a text's length is known and every id occurs."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = {f"t{i}": i for i in range(vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", pad_token="t1", eos_token="t2")


def random_rows(sizes, number):
    "Preference rows of random words, each side `tokens` long with its prompt and the end token; SFT rows the same."
    from datasets import Dataset
    generator = torch.Generator().manual_seed(0)

    def text(count):
        ids = torch.randint(3, sizes.model["vocab_size"], (count,), generator=generator).tolist()
        return "".join(f" t{i}" for i in ids)

    answer = sizes.tokens - sizes.prompt - 1
    rows = [{"prompt": text(sizes.prompt), "chosen": text(answer) + " ", "rejected": text(answer) + " "} for _ in range(number)]
    return Dataset.from_list(rows), Dataset.from_list([{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows])


def base_model(sizes, clock, dtype):
    "A Qwen3 model of the given shapes with random weights, made on the device."
    from transformers import Qwen3Config, Qwen3ForCausalLM
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(clock.device):
            model = Qwen3ForCausalLM(Qwen3Config(**sizes.model, bos_token_id=None, pad_token_id=1, eos_token_id=2))
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def twin(model):
    "The same frozen weights in a module of its own, which a trainer may patch."
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def trainer_of(method, model, sizes, clock, dtype, folder):
    "A trainer of TRL's or ours, all with the same LoRA, rows and arguments."
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from catto.train import CATTOConfig, CATTOTrainer
    # The paper names neither rank nor layers; these are common choices.
    lora = LoraConfig(r=sizes.rank, lora_alpha=2 * sizes.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    shared = dict(
        output_dir=folder, max_steps=sizes.steps, per_device_train_batch_size=sizes.pairs, max_length=sizes.tokens,
        gradient_checkpointing=True, bf16=clock.cuda and dtype == torch.bfloat16, use_cpu=not clock.cuda, learning_rate=5e-6,
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=clock.cuda, seed=0)
    classes = {"sft": (SFTTrainer, SFTConfig, {}), "trl_dpo": (DPOTrainer, DPOConfig, {}),
               "catto_fused": (CATTOTrainer, CATTOConfig, {"use_fused_head": True}),
               "catto_reference": (CATTOTrainer, CATTOConfig, {"use_fused_head": False})}
    trainer, config, own = classes[method]
    pairs, single = random_rows(sizes, sizes.pairs * sizes.steps)
    return trainer(model=twin(model), args=config(**shared, **own), train_dataset=single if method == "sft" else pairs,
                   processing_class=word_tokenizer(sizes.model["vocab_size"]), peft_config=lora)


def give_reference(trainer):
    "Stand-ins for the reference log-probs that training computes once beforehand, so that a step holds what a real one holds."
    rows = trainer.train_dataset
    for side in ("ref_chosen_logps", "ref_rejected_logps"):
        rows = rows.add_column(side, [-100.0] * len(rows))
    trainer.train_dataset, trainer.precompute_ref_logps = rows, True


def step_timer(clock, steps):
    "A callback that appends (seconds, peak bytes) of every step to `steps`."
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock.forget_peak()
            self.start = clock.now()

        def on_step_end(self, args, state, control, **kwargs):
            steps.append((clock.now() - self.start, clock.peak()))

    return Timer()


def run_steps(method, model, sizes, clock, dtype):
    "(seconds of a step, peak bytes, reference seconds of a step's pairs) of one short training run, its first step left out."
    from transformers import PrinterCallback
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(method, model, sizes, clock, dtype, folder)
        steps, reference = [], None
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(step_timer(clock, steps))
        if method != "sft":
            give_reference(trainer)
        trainer.train()
        if method == "trl_dpo":
            batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
            work = lambda: trainer.compute_ref_log_probs(trainer.model, batch)
            work()
            reference = clock.run(work)[0]
    return statistics.median(s for s, _ in steps[1:]), largest(b for _, b in steps[1:]), reference


def flops_of_step(sizes):
    """Floating-point operations that a step with LoRA and checkpointing asks of matrix products.

    2 per weight and token forward, 2 for the recomputation, 2 backward into the activations, none for frozen weights; attention
    twice as much backward, and half of it masked; the head projected once and brought back once, for the response alone."""
    m, sequences = sizes.model, 2 * sizes.pairs
    heads = m["num_attention_heads"] * m["head_dim"]
    keys = m["num_key_value_heads"] * m["head_dim"]
    layer = m["hidden_size"] * (2 * heads + 2 * keys + 3 * m["intermediate_size"])
    tokens = sequences * sizes.tokens
    dense = 6 * layer * tokens * m["num_hidden_layers"]
    attention = 4 * (4 * heads * sizes.tokens / 2) * tokens * m["num_hidden_layers"]
    head = 4 * m["hidden_size"] * m["vocab_size"] * sequences * (sizes.tokens - sizes.prompt)
    return dense + attention + head


def measure_steps(rows, sizes, clock, dtype, flops):
    "Whole training steps in turn; (seconds of a step, seconds of the reference) by method."
    model, methods = base_model(sizes, clock, dtype), ["trl_dpo", "catto_fused", "catto_reference", "sft"]
    runs = {method: [] for method in methods}
    rows.add("step", "model", "", "parameters", model.num_parameters(), "")
    for _, method in itertools.product(range(sizes.runs), methods):
        if runs[method] is None:
            continue
        try:
            runs[method].append(run_steps(method, model, sizes, clock, dtype))
        except torch.OutOfMemoryError:
            runs[method] = None
        gc.collect()
        if clock.cuda:
            torch.cuda.empty_cache()
    case = f"{sizes.pairs} pairs x {sizes.tokens} tokens"
    return summarise_steps(rows, case, runs, sizes, flops)


def summarise_steps(rows, case, runs, sizes, flops):
    "Rows of the measured steps; (seconds of a step, seconds of the reference) by method."
    seconds, reference = {}, None
    for method, done in runs.items():
        if done is None:
            rows.add("step", case, method, "time", "out of memory", "")
            continue
        seconds[method] = statistics.median(s for s, _, _ in done)
        tokens = sizes.pairs * sizes.tokens * (1 if method == "sft" else 2)
        rows.add("step", case, method, "time", 1e3 * seconds[method], "ms")
        rows.add("step", case, method, "throughput", tokens / seconds[method], "tokens/s")
        peak = largest(b for _, b, _ in done)
        if peak is not None:
            rows.add("step", case, method, "peak_memory", peak / 2**30, "GiB")
        if method != "sft":
            rows.add("step", case, method, "share_of_ceiling", flops_of_step(sizes) / seconds[method] / flops, "")
        if method != "sft" and runs["trl_dpo"]:
            rows.add("step", case, method, "time_over_trl", seconds[method] / seconds["trl_dpo"], "")
            if peak is not None:
                rows.add("step", case, method, "peak_over_trl", peak / largest(b for _, b, _ in runs["trl_dpo"]), "")
        if method == "trl_dpo":
            reference = statistics.median(r for _, _, r in done)
            rows.add("step", case, "reference pass", "time", 1e3 * reference, "ms")
    return seconds, reference


# --- hours

def add_hours(rows, seconds, reference, sizes, cap):
    """Hours of training at the measured pace: each row of Table 12, and every run of the paper profile.

    Every sequence counts as full, and every training question as one row and one pair, up to `cap`: the paper states the
    number of pairs for DPO + CATTO alone. Decoding for validation and test is not in it."""
    from catto.settings import load
    from catto.methods import METHODS, grid
    settings = load("paper", file=REPO / "settings.ini")
    if missing := {"sft", "trl_dpo", "catto_fused"} - set(seconds):
        print(f"no hours without the steps of {', '.join(sorted(missing))}")
        return
    pace = {"sft": seconds["sft"] / sizes.pairs, "dpo": seconds["trl_dpo"] / sizes.pairs,
            "catto": seconds["catto_fused"] / sizes.pairs, "reference": reference / sizes.pairs}
    upper = lambda task: min(cap, TRAIN_QUESTIONS[task]) if cap else TRAIN_QUESTIONS[task]

    def add(section, case, method, count, epochs, stated, note=""):
        hours = training_hours(method, count, epochs, pace)
        kind = "rows" if method in ("sft", "rcft") else "pairs"
        basis = f"{count} {kind} ({'stated' if stated else 'at most'}), {epochs} epochs"
        rows.add(section, case, method, "training", hours, "GPU h", "; ".join(filter(None, (basis, note))))
        return hours

    for method, task, epochs, hardware, minutes in table12():
        stated = method == "dpo_catto"
        add("table12", task, method, settings.catto_pairs if stated else upper(task), epochs, stated,
            f"the paper: {minutes / 60:.2f} h on one {hardware}")
    total = 0.0
    tasks = (*settings.tasks, *filter(None, [settings.ood_task]))
    for task, method in itertools.product(tasks, settings.methods):
        kind, matched = METHODS[method].kind, METHODS[method].matched
        if kind == "scaled":
            continue  # no training
        epochs = settings.sft_epochs if kind == "sft" else settings.rcft_epochs if kind == "rcft" else settings.catto_epochs if matched else settings.dpo_epochs
        count, runs = min(upper(task), settings.catto_pairs) if matched else upper(task), len(grid(settings, task, method))
        total += len(settings.seeds) * runs * add("grid", task, method, count, epochs, matched, f"one seed, one of {runs} learning rates")
    rows.add("grid", "all tasks and methods", "", "training", total, "GPU h", f"{len(settings.seeds)} seeds")


def table12():
    "(method, task, epochs, hardware, minutes) of each number in the paper's Table 12; none where the table is not in the tree."
    path = REPO / "data" / "paper" / "table12.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["method", "dataset", "epochs", "hardware", "value"])
    return list(table[["method", "dataset", "epochs", "hardware", "value"]].itertuples(index=False, name=None))


# --- the whole

def bench(device, sizes, cap):
    "All sections; the rows. float32 on a CPU, where bfloat16 says nothing about a GPU."
    clock, rows = Clock(device), Rows()
    dtype = torch.bfloat16 if clock.cuda else torch.float32
    torch.manual_seed(0)
    describe_machine(rows, device)
    check_equality(rows, sizes, device)
    flops, bandwidth = measure_ceiling(rows, sizes, clock, dtype)
    measure_kernels(rows, sizes, clock, dtype, bandwidth)
    measure_heads(rows, sizes, clock, dtype, flops)
    seconds, reference = measure_steps(rows, sizes, clock, dtype, flops)
    add_hours(rows, seconds, reference, sizes, cap)
    return rows


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, whose numbers mean nothing")
    parser.add_argument("--out", type=Path, help="csv to write; data/bench_gpu.csv unless --tiny, which only prints")
    parser.add_argument("--rows", type=int, default=0, metavar="N",
                        help="in the hours, at most so many rows or pairs of a task (0: all)")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    if not args.tiny and not args.device.startswith("cuda"):
        print("bench_gpu: the real sizes need --device cuda; on a CPU add --tiny", file=sys.stderr)
        return 2
    if args.tiny and args.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported; without triton it changes nothing
    load_libraries()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("bench_gpu: no CUDA device was found; `--tiny --device cpu` tries the script without one", file=sys.stderr)
        return 2
    rows = bench(torch.device(args.device), TINY if args.tiny else FULL, args.rows)
    out = args.out or (None if args.tiny else REPO / "data" / "bench_gpu.csv")
    if out:
        pd.DataFrame(rows, columns=COLUMNS).to_csv(out, index=False, float_format="%.6g")
        print(f"{len(rows)} rows written to {out.name}")
    return 0


def load_libraries():
    "The heavy imports, after TRITON_INTERPRET is settled."
    global torch, pd, fused, triton_head, token_probs, ChunkedLogProbFunction
    from catto.settings import quiet
    quiet()
    import pandas as pd
    import torch
    from trl.kernels import ChunkedLogProbFunction
    from catto import fused, triton_head
    from catto.surrogate import token_probs


if __name__ == "__main__":
    sys.exit(main())
