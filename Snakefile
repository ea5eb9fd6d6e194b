# The grid of one profile. Run it by `make reproduce`.
#   data -> train -> evaluate, confidence -> report
#               \-> sweep -------------------> experiments
# A step's output is its manifest, which its notebook writes last. Everything else (models, checkpoints, predictions)
# lies outside `output:`, because Snakemake deletes declared outputs before a job and after a failure; the manifests of
# the single methods lie there too, so that a group that was stopped goes on where it was.
import dataclasses
import re
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from catto.methods import METHODS
from catto.settings import fingerprint
from catto.status import configured, disk_note, watch

try:
    settings, ini, root = configured({name: str(value) for name, value in config.items()})
except (ValueError, FileNotFoundError) as error:
    raise WorkflowError(str(error)) from None


# --- how the grid is cut into jobs ---
# A kernel takes some 10 s to start, as much as a mini method takes to train. So group_methods lets one job train all
# methods of a (task, seed), and group_tasks lets one make the data of all tasks of a seed, or evaluate them. A cluster
# wants neither. Training is always a job for each (task, seed).
trained = [*settings.tasks, settings.ood_task] if settings.ood_task else [*settings.tasks]
groups = {"all": settings.methods} if settings.group_methods else {m: (m,) for m in settings.methods}
parts = {"all": trained} if settings.group_tasks else {task: (task,) for task in trained}
part_of = {task: part for part, tasks in parts.items() for task in tasks}
# Candidates (Table 3) are of tasks in distribution, and of methods that have a model of their own.
pool_parts = {"all": settings.tasks} if settings.group_tasks else {task: (task,) for task in settings.tasks}
sampled = [group for group, methods in groups.items() if any(METHODS[m].kind != "scaled" for m in methods)]

runs = str(Path(config.get("root", ".")) / "data" / "runs" / settings.profile)
unit = runs + "/{task}/seed{seed}"
batch = runs + "/{part}/seed{seed}"
data, train, sweep = batch + "/data.json", unit + "/train_{group}.json", unit + "/sweep.json"
evaluation, pool = batch + "/eval_{group}.json", batch + "/pool_{group}.json"

wildcard_constraints:
    task="|".join(trained),
    part="|".join(parts),
    seed=r"\d+",
    group="|".join(groups),


def data_of(w):
    return data.format(part=part_of[w.task], seed=w.seed)


def all_data(w):
    "For steps that also ask the questions of other tasks."
    return [data.format(part=part, seed=w.seed) for part in parts]


def base_of(w):
    "A method that trains alone waits for the one it starts from."
    base = METHODS[w.group].base if w.group in METHODS else None
    return [train.format(task=w.task, seed=w.seed, group=base)] if base in groups else []


def all_seeds(tasks_of):
    "The learning rate is chosen by the mean over seeds, so all seeds are trained before one is evaluated."
    return lambda w: [train.format(task=task, seed=seed, group=w.group) for task in tasks_of[w.part] for seed in settings.seeds]


def grid(pattern, **words):
    return expand(pattern, seed=settings.seeds, **{"group": groups, **words})


# --- what makes a step run again: an edit to its notebook or to its part of the package, and other settings ---
def package(*names):
    "Files of catto.<name>, and of all that these import from the package: an edit to a table trains nothing anew."
    todo, files = [*names], {}
    while todo:
        if (name := todo.pop()) not in files:
            files[name] = f"catto/{name}.py"
            imports = re.findall(r"^\s*from (?:catto)?\.(\w+) import|^from \. import (\w+)", Path(files[name]).read_text(), flags=re.M)
            todo += [one or other for one, other in imports]
    return sorted(files.values())


# These change which steps there are, or where they run; not what a step does.
cut = ("tasks", "seeds", "methods", "group_methods", "group_tasks", "step_cores", "gpu_step_memory", "cpu_step_memory", "gpu_step_hours",
       "cpu_step_hours")
values = {name: value for name, value in dataclasses.asdict(settings).items() if name not in cut}
with_sweeps = fingerprint(values)
without_sweeps = fingerprint({name: value for name, value in values.items() if not name.startswith("sweep")})  # they come on top of the grid

# Notebooks run in nbs/, so what they are told must not depend on the folder.
seeds = " ".join(map(str, settings.seeds))
where = f"-r seeds '{seeds}' -p root {shlex.quote(root)} -p settings_file {shlex.quote(ini)}"


# --- what a step takes; a cluster looks at all of it, a run on this machine at the GPUs alone ---
def takes(kind, processes=1):
    "Resources of one attempt of a step, as Snakemake names them; `kind` is gpu or cpu. The mini model takes no GPU."
    memory, hours = getattr(settings, f"{kind}_step_memory"), getattr(settings, f"{kind}_step_hours")
    return dict(gpu=processes if kind == "gpu" and settings.model != "mini" else 0, nodes=1, cpus_per_task=settings.step_cores * processes,
                mem_mb=1000 * memory * processes, runtime=60 * hours)


def on_free_gpus(count):
    "Steps on one machine share its GPUs, so each looks for free ones; a cluster gives each job its own."
    alone = workflow.remote_exec or settings.model == "mini"
    return "" if alone else f"{shlex.quote(sys.executable)} scripts/on_free_gpus.py {count} "


processes = 1 if settings.parallel == "none" else settings.parallel_processes  # of a training
on_its_gpus, on_one_gpu = on_free_gpus(processes), on_free_gpus(1)


# --- while it runs ---
onstart:
    watch(settings, root)  # a line for each method that starts or ends; a job may train many

onerror:
    print(disk_note(root), end="")


rule all:
    input:  # every step by name: one that is missing is made again even where the tables that came of it are there
        grid(data, part=parts),
        grid(train, task=trained),
        grid(evaluation, part=parts),
        grid(pool, part=pool_parts, group=sampled),
        grid(sweep, task=settings.tasks),
        f"{runs}/report.json",
        f"{runs}/experiments.json",
    message:
        f"all steps of profile {settings.profile} are done"


rule report:
    input:
        grid(evaluation, part=parts),
        grid(pool, part=pool_parts, group=sampled),
        notebook="nbs/06_report.ipynb",
        package=package("report"),
        paper=sorted(map(str, Path("data/paper").glob("table*.csv"))),
    output:
        f"{runs}/report.json",
    params:
        settings=without_sweeps,
        seeds=seeds,
    resources:
        **takes("cpu"),
    message:
        f"report: tables and figures of profile {settings.profile}"
    shell:
        "papermill --cwd nbs --no-progress-bar --log-level WARNING {input.notebook}"
        " {runs}/06_report.ipynb"
        " -p profile {settings.profile} {where}"


rule experiments:
    input:
        grid(evaluation, part=parts),
        grid(sweep, task=settings.tasks),
        notebook="nbs/07_experiments.ipynb",
        package=package("experiments"),
    output:
        f"{runs}/experiments.json",
    params:
        settings=with_sweeps,
        seeds=seeds,
    resources:
        **takes("cpu"),
    message:
        f"experiments: tables and figures of profile {settings.profile}"
    shell:
        "papermill --cwd nbs --no-progress-bar --log-level WARNING {input.notebook}"
        " {runs}/07_experiments.ipynb"
        " -p profile {settings.profile} -r sweeps {settings.sweeps} {where}"


rule data:
    input:
        notebook="nbs/02_data_gen.ipynb",
        package=package("data"),
    output:
        data,
    params:
        settings=without_sweeps,
        tasks=lambda w: " ".join(parts[w.part]),
    resources:
        **takes("cpu"),
    message:
        "data: {params.tasks}, seed {wildcards.seed}"
    shell:
        "papermill --cwd nbs --no-progress-bar --log-level WARNING {input.notebook}"
        " {runs}/{wildcards.part}/seed{wildcards.seed}/02_data_gen.ipynb"
        " -p profile {settings.profile} -r tasks '{params.tasks}' -p seed {wildcards.seed} -p part {wildcards.part} {where}"


rule train:
    input:
        data_of,
        base_of,
        notebook="nbs/03_train.ipynb",
        package=package("train"),
    output:
        train,
    params:
        settings=without_sweeps,
        methods=lambda w: " ".join(groups[w.group]),
    resources:
        **takes("gpu", processes),
    message:
        "train: {params.methods} on {wildcards.task}, seed {wildcards.seed}"
    shell:
        "{on_its_gpus}papermill --cwd nbs --no-progress-bar --log-level WARNING {input.notebook}"
        " {runs}/{wildcards.task}/seed{wildcards.seed}/03_train_{wildcards.group}.ipynb"
        " -p profile {settings.profile} -r tasks {wildcards.task} -p seed {wildcards.seed}"
        " -r methods '{params.methods}' -p group {wildcards.group} {where}"


rule evaluate:
    input:
        all_seeds(parts),
        all_data,
        notebook="nbs/04_eval.ipynb",
        package=package("eval", "train"),
    output:
        evaluation,
    params:
        settings=without_sweeps,
        tasks=lambda w: " ".join(parts[w.part]),
        methods=lambda w: " ".join(groups[w.group]),
    resources:
        **takes("gpu"),
    message:
        "evaluate: {params.methods} on {params.tasks}, seed {wildcards.seed}"
    shell:
        "{on_one_gpu}papermill --cwd nbs --no-progress-bar --log-level WARNING {input.notebook}"
        " {runs}/{wildcards.part}/seed{wildcards.seed}/04_eval_{wildcards.group}.ipynb"
        " -p profile {settings.profile} -r tasks '{params.tasks}' -p seed {wildcards.seed} -p part {wildcards.part}"
        " -r methods '{params.methods}' -p group {wildcards.group} {where}"


rule confidence:
    input:
        all_seeds(pool_parts),
        notebook="nbs/05_confidence_at_k.ipynb",
        package=package("confidence", "train"),
    output:
        pool,
    params:
        settings=without_sweeps,
        tasks=lambda w: " ".join(pool_parts[w.part]),
        methods=lambda w: " ".join(groups[w.group]),
    resources:
        **takes("gpu"),
    message:
        "candidates: {params.methods} on {params.tasks}, seed {wildcards.seed}"
    shell:
        "{on_one_gpu}papermill --cwd nbs --no-progress-bar --log-level WARNING {input.notebook}"
        " {runs}/{wildcards.part}/seed{wildcards.seed}/05_confidence_{wildcards.group}.ipynb"
        " -p profile {settings.profile} -r tasks '{params.tasks}' -p seed {wildcards.seed} -p part {wildcards.part}"
        " -r methods '{params.methods}' -p group {wildcards.group} {where}"


rule sweep:
    input:
        lambda w: [train.format(**w, group=group) for group in groups],
        all_data,
        notebook="nbs/07a_sweep.ipynb",
        package=package("experiments"),
    output:
        sweep,
    priority: 1 if settings.sweeps else -1  # with the weight sweep the longest steps, which come first; else short ones, which fill gaps
    params:
        settings=with_sweeps,
    resources:
        **takes("gpu", processes),
    message:
        "sweep: {wildcards.task}, seed {wildcards.seed}"
    shell:
        "{on_its_gpus}papermill --cwd nbs --no-progress-bar --log-level WARNING {input.notebook}"
        " {runs}/{wildcards.task}/seed{wildcards.seed}/07a_sweep.ipynb"
        " -p profile {settings.profile} -r tasks {wildcards.task} -p seed {wildcards.seed} -r sweeps {settings.sweeps} {where}"
