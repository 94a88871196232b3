# The commands of README.md. Everything runs in .venv, which the first command makes.
PYTHON ?= python3
preset ?= digits
seed ?= 1
# A file of parameters, as those under data/studies/: make experiment file=data/studies/fashion16/pd.yaml seed=2
file ?=
run_folder ?= runs/$(or $(subst /,-,$(patsubst data/studies/%,%,$(basename $(file)))),$(preset))-seed$(seed)

BIN := .venv/bin
# name=value pairs on the command line are the notebook's parameters: make experiment seed=2 retrain=true
parameters = $(foreach pair,$(filter-out PYTHON=% run_folder=% file=%,$(MAKEOVERRIDES)),-p $(word 1,$(subst =, ,$(pair))) '$(word 2,$(subst =, ,$(pair)))')

.PHONY: experiment plan test test-notebooks test-slow test-browser chromium lint docs mutants reliability benchmark shipped results clean

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; try: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs]"
	touch .venv/ready

# What that would cost, on this machine or another: make plan preset=fashion16 device=A100 batch_size=256
plan: .venv/ready
	$(BIN)/python -m sferd_lab.plan preset=$(preset) $(foreach pair,$(filter-out PYTHON=% preset=% file=%,$(MAKEOVERRIDES)),'$(pair)')

# Train, distil, sample and score, by running the notebook; then a page of it without code, and the table.
experiment: .venv/ready
	$(if $(file),$(BIN)/python -m sferd_lab.config $(file))
	@mkdir -p $(run_folder)
	TQDM_MININTERVAL=10 SFERD_LAB_WIDGETS=0 $(BIN)/papermill --log-output --no-progress-bar --start-timeout 600 notebooks/experiment.ipynb $(run_folder)/experiment.ipynb \
		$(if $(file),-f $(file)) -p run_folder $(run_folder) $(parameters)
	$(BIN)/jupyter nbconvert --log-level WARN --to html --no-input --TagRemovePreprocessor.enabled True \
		--TagRemovePreprocessor.remove_all_outputs_tags progress --TagRemovePreprocessor.remove_cell_tags course $(run_folder)/experiment.ipynb
	$(BIN)/python -m sferd_lab.report $(run_folder)

# In the files' order: sorted by their number of tests, as xdist does, the longest would come last and alone.
test: .venv/ready lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests
	$(MAKE) test-notebooks

test-notebooks: .venv/ready
	folder=$$(mktemp -d) && OMP_NUM_THREADS=1 SFERD_LAB_TINY=1 SFERD_LAB_WIDGETS=0 SFERD_LAB_RUNS=$$folder $(BIN)/python -m pytest \
		-n 2 --dist loadfile --nbval-lax --nbval-current-env --nbval-kernel-startup-timeout 600 --nbval-cell-timeout 300 notebooks; status=$$?; rm -rf $$folder; exit $$status

# The longest notebooks with another seed than their own: about 5 minutes, before one of them or what it runs is changed for good.
test-slow: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow tests

# The notebooks in a real JupyterLab in a browser, by keyboard; some of them: make test-browser only="first or 01_".
# Another browser: make test-browser CHROMIUM=/path/to/the/program
test-browser: .venv/browser chromium
	$(BIN)/python -m pytest tests/browser $(if $(only),-k "$(only)")

.venv/browser: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,browser]"
	touch .venv/browser

# Say where the browser is; as root on Debian, install it if there is none.
chromium: .venv/ready
	@$(BIN)/python tests/browser/chromium.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The course, the method, the changelog and the library's docstrings as a site under build/docs. Needs no network; a warning is an error.
docs: .venv/ready
	$(BIN)/python docs/make_site.py

# Show that the tests can fail: mutations of the library, one by one, each caught by the test named for it.
mutants: .venv/ready
	$(BIN)/python tests/mutants/run.py

# The tallies behind "What is guaranteed": kills, memory, damaged files, with nothing else running: some hours.
reliability: .venv/ready
	for part in faults/run faults/memory fuzz/run; do OMP_NUM_THREADS=1 $(BIN)/python tests/$$part.py || exit 1; done

# Speed against peers, with nothing else running: about a quarter of an hour. tests/benchmarks/NOTES.md says what was tried.
benchmark: .venv/ready
	for part in network loops scores growth ensemble figure; do $(BIN)/python -W ignore tests/benchmarks/$$part.py || exit 1; done

# Make the files under data/ again: hours for fashion16.
shipped: .venv/ready
	$(BIN)/python -m sferd_lab.ship digits
	$(BIN)/python -m sferd_lab.ship fashion16 n_samples=2000
	$(BIN)/python -m sferd_lab.ship patches image_size=16 batch_size=128 teacher_steps=3000 guidance_form=x0 blur_kernel=7 blur_sigma=1.5

# The digits results of README.md: the experiment with three seeds, put together under data/results/.
results: .venv/ready
	for seed in 1 2 3; do $(MAKE) experiment preset=digits seed=$$seed || exit 1; done
	$(BIN)/python -m sferd_lab.ship results digits runs/digits-seed1 runs/digits-seed2 runs/digits-seed3
	$(BIN)/python -m sferd_lab.report runs/digits-seed1 runs/digits-seed2 runs/digits-seed3

clean:
	rm -rf .venv build dist
