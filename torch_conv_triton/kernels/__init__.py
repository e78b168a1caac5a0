"""Triton kernels and their launchers, one algorithm a file. They import nothing of the package but `kernels.common`."""
