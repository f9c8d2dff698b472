"""What several test files share. No test asks a network for anything: a name on the hub is looked
for in its cache alone."""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def one_thread():
    """Tiny tensors are slow on several threads of a busy machine. And a sum's order, hence its
    rounding, depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
