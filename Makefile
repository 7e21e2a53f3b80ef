# make demo: train and evaluate the embedded data set; make pictures: draw what it finds, after a demo (needs chromium);
# make test: the test suite; make gpu-report: what a CUDA card shows, in nine minutes at most.
# Each sets up .venv by itself.

PYTHON ?= python3
# One process may use every core; torch by itself may take fewer.
ifndef OMP_NUM_THREADS
export OMP_NUM_THREADS := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
endif

INSTALLED := .venv/installed
EXTRAS := $(sort $(wildcard requirements-*.txt))
DEMO := output/retrieval_scenes
CHROMIUM ?= chromium

# Two processes share the tests, file by file. The models are tiny, so a second thread would help neither.
TESTS := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile

.PHONY: demo pictures test test-slow gpu-report lint

demo: $(INSTALLED)
	.venv/bin/python train_retrieval.py --config configs/retrieval_scenes.yaml --output_dir $(DEMO) --resume auto

pictures: $(INSTALLED) $(DEMO)/checkpoint_best.pth
	.venv/bin/python -m reports.pictures $(DEMO) docs/pictures
	.venv/bin/python -m reports.heatmaps $(DEMO) docs/pictures 6
	.venv/bin/python report.py curves $(DEMO) -o docs/pictures/$(notdir $(DEMO))_curves.png
	.venv/bin/python report.py $(DEMO)
	$(CHROMIUM) --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1000,760 \
	    --screenshot=docs/pictures/$(notdir $(DEMO))_report.png file://$(CURDIR)/$(DEMO)/report.html

$(DEMO)/checkpoint_best.pth:
	$(MAKE) demo

test: $(INSTALLED)
	$(TESTS)

test-slow: $(INSTALLED)
	$(TESTS) -m slow

gpu-report: $(INSTALLED)
	.venv/bin/python -m benchmarks.gpu_report

lint: $(INSTALLED)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

$(INSTALLED): requirements.txt $(EXTRAS)
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(patsubst %,-r %,$^)
	touch $@
