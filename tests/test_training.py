"""Training without a GPU, by interpreted kernels."""

from training import Training


class TestTraining(Training):
    device, channels, steps = "cpu", 8, 11
