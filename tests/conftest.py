import contextlib
import importlib
import os
import sys
from pathlib import Path


# Nothing here may reach for a hub
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# The tests run in parallel
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


if not torch.cuda.is_available():
    # Without a GPU, fla's kernel runs in Triton's interpreter (test_fla.py)
    os.environ["TRITON_INTERPRET"] = "1"

# fla is here for its reference operator. Linear-attention models would take its CUDA kernels too, on a CPU, so they
# are imported as if it were not installed, and take their own PyTorch path.
sys.modules["fla"] = None
for family in ("kimi_linear", "qwen3_next"):
    with contextlib.suppress(ModuleNotFoundError):  # an older transformers
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
del sys.modules["fla"]

import pytest
from filelock import FileLock
from helpers import TINY
from hypothesis import settings


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="robustness tests at full length, see tests/README.md")


def pytest_configure(config):
    count = 600 if config.getoption("thorough") else 40
    settings.register_profile("attnres", max_examples=count, deadline=None, derandomize=True, database=None)
    settings.load_profile("attnres")


@pytest.fixture
def thorough(request):
    return request.config.getoption("thorough")


@pytest.fixture
def tokens():
    """Token ids and mask of a left-padded batch."""
    input_ids = torch.randint(1, TINY["vocab_size"], (3, 17), generator=torch.Generator().manual_seed(2))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[0, :5] = 0
    attention_mask[1, :11] = 0
    return {"input_ids": input_ids.masked_fill(attention_mask == 0, 0), "attention_mask": attention_mask}


@pytest.fixture(scope="session")
def tokenizer():
    from train_base import train_tokenizer

    return train_tokenizer([__file__], vocab_size=300)


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory):
    """SmolLM2-135M-Instruct as a checkpoint folder, once for all workers."""
    from smollm2 import smollm2

    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "smollm2.lock"):
        return smollm2(shared / "smollm2")


@pytest.fixture(scope="session")
def real_text():
    """A text that no model was trained to continue by rote alone."""
    return Path(sys.modules["argparse"].__file__).read_text(encoding="utf-8")
