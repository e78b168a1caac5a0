"""How the outputs of a transposed convolution fall into phases, and when all phases read the same positions of x."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from torch_conv_triton.problem import ceil_pow2


@dataclass(frozen=True, slots=True)
class Weave:
    """A transposed convolution as an ordinary one over positions q of x, whose channels are (output channel, phase).

    Output t = q * stride + phase * spacing - padding has the taps k = phase + j * phases, which read x[q - j * step]; the
    outputs between multiples of `spacing` have none. `taps` is the most that a phase has.
    """

    phases: int
    spacing: int
    step: int
    taps: int

    @classmethod
    def of(cls, K: int, stride: int, dilation: int) -> Weave | None:
        """None where the phases read different positions: neither of stride and dilation divides the other."""
        spacing = gcd(stride, dilation)
        phases, step = stride // spacing, dilation // spacing
        if phases > 1 and step > 1:
            return None
        return cls(phases, spacing, step, taps=-(-K // phases))

    def rows(self, C_in: int) -> int:
        """Rows of the weight matrix for each output channel, of `C_in` channels a group: the phases, or a power of two of them.

        Padded, a tile is stored in whole lines; with many products the padding costs more than that gains.
        """
        # ms, phases alone and padded: 256 -> 128 K10 s5 0.233 and 0.208, 192 -> 96 K6 s3 bf16 0.151 and 0.128;
        # 512 -> 256 K12 s6 0.218 and 0.231, 1024 -> 512 K16 s5 0.218 and 0.287, 768 -> 384 K7 s3 0.050 and 0.065
        if self.spacing == 1 and (self.taps * C_in >= 1024 or self.phases > 128):
            return self.phases
        return ceil_pow2(self.phases)

    @property
    def reach(self) -> int:
        """How far before q its taps read."""
        return (self.taps - 1) * self.step
