"""Fast 1-D convolutions for PyTorch, written in Triton.

`torch.compile(model, backend="triton_conv")` needs no import of this package. Importing it gives the same convolutions by
hand, as `conv1d` and `conv_transpose1d` or as the operators ``torch.ops.triton_conv``. Nothing here imports Triton or
touches a GPU before a convolution runs.
"""

# above the imports: the graph pass names itself by it
__version__ = "0.1.0"

from torch_conv_triton.backend import inductor_options
from torch_conv_triton.explain import explain
from torch_conv_triton.functional import conv1d, conv_transpose1d

__all__ = ["__version__", "conv1d", "conv_transpose1d", "explain", "inductor_options"]
