"""Fast 1-D convolutions for PyTorch, written in Triton."""

__version__ = "0.1.0"
