"""Training on a GPU."""

import pytest
from training import Training


@pytest.mark.gpu
class TestTraining(Training):
    device, channels, steps = "cuda", 64, 40
