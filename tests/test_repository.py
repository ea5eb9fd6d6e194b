"""The repository agrees with itself: notebooks, package, pipeline, README and Makefile."""
import ast
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO / "nbs").glob("[0-9]*.ipynb"))
PIPELINE = {"02_data_gen", "03_train", "04_eval", "05_confidence_at_k", "06_report", "07_experiments", "07a_sweep"}  # run by papermill, with parameters
NOT_OURS = {".git", ".venv", ".snakemake", ".pytest_cache", ".hypothesis", ".ipynb_checkpoints", "__pycache__", "build", "dist"}

each_notebook = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(notebook: Path) -> list[dict]:
    "Code cells of a notebook, their source joined to one string."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in cells if cell["cell_type"] == "code"]


def tagged_parameters(notebook: Path) -> list[str]:
    "Sources of the cells papermill would take for the parameters."
    return [cell["source"] for cell in code_cells(notebook) if "parameters" in cell["metadata"].get("tags", [])]


def literals(source: str) -> dict:
    "Name and value of each assignment in a parameters cell; ValueError at anything else."
    values = {}
    for line in ast.parse(source).body:
        targets = getattr(line, "targets", None) or [getattr(line, "target", None)]
        if not isinstance(line, (ast.Assign, ast.AnnAssign)) or not all(isinstance(t, ast.Name) for t in targets):
            raise ValueError(f"not an assignment to a name: {ast.unparse(line)}")
        values |= {target.id: ast.literal_eval(line.value) for target in targets}
    return values


def test_there_are_notebooks():
    assert NOTEBOOKS, "no notebook nbs/NN_*.ipynb, so every check on notebooks would pass unseen"


@each_notebook
def test_parameters_cell(notebook):
    cells = tagged_parameters(notebook)
    if notebook.stem in PIPELINE:
        assert len(cells) == 1, f"papermill needs exactly one cell tagged `parameters`, found {len(cells)}"
    assert len(cells) <= 1, f"{len(cells)} cells are tagged `parameters`; papermill fills in one"
    for source in cells:
        assert literals(source), "the parameters cell sets nothing"


@pytest.mark.parametrize("source", ["a = int('1')", "import os", "a.b = 1", "a, b = 1, 2", "a += 1", "f()"])
def test_literals_refuses_what_is_not_a_literal(source):
    with pytest.raises(ValueError):
        literals(source)


def test_package_is_what_the_notebooks_export(tmp_path):
    ours, copy = REPO / "catto", tmp_path.resolve() / "repo"
    (copy / "catto").mkdir(parents=True)
    shutil.copy(REPO / "pyproject.toml", copy)
    shutil.copy(ours / "__init__.py", copy / "catto")  # holds the version; nbdev adds to it
    shutil.copytree(REPO / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".*", "llms.txt"))
    # IN_TEST turns an export into nothing; a user's own nbdev settings would change it.
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"} | {"XDG_CONFIG_HOME": str(tmp_path)}
    export = "from nbdev.doclinks import nbdev_export; nbdev_export()"
    subprocess.run([sys.executable, "-c", export], cwd=copy, env=env, check=True)

    exported = {path.name: path.read_text(encoding="utf-8") for path in (copy / "catto").glob("*.py")}
    present = {path.name: path.read_text(encoding="utf-8") for path in ours.glob("*.py")}
    assert exported.keys() == present.keys(), "modules without a notebook, or not exported: run `make export`"
    diff = [line for name in sorted(exported) for line in difflib.unified_diff(
        present[name].splitlines(), exported[name].splitlines(), f"catto/{name}", "as exported", lineterm="")]
    assert not diff, "run `make export`:\n" + "\n".join(diff)


FORBIDDEN = {
    r"\bsys\.exit\b|^\s*(exit|quit)\(": "papermill takes an exit for success",
    r"\bnbdev_export\(": "rewrites the package that other steps are importing",
    r"^\s*from\s+\.*(catto[\w.]*)?\s+import\s+\*": "names of our own modules are imported one by one",
    r"^\s*!|\bget_ipython\(\)\.system": "a failing shell command does not fail the notebook",
}


@each_notebook
@pytest.mark.parametrize("pattern", FORBIDDEN, ids=["exit", "export", "star", "shell"])
def test_no_trap_in_notebook(notebook, pattern):
    found = [cell["source"] for cell in code_cells(notebook) if re.search(pattern, cell["source"], re.M)]
    assert not found, f"{FORBIDDEN[pattern]}:\n" + "\n---\n".join(found)


def our_files() -> list[Path]:
    "Every file of the repository that git would carry: no environment, no caches, no runs."
    files = []
    for folder, subfolders, names in os.walk(REPO):
        here = Path(folder)
        subfolders[:] = [name for name in subfolders if name not in NOT_OURS and not name.endswith(".egg-info")
                         and here / name not in (REPO / "data" / "runs", REPO / "data" / "rehearsal")]
        files += [here / name for name in names]
    return files


def test_no_machine_path():
    # A path of one machine starts the path, so `a/home/b` and the inside of an address do not count.
    pattern = re.compile(r"(?<![\w.~+/-])/(?:home|root|tmp|work|Users|opt|mnt)/[^\s\"'`]*")
    found = []
    for path in our_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # pictures and parquet
        if path != Path(__file__):
            found += [f"{path.relative_to(REPO)}: {match}" for match in pattern.findall(text)]
    assert not found, "\n".join(found)


@each_notebook
def test_notebook_was_run(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    assert outputs, "no cell has an output, so a reader sees no result: run `make notebooks`"
    errors = [f"{output['ename']}: {output['evalue']}" for output in outputs if output["output_type"] == "error"]
    assert not errors, "\n".join(errors)


def papermill_calls(snakefile: str) -> list[tuple[str, set[str]]]:
    "Notebook and names of the parameters of each papermill command in a Snakefile."
    calls = []
    for command in re.split(r"\bpapermill\b", snakefile, flags=re.I)[1:]:
        command = re.split(r'"""|\'\'\'|^rule\b|^checkpoint\b', command, flags=re.M)[0]
        if notebook := re.search(r"\b(\d\d\w*)\.ipynb\b", command):
            names = re.findall(r"(?:^|[\s\"'])(?:-[pr]|--parameters(?:_raw)?)\s+(\w+)\s", command)
            calls.append((notebook[1], set(names)))
    return calls


def test_papermill_calls_are_read():
    snakefile = '''
rule train:
    shell:
        "papermill --cwd nbs nbs/03_train.ipynb {output.notebook} "
        "-p profile {profile} -r seed {wildcards.seed}"
rule report:
    shell: """papermill --cwd nbs nbs/06_report.ipynb out.ipynb \\
        -p folder {input}"""
'''
    assert papermill_calls(snakefile) == [("03_train", {"profile", "seed"}), ("06_report", {"folder"})]


def test_pipeline_passes_known_parameters():
    snakefile = REPO / "Snakefile"
    if not snakefile.exists():
        pytest.skip("no Snakefile yet")
    calls = papermill_calls(snakefile.read_text(encoding="utf-8"))
    assert calls, "no papermill command was found in the Snakefile, so nothing would be checked"
    for name, passed in calls:
        notebook = REPO / "nbs" / f"{name}.ipynb"
        assert notebook.exists(), f"the Snakefile runs {notebook.name}, which is not there"
        known = {parameter for source in tagged_parameters(notebook) for parameter in literals(source)}
        assert passed, f"the Snakefile passes no parameter to {notebook.name}"
        assert passed <= known, f"{notebook.name} has no parameter {sorted(passed - known)}; it has {sorted(known)}"


def test_readme_names_targets_that_exist():
    readme = REPO / "README.md"
    if not readme.exists():
        pytest.skip("no README yet")
    text = readme.read_text(encoding="utf-8")
    code = re.findall(r"^```.*?^```|`[^`\n]+`", text, flags=re.M | re.S)
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", "\n".join(code)))
    targets = set(re.findall(r"^([a-z][\w-]*):(?!=)", (REPO / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert named, "the README names no make target"
    assert named <= targets, f"the README names make targets that do not exist: {sorted(named - targets)}"
