# make demo: train and evaluate the embedded data set; make test: the test suite. Both set up .venv by themselves.

PYTHON ?= python3
# torch.distributed.run gives each process one thread unless this is set; one process may use every core.
ifndef OMP_NUM_THREADS
export OMP_NUM_THREADS := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
endif

INSTALLED := .venv/installed

.PHONY: demo test test-slow lint

demo: $(INSTALLED)
	.venv/bin/python -m torch.distributed.run --nproc_per_node=1 train_retrieval.py --config configs/retrieval_scenes.yaml --output_dir output/retrieval_scenes --resume auto

test: $(INSTALLED)
	.venv/bin/python -m pytest

test-slow: $(INSTALLED)
	.venv/bin/python -m pytest -m slow

lint: $(INSTALLED)
	.venv/bin/ruff check .

$(INSTALLED): requirements.txt
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --requirement requirements.txt
	touch $@
