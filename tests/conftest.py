"""What every test stands on: no network, no cache of the user's, one thread, and the same randomness each time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch and transformers are imported: they read these once. Processes that tests start inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("SELFTAUGHT_QUICKSTART_WHEEL", None)

import pytest
import torch
from hypothesis import settings

settings.register_profile("selftaught", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("selftaught")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton itself is imported, which transformers does
torch.set_num_threads(1)  # tiny tensors: more threads only wait for one another


@pytest.fixture(autouse=True, scope="session")
def _own_cache() -> Iterator[None]:
    """A cache folder that goes with the tests: the user's is neither read nor written."""
    with tempfile.TemporaryDirectory(prefix="selftaught-tests-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFTAUGHT_CACHE", str(Path(folder) / "cache"))
        yield


@pytest.fixture(autouse=True)
def _same_randomness() -> None:
    torch.manual_seed(0)
