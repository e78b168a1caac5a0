"""What GPU tests share."""

import pytest

from torch_conv_triton.graph import host_bound


@pytest.fixture(autouse=True)
def small_graphs_are_compiled_too(monkeypatch):
    """Models that test kernels are small, and would be left to aten; that rule has tests of its own."""
    monkeypatch.setattr(host_bound, "waits_for_host", lambda *_: False)
