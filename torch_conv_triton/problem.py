"""What a 1-D convolution is: its sizes, strides, dtype and precision, and the errors of arguments that do not describe one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

Strides = tuple[int, int, int]

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Conv1dProblem:
    """One 1-D convolution (or transposed convolution), everything that decides how it runs.

    Shapes: x ``(N, C_in, L_in)``; weight ``(C_out, C_in / groups, K)``, or ``(C_in, C_out / groups, K)`` when
    `transposed`; y ``(N, C_out, L_out)``. Strides are in elements, in the order of the shapes.
    `precision` says how float32 products are formed: ``"tf32"`` (operands rounded to nearest TF32) or ``"ieee"``;
    it is ``"ieee"`` for every other dtype. Accumulation is in float32. `aligned`: x and weight start on 16 bytes.
    The fused operator adds: `padding_end`, the padding after x where it is not `padding` (`transposed`: what is cut off the end),
    with negative values cropping x (or padding the output); `padding_mode` as in `torch.nn.Conv1d`; `rounded`, that float32 x
    holds TF32 values.
    """

    # what is to be computed of the convolution; see `dispatch_gradients` for others
    kind: ClassVar[str] = "forward"

    N: int
    C_in: int
    L_in: int
    C_out: int
    K: int
    stride: int
    padding: int
    dilation: int
    groups: int
    transposed: bool
    output_padding: int
    has_bias: bool
    dtype: torch.dtype
    precision: str
    x_strides: Strides
    w_strides: Strides
    y_strides: Strides
    aligned: bool = True
    padding_end: int | None = None
    padding_mode: str = "zeros"
    rounded: bool = False

    @classmethod
    def from_tensors(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: int,
        padding: int,
        dilation: int,
        groups: int,
        transposed: bool = False,
        output_padding: int = 0,
    ) -> Conv1dProblem:
        """The problem that valid arguments (see `check_arguments`) describe, writing a contiguous NCL output."""
        N, C_in, L_in = x.shape
        K = weight.shape[2]
        C_out = weight.shape[1] * groups if transposed else weight.shape[0]
        L_out = output_length(L_in, K, stride, padding, dilation, transposed, output_padding)
        return cls(
            N=N,
            C_in=C_in,
            L_in=L_in,
            C_out=C_out,
            K=K,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            transposed=transposed,
            output_padding=output_padding,
            has_bias=bias is not None,
            dtype=x.dtype,
            precision=current_precision(x.dtype),
            x_strides=x.stride(),
            w_strides=weight.stride(),
            y_strides=contiguous_strides(C_out, L_out),
            aligned=starts_aligned(x) and starts_aligned(weight),
        )

    @property
    def L_out(self) -> int:
        more = 0 if self.padding_end is None else self.padding_end - self.padding
        if self.transposed:
            return output_length(self.L_in, self.K, self.stride, self.padding, self.dilation, True, self.output_padding - more)
        return output_length(self.L_in + more, self.K, self.stride, self.padding, self.dilation)

    @property
    def C_in_per_group(self) -> int:
        return self.C_in // self.groups

    @property
    def C_out_per_group(self) -> int:
        return self.C_out // self.groups

    @property
    def is_depthwise(self) -> bool:
        """One input channel a group (any channel multiplier), and more than one group."""
        return self.C_in == self.groups > 1

    @property
    def layout(self) -> str:
        """Layout of x: "NCL" (L contiguous), "NLC" (C contiguous) or "strided"; a tensor that is both is "NCL"."""
        return layout_of(self.x_strides, self.C_in, self.L_in)

    @property
    def extents(self) -> tuple[int, int]:
        """Elements of x and of y, empty ones counted as none."""
        return self.N * self.C_in * self.L_in, self.N * self.C_out * self.L_out

    @property
    def regime(self) -> str:
        """The family of workloads this problem belongs to, as reports and benchmarks group them."""
        prefix = "transposed_" if self.transposed else ""
        if self.is_depthwise:
            return prefix + "depthwise"
        if self.groups > 1:
            return prefix + "grouped"
        if self.K == 1 and self.stride == 1:
            return prefix + "pointwise"
        if self.C_in <= 8:
            return prefix + "tiny_C_in"
        if self.C_out <= 8:
            return prefix + "tiny_C_out"
        if self.transposed:
            return "transposed_dense"
        if self.stride > 1:
            return "strided"
        return "dilated" if self.dilation > 1 else "dense"

    @property
    def flops(self) -> int:
        """Multiplications and additions (2 a multiply-accumulate); taps that fall into the padding count."""
        positions = self.L_in if self.transposed else self.L_out
        return 2 * self.N * positions * self.C_out * self.C_in_per_group * self.K

    @property
    def bytes(self) -> int:
        """Fewest bytes to move through device memory: x, weight and bias read once, y written once."""
        weights = self.C_out * self.C_in_per_group * self.K if not self.transposed else self.C_in * self.C_out_per_group * self.K
        elements = self.N * (self.C_in * self.L_in + self.C_out * self.L_out) + weights
        return self.dtype.itemsize * (elements + self.C_out * self.has_bias)

    def floor_ms(self, bytes_per_s: float, flops_per_s: float) -> float:
        """Least time in ms on a device with these rates. Depthwise work is counted by its bytes alone."""
        compute = 0.0 if self.is_depthwise else self.flops / flops_per_s
        return 1e3 * max(self.bytes / bytes_per_s, compute)

    def describe(self) -> str:
        """One line in the field's terms, e.g. ``8x768x499 -> 768 K128 p64 g16 bf16 NLC``."""
        parts = [f"{self.N}x{self.C_in}x{self.L_in} -> {self.C_out} K{self.K}"]
        for letter, value, default in (
            ("s", self.stride, 1),
            ("p", self.padding, 0),
            ("e", self.padding_end, None),
            ("d", self.dilation, 1),
            ("op", self.output_padding, 0),
            ("g", self.groups, 1),
        ):
            if value != default:
                parts.append(f"{letter}{value}")
        parts += ["transposed"] * self.transposed + [self.padding_mode] * (self.padding_mode != "zeros")
        return " ".join([*parts, dtype_name(self.dtype), self.layout])


def starts_aligned(tensor: Tensor) -> bool:
    """Whether a tensor starts on 16 bytes; for tensors without memory, whether it would."""
    if type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type != "meta":
        return tensor.data_ptr() % 16 == 0
    # allocators align storages far beyond 16 bytes, so the offset decides
    return tensor.storage_offset() * tensor.element_size() % 16 == 0


def dtype_name(dtype: torch.dtype) -> str:
    """Short name of a dtype: fp32, bf16, fp16, fp64, or torch's own."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    return short.get(dtype, str(dtype).removeprefix("torch."))


def current_precision(dtype: torch.dtype) -> str:
    """How float32 products are formed, read from PyTorch's switch now: guards and cache keys do not cover it."""
    # torch.backends.cudnn.conv.fp32_precision, which takes the host seven times as long to get there
    return "tf32" if dtype == torch.float32 and torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32" else "ieee"


def output_length(L_in, K, stride, padding, dilation, transposed=False, output_padding=0):
    """Length of the output; plain arithmetic, so symbolic lengths pass through."""
    if transposed:
        return (L_in - 1) * stride - 2 * padding + dilation * (K - 1) + output_padding + 1
    return (L_in + 2 * padding - dilation * (K - 1) - 1) // stride + 1


def contiguous_strides(C: int, L: int) -> Strides:
    return (C * L, L, 1)


def layout_of(strides: Sequence[int], C: int, L: int) -> str:
    """Layout of an ``(N, C, L)`` tensor from its strides; strides of dimensions of size 1 do not count."""
    if strides[2] == 1 or L == 1:
        return "NCL"
    if strides[1] == 1 or C == 1:
        # a single channel is both layouts at once as long as its samples are contiguous
        return "NLC"
    return "strided"


def ceil_pow2(n: int) -> int:
    """Smallest power of two that is not below `n`; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def single(value: int | Sequence[int], name: str) -> int:
    """The one value of an ``int`` or one-element list, as torch reads such arguments."""
    if isinstance(value, (list, tuple)):
        if len(value) != 1:
            raise RuntimeError(
                f"expected {name} to be a single integer value or a list of 1 values to match the convolution dimensions, "
                f"but got {name}={list(value)}"
            )
        return value[0]
    return value


def check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    transposed: bool = False,
    output_padding: int = 0,
) -> None:
    """Raise what `torch.nn.functional.conv1d` / `conv_transpose1d` would, naming the argument and its value.

    `x` is ``(N, C_in, L_in)``. Raises RuntimeError. Lengths are compared through `torch._check`, so symbolic ones are allowed.
    """
    check_operands(x, weight, bias, stride, padding, dilation, groups, transposed, output_padding)
    _check_lengths(x, weight, stride, padding, dilation, transposed, output_padding)


def check_operands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    transposed: bool = False,
    output_padding: int = 0,
) -> None:
    """What `check_arguments` raises of everything but lengths."""
    function = "conv_transpose1d" if transposed else "conv1d"
    if x.dim() != 3:
        raise RuntimeError(f"Expected 2D (unbatched) or 3D (batched) input to {function}, but got input of size: {list(x.shape)}")
    if weight.dim() < 3:
        raise RuntimeError(f"weight should have at least three dimensions, but got weight of size {list(weight.shape)}")
    if weight.dim() > 3:
        raise RuntimeError(f"{function} expects a 3-dimensional weight, but got weight of size {list(weight.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise RuntimeError(f"Input type ({x.dtype}) and {name} type ({tensor.dtype}) should be the same")
        if tensor.device != x.device:
            raise RuntimeError(f"Input device ({x.device}) and {name} device ({tensor.device}) should be the same")
    if stride <= 0:
        raise RuntimeError(f"non-positive stride is not supported, but got stride={stride}")
    if padding < 0:
        raise RuntimeError(f"negative padding is not supported, but got padding={padding}")
    if dilation <= 0:
        raise RuntimeError(
            f"non-positive dilation is not supported (dilation should be greater than zero), but got dilation={dilation}"
        )
    if output_padding < 0:
        raise RuntimeError(f"negative output_padding is not supported, but got output_padding={output_padding}")
    if groups <= 0:
        raise RuntimeError(f"non-positive groups is not supported, but got groups={groups}")
    if weight.shape[0] < groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be at least {groups} at dimension 0, "
            f"but got weight of size {list(weight.shape)} instead"
        )
    if weight.shape[0] % groups:
        raise RuntimeError(
            f"Given groups={groups}, expected weight to be divisible by {groups} at dimension 0, "
            f"but got weight of size {list(weight.shape)} instead"
        )
    C_in = weight.shape[0] if transposed else weight.shape[1] * groups
    C_out = weight.shape[1] * groups if transposed else weight.shape[0]
    if x.shape[1] != C_in:
        raise RuntimeError(
            f"Given groups={groups}, weight of size {list(weight.shape)}, expected input{list(x.shape)} to have "
            f"{C_in} channels, but got {x.shape[1]} channels instead"
        )
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != C_out):
        raise RuntimeError(
            f"Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional with {C_out} elements, "
            f"but got bias of size {list(bias.shape)} instead"
        )
    if weight.shape[2] == 0:
        raise RuntimeError(f"Kernel size can't be zero, but got weight of size {list(weight.shape)}")
    if transposed and output_padding >= max(stride, dilation):
        raise RuntimeError(
            "output padding must be smaller than either stride or dilation, but got "
            f"output_padding={output_padding}, stride={stride}, dilation={dilation}"
        )


def _check_lengths(x, weight, stride, padding, dilation, transposed, output_padding) -> None:
    L_in, K = x.shape[2], weight.shape[2]
    if transposed:
        L_out = output_length(L_in, K, stride, padding, dilation, True, output_padding)
        torch._check(
            L_out > 0,
            lambda: (
                f"Given input length {L_in}, weight of size {list(weight.shape)}, padding={padding}, "
                f"output_padding={output_padding}: calculated output length {L_out} is too small"
            ),
        )
        return
    extent = dilation * (K - 1) + 1
    torch._check(
        L_in + 2 * padding >= extent,
        lambda: (
            f"Calculated padded input size per channel: ({L_in + 2 * padding}). Kernel size: ({extent}). "
            "Kernel size can't be greater than actual input size"
        ),
    )
