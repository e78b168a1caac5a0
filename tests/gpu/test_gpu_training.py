"""Training on a GPU."""

import pytest
from training import Training


@pytest.mark.gpu
class TestTraining(Training):
    device, channels, steps, repeated = "cuda", 64, 40, 40
