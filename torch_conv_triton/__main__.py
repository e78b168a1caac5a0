"""``python -m torch_conv_triton`` is ``torch-conv-triton``."""

import sys

from torch_conv_triton.cli import main

sys.exit(main())
