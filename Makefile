# make help lists the targets. Everything is installed in .venv, with the Python that PYTHON names: 3.11 or newer.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/demo

# Not the default run: a small network and a fast recipe, which take two CPU cores a few minutes.
DEMO_TRAINING := --size 64 64 48 --channels 8 --down-convs 1 1 1 1 1 --up-convs 1 1 1 1 \
	--loss dice_cross_entropy --learning-rate 5e-3 --schedule poly --augment --epochs 24 --val-interval 4 --workers 0

# One thread per process: tests that compare bits need it. --dist loadfile keeps the tests of a file in one process, where
# they share their fixtures. One process more than cores, as tests wait for scripts that they start; 8 at most.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --dist loadfile \
	-n $$($(PYTHON) -c "import os; print(min(8, os.cpu_count() + 1))")

.DEFAULT_GOAL := help
.PHONY: help demo style test test-all test-long

help:
	@echo "make demo       make phantom scans, train a small network, segment, score and draw them: runs/demo (minutes)"
	@echo "make test       check style, run the tests that take seconds"
	@echo "make test-all   check style, run those that take five seconds or more too, as .ci/run does"
	@echo "make test-long  run all tests, with those that take minutes"
	@echo "make .venv/installed      only install requirements.txt, as make demo does"
	@echo "make .venv/installed-dev  install requirements-dev.txt too, as make test does"
	@echo "PYTHON=python3.12 chooses the Python of a new .venv"

demo: $(VENV)/installed
	$(RUN) -m data.make_phantom $(DEMO)/data --cases 20
	$(RUN) train.py --data-dir $(DEMO)/data --run-dir $(DEMO)/train --cache-dir $(DEMO)/cache --resume $(DEMO_TRAINING)
	$(RUN) infer.py $(DEMO)/data --cases $(DEMO)/train/val_cases.txt --checkpoint $(DEMO)/train/best.pt \
		--output $(DEMO)/predictions
	$(RUN) evaluate.py --predictions $(DEMO)/predictions --labels $(DEMO)/data --output $(DEMO)/scores \
		--cases $(DEMO)/train/val_cases.txt
	case=$$(head -n 1 $(DEMO)/train/val_cases.txt) && \
	$(RUN) -m visualization.overlay $(DEMO)/data/images/$${case}_0000.nii.gz $(DEMO)/predictions/$$case.nii.gz \
		--output $(DEMO)/pictures/slices.png && \
	$(RUN) -m visualization.report $(DEMO)/data/images/$${case}_0000.nii.gz $(DEMO)/predictions/$$case.nii.gz \
		--reference $(DEMO)/data/labels/$$case.nii.gz --checkpoint $(DEMO)/train/best.pt --output $(DEMO)/pictures/report
	@echo "Everything is in $(DEMO): data, train (checkpoints, curves.png), predictions, scores, pictures (report/index.html)."

style: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test: style
	$(PYTEST) -m "not slow and not long"

test-all: style
	$(PYTEST) -m "not long"

test-long: style
	$(PYTEST)

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
