# Every target makes .venv by itself when it is missing; `make` alone lists the targets.

PYTHON  ?= python3#     the interpreter .venv is made from
PROFILE ?= mini#        smoke, mini or paper: a section of settings.ini
SEEDS   ?=#             for example "0 1"; empty: the profile's own seeds
SWEEPS  ?=#             true: the weight sweep and the transfer between all tasks too
CLUSTER ?= local#       where the steps run: a folder of profiles/
JOBS    ?=#             steps that may run at the same time; empty: the number in profiles/
GPUS    ?=#             GPUs that these may take together; empty: the number in profiles/
CONFIG  ?=#             further words for snakemake --config, each name=value
SAMPLES ?=#             folder with rows of the six data sets, for rehearse; see nbs/09a_rehearsal.ipynb
OPTIONS ?=#             further options of snakemake, for example "--slurm-qos long"

SHELL    := /bin/bash
BIN      := $(CURDIR)/.venv/bin
STAMP    := .venv/.installed
OLDEST   := $(shell sed -n 's/^requires-python = ">=\([0-9.]*\)".*/\1/p' pyproject.toml)
NOTEBOOKS = $(wildcard nbs/[0-9]*.ipynb)

# Nothing reports home, and nothing of the user's own Python or Jupyter set-up leaks into a run.
export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK             := 1
export TOKENIZERS_PARALLELISM   := false
export JUPYTER_PREFER_ENV_PATH  := 1
export PYTHONNOUSERSITE         := 1
# MPLBACKEND stays unset: kernels then draw inline, and the executed notebooks hold their figures.
export IPYTHONDIR               := $(CURDIR)/.venv/ipython
unexport JUPYTER_PATH PYTHONPATH PYTHONHOME MPLBACKEND

# Steps that snakemake starts find papermill on the PATH. Only the paper profile may reach the hub.
OFFLINE   := HF_HUB_OFFLINE=1
REHEARSAL := $(CURDIR)/data/rehearsal
ONE_CORE  := $(OFFLINE) OMP_NUM_THREADS=1
PLACES    := $(sort $(wildcard profiles/*/config.yaml))
PLACE      = $(if $(filter profiles/$(CLUSTER)/config.yaml,$(PLACES)),profiles/$(CLUSTER),$(error \
             CLUSTER = '$(CLUSTER)': accepted are $(PLACES:profiles/%/config.yaml=%)))
SNAKEMAKE  = env PATH="$(BIN):$$PATH" $(if $(filter paper,$(PROFILE)),,$(OFFLINE)) \
             "$(BIN)/snakemake" --snakefile Snakefile --workflow-profile $(PLACE) --nolock --rerun-incomplete \
             $(if $(strip $(JOBS)),--jobs $(JOBS)) $(if $(strip $(GPUS)),--resources gpu=$(GPUS)) $(OPTIONS)
WORDS      = profile=$(PROFILE) $(if $(strip $(SEEDS)),seeds="$(strip $(SEEDS))") $(if $(strip $(SWEEPS)),sweeps=$(strip $(SWEEPS))) $(CONFIG)
# check: name and take back what was damaged; show: how far the run is
STATUS     = "$(BIN)/python" -c 'import sys; from catto.status import main; sys.exit(main(*sys.argv[1:]))'
# all: what a run takes; teacher: what asking the teacher costs
PLAN       = $(if $(filter paper,$(PROFILE)),,$(OFFLINE)) "$(BIN)/python" -c 'import sys; from catto.settings import quiet; quiet(); \
             from catto.plan import main; sys.exit(main(*sys.argv[1:]))'

# A word that is mistyped, such as SEED, would be left unread.
ACCEPTED  := PYTHON PROFILE SEEDS SWEEPS CLUSTER JOBS GPUS CONFIG SAMPLES OPTIONS
UNKNOWN   := $(filter-out $(ACCEPTED),$(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name))))
$(if $(UNKNOWN),$(error unknown $(UNKNOWN): accepted are $(ACCEPTED)))
$(foreach name,JOBS GPUS,$(if $(strip $($(name))),$(if $(filter 0,$(shell expr '$(strip $($(name)))' : '[1-9][0-9]*$$')),\
  $(error $(name) is $(strip $($(name))): accepted is a whole number from 1))))

.PHONY: help venv export test smoke reproduce study status plan teacher-plan rehearse bench bench-gpu readme lab notebooks clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

venv: $(STAMP) ## make .venv with the packages of constraints.txt

reproduce: $(STAMP) ## run the pipeline of PROFILE, tables and figures into figures/ [PROFILE=mini SEEDS="0 1" CLUSTER=local JOBS=2]
	@$(STATUS) check $(WORDS)
	$(SNAKEMAKE) --quiet host reason --config $(WORDS)

study: ## the same with seeds 0 to 4 and all sweeps, as the committed results have it
	@$(MAKE) --no-print-directory reproduce SEEDS="0 1 2 3 4" SWEEPS=true

status: $(STAMP) ## say what is done, running and left, at any moment and from any terminal [the words of reproduce or study]
	@$(STATUS) show $(WORDS)

smoke: ## the same in its smallest form (PROFILE=smoke)
	@$(MAKE) --no-print-directory reproduce PROFILE=smoke

plan: $(STAMP) ## say what reproduce would run and what that takes, and run nothing
	@$(PLAN) all $(WORDS)
	@set -o pipefail; $(SNAKEMAKE) --dry-run --quiet host reason rules --config $(WORDS) | awk '/^Job stats/ { tables++ } tables < 2'

rehearse: $(STAMP) ## take every step of PROFILE once, small, into data/rehearsal/: sample rows, a random model [PROFILE=paper SAMPLES=<folder>]
	@$(OFFLINE) "$(BIN)/python" -c 'import sys; from catto.settings import quiet; quiet(); \
	  from catto.rehearsal import main; sys.exit(main(*sys.argv[1:]))' "$(REHEARSAL)" "$(PROFILE)" "$(SAMPLES)"
	@CUDA_VISIBLE_DEVICES= $(MAKE) --no-print-directory reproduce PROFILE=rehearsal GPUS=1000 CONFIG="settings=$(REHEARSAL)/settings.ini root=$(REHEARSAL)"

teacher-plan: $(STAMP) ## count the requests to the teacher that are left, with their price, and send nothing
	@$(PLAN) teacher $(WORDS)

test: $(STAMP) ## repository checks, every notebook, then the tests with the smallest reproduction
	$(ONE_CORE) "$(BIN)/pytest" -q tests/test_repository.py
	$(ONE_CORE) "$(BIN)/nbdev-test" --n-workers 2 --do-print
	$(ONE_CORE) "$(BIN)/pytest" -n 2 --dist loadfile tests --ignore=tests/test_repository.py

export: $(STAMP) ## write catto/ from the notebooks, and clean the notebooks' metadata
	"$(BIN)/nbdev-export"
	"$(BIN)/nbdev-clean"

notebooks: $(STAMP) ## run every notebook again in place, in the order of their numbers
	@set -e; for notebook in $(NOTEBOOKS); do \
	  echo "$$notebook"; \
	  $(ONE_CORE) "$(BIN)/jupyter-nbconvert" --log-level=ERROR --to notebook --execute --inplace --coalesce-streams "$$notebook"; \
	done
	"$(BIN)/nbdev-clean"

bench: $(STAMP) ## time the calibrated head and whole steps on this CPU into data/bench_cpu.csv (a quarter of an hour)
	$(OFFLINE) "$(BIN)/python" scripts/bench_cpu.py

bench-gpu: $(STAMP) ## on a CUDA device: check, time and count the hours of the calibrated head, into data/bench_gpu.csv
	$(OFFLINE) "$(BIN)/python" scripts/bench_gpu.py

readme: $(STAMP) ## write results, claims, paper map and bench into README.md
	@"$(BIN)/python" -c 'from catto.claims import update_claims; from catto.report import update_readme; update_readme("README.md", "figures/mini"); update_claims("README.md")'
	@"$(BIN)/python" scripts/bench_cpu.py --readme README.md

lab: $(STAMP) ## open JupyterLab in nbs/
	cd nbs && "$(BIN)/jupyter-lab"

clean: ## remove .venv, data/runs, data/rehearsal and caches; tables and figures stay
	rm -rf .venv data/runs data/rehearsal .snakemake .pytest_cache build dist catto.egg-info
	find . \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" > /dev/null || { echo "make: no Python named '$(PYTHON)'; give one, as in: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:3] < tuple(map(int, "$(OLDEST)".split("."))))' || \
	  { echo "make: catto needs Python $(OLDEST) or newer and '$(PYTHON)' is older; give another, as in: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing the packages of constraints.txt into .venv (some minutes, once)"
	@"$(PYTHON)" -m venv .venv
	@"$(BIN)/python" -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[test]"
	@mkdir -p .venv/ipython/profile_default && echo 'c.IPKernelApp.log_level = 40  # errors; a notice at every start hides the steps' \
	  > .venv/ipython/profile_default/ipython_kernel_config.py
	@touch $@
