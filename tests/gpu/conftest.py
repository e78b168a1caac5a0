"""What GPU tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def memory_is_given_back():
    """Tests of large tensors run beside others on the same GPU, in processes of their own."""
    yield
    torch.cuda.empty_cache()
