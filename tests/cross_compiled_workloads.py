"""Print, as JSON, what the compiler makes of the kernels that real calls run.

The first argument says which: ``heuristics`` for each NVIDIA architecture, ``gfx942`` for an AMD one, or ``tables``, the entries
of the shipped tables. The other two say which part of how many. A program of its own because tests without a GPU run kernels in
the interpreter, and a process either interprets or compiles, for one maker of GPUs.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from unittest import mock

import torch
from cross_compile import LOCAL_MEMORY_GFX942, SHARED_MEMORY, Compiled, compile_only

from torch_conv_triton import dispatch, dispatch_gradients, execute, gradients
from torch_conv_triton.bench.suite import load_suite
from torch_conv_triton.configs import Device
from torch_conv_triton.problem import Conv1dProblem
from torch_conv_triton.tuning import tables
from torch_conv_triton.tuning.trial import run


@dataclass(frozen=True)
class Workload:
    """A call of a real model, in the regime that its name says."""

    name: str
    x: tuple[int, int, int]
    weight: tuple[int, int, int]
    dtype: torch.dtype
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    transposed: bool = False
    nlc: bool = False
    full_precision: bool = False
    # also compile the kernels with a residual, an activation and both values stored
    fused: bool = False
    # only so, on an input of TF32 values
    rounded: bool = False
    # only with a gate of both halves of the channels, to which something was added for each sample, and with a residual
    gated: bool = False

    def __str__(self) -> str:
        return self.name


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
WORKLOADS = (
    Workload("seed_fp32", (64, 64, 224280), (128, 64, 3), FP32, stride=3, dilation=4, fused=True),
    Workload("seed_fp32_full_precision", (64, 64, 224280), (128, 64, 3), FP32, stride=3, dilation=4, full_precision=True),
    Workload("seed_bf16", (64, 64, 224280), (128, 64, 3), BF16, stride=3, dilation=4),
    Workload("seed_bf16_nlc", (64, 64, 224280), (128, 64, 3), BF16, stride=3, dilation=4, nlc=True),
    Workload("vocoder_rounded", (8, 64, 38400), (64, 64, 7), FP32, padding=3, nlc=True, rounded=True),
    Workload("vocoder_rounded_256_channels", (8, 256, 2400), (256, 256, 7), FP32, padding=3, nlc=True, rounded=True),
    Workload("vocoder_rounded_128_channels", (8, 128, 9600), (128, 128, 3), FP32, padding=1, nlc=True, rounded=True),
    Workload("vocoder_rounded_channels_first", (8, 32, 153600), (32, 32, 7), FP32, padding=3, rounded=True),
    Workload("codec_rounded_pointwise", (4, 96, 220160), (96, 96, 1), FP32, nlc=True, rounded=True),
    Workload("vocoder_32_channels", (8, 32, 153600), (32, 32, 3), FP32, padding=1),
    Workload("encoder_512_channels", (16, 512, 31999), (512, 512, 3), FP16, stride=2, fused=True),
    Workload("vocoder_64_channels", (8, 64, 38400), (64, 64, 11), FP32, padding=25, dilation=5),
    Workload("vocoder_32_channels_bf16", (16, 32, 131072), (32, 32, 7), BF16, padding=9, dilation=3),
    Workload("codec_96_channels", (8, 96, 131072), (96, 96, 7), FP32, padding=27, dilation=9),
    Workload("letters_250_channels", (16, 250, 1000), (250, 250, 48), FP32, stride=2, padding=23, fused=True),
    Workload("letters_2000_channels", (16, 250, 500), (2000, 250, 32), FP32, padding=16),
    Workload("mel_80_channels", (16, 80, 3000), (512, 80, 5), FP16, padding=2),
    Workload("raw_audio", (16, 1, 160000), (512, 1, 10), FP16, stride=5),
    Workload("positional", (16, 768, 499), (768, 48, 128), FP16, padding=64, groups=16, nlc=True),
    Workload("positional_fp32", (8, 768, 499), (768, 48, 128), FP32, padding=64, groups=16, nlc=True),
    Workload("long_filters", (128, 32, 1000), (32, 32, 39), FP32, padding=19),
    Workload("long_filters_full_precision", (128, 32, 1000), (32, 32, 39), FP32, padding=19, full_precision=True),
    Workload("filterbank", (32, 1, 321024), (513, 1, 1024), FP32, stride=320),
    Workload("filterbank_fp16", (32, 1, 321024), (400, 1, 640), FP16, stride=160, fused=True),
    Workload("first_layer", (12, 1, 16758), (64, 1, 7), FP32, padding=3),
    Workload("last_layer", (8, 32, 220160), (1, 32, 7), FP32, padding=3),
    Workload("last_layer_bf16", (8, 32, 220166), (2, 32, 7), BF16, padding=3),
    Workload("upsample", (8, 128, 9600), (128, 64, 4), FP32, stride=2, padding=1, transposed=True),
    Workload("upsample_full_precision", (8, 128, 9600), (128, 64, 4), FP32, 2, 1, transposed=True, full_precision=True),
    Workload("upsample_many_channels", (4, 1536, 430), (1536, 768, 16), FP32, stride=8, padding=4, transposed=True),
    Workload("upsample_taps_left_over", (4, 768, 1500), (768, 384, 7), FP32, stride=3, padding=2, transposed=True),
    Workload("upsample_taps_left_over_fp16", (8, 512, 3000), (512, 256, 11), FP16, stride=5, padding=3, transposed=True),
    Workload("upsample_phases_apart", (16, 32, 131072), (32, 64, 3), FP32, stride=2, padding=1, dilation=2, transposed=True),
    Workload("depthwise_ncl", (8, 5120, 2048), (5120, 1, 7), BF16, padding=3, groups=5120),
    Workload("depthwise_causal", (8, 5120, 2048), (5120, 1, 4), BF16, padding=3, groups=5120),
    Workload("depthwise_middle", (16, 512, 1500), (512, 1, 31), BF16, padding=15, groups=512, fused=True),
    Workload("depthwise_fp32", (16, 512, 938), (512, 1, 7), FP32, padding=3, groups=512),
    Workload("depthwise_very_long", (8, 768, 16384), (768, 1, 2048), BF16, padding=1024, groups=768),
    Workload("depthwise_upsample", (1, 192, 9010), (192, 1, 12), FP32, stride=2, groups=192, transposed=True),
    Workload("depthwise_fp32_nlc", (16, 512, 938), (512, 1, 7), FP32, padding=3, groups=512, nlc=True),
    Workload("depthwise", (8, 5120, 2048), (5120, 1, 4), BF16, padding=3, groups=5120, nlc=True),
    Workload("depthwise_decoding", (64, 5376, 5), (5376, 1, 4), BF16, groups=5376),
)


WORKLOADS += (
    Workload("gated_wavenet", (8, 192, 400), (384, 192, 5), FP32, padding=2, gated=True),
    Workload("gated_wavenet_rounded", (8, 192, 6000), (384, 192, 5), FP32, padding=2, nlc=True, rounded=True, gated=True),
    Workload("gated_dilated", (8, 64, 16000), (128, 64, 2), FP32, dilation=4, gated=True),
    Workload("gated_conformer", (16, 1024, 375), (2048, 1024, 1), BF16, nlc=True, gated=True),
    Workload("gated_conformer_channels_first", (16, 512, 375), (1024, 512, 1), BF16, gated=True),
    Workload("gated_3_taps", (16, 512, 2000), (1024, 512, 3), BF16, nlc=True, gated=True),
    Workload("codec_rounded_192_channels", (4, 192, 110080), (192, 192, 7), FP32, padding=3, nlc=True, rounded=True),
)


H200 = Device("NVIDIA H200", 90, sm_count=132, shared_memory=SHARED_MEMORY[90])
# what an AMD GPU has in common with the least of the NVIDIA ones: neither block copies nor much shared memory
GFX942 = Device("gfx942", 80, sm_count=304, shared_memory=LOCAL_MEMORY_GFX942)


def compiled_kernels(workload: Workload, device: Device, capability: int | None) -> list[dict]:
    """Every plan of the workload on `device`, with the kernels it launches."""
    N, C_in, L_in = workload.x
    if workload.nlc:
        x = torch.empty((N, L_in, C_in), dtype=workload.dtype, device="meta").transpose(1, 2)
    else:
        x = torch.empty(workload.x, dtype=workload.dtype, device="meta")
    weight = torch.empty(workload.weight, dtype=workload.dtype, device="meta")
    geometry = workload.stride, workload.padding, workload.dilation, workload.groups, workload.transposed
    precision = "tf32" if workload.dtype == FP32 and not workload.full_precision else "ieee"
    problem = replace(Conv1dProblem.from_tensors(x, weight, None, *geometry), precision=precision, rounded=workload.rounded)
    rows = []
    plans = [*dispatch.candidates(problem, device)]
    if workload.rounded:
        # what follows has a say in the tile
        plans += {dispatch.fused_plan(problem, device, beside) for beside in (False, True)}.difference(plans)
    if workload.gated:
        plans = [plan for plan in plans if plan.kernel in dispatch.HALVING]
    for plan in plans:
        if problem.is_depthwise and not plan.kernel.startswith("depthwise"):
            continue
        if (
            (workload.fused or workload.rounded or workload.gated)
            and plan.kernel in dispatch.FUSING
            and plan.kernel != "dense_persistent"
        ):
            with mock.patch.object(dispatch, "device_for", lambda _: device), compile_only(capability) as compiled:
                (_launch_gated if workload.gated else _launch_fused)(plan, problem, x, weight)
            rows.append(_row(plan, compiled))
        if workload.rounded or workload.gated:
            continue
        with mock.patch.object(dispatch, "device_for", lambda _: device), compile_only(capability) as compiled:
            execute.forward_with(plan, problem, x, weight, None)
        rows.append(_row(plan, compiled))
    if workload.rounded or workload.gated:
        return rows
    grad_output = torch.empty((N, problem.C_out, problem.L_out), dtype=workload.dtype, device="meta")
    if workload.nlc:
        grad_output = grad_output.transpose(1, 2).contiguous().transpose(1, 2)
    pair = (x, grad_output) if workload.transposed else (grad_output, x)
    problem = replace(dispatch_gradients.weight_grad_problem(*pair, problem.K, *geometry[:4]), precision=precision)
    for plan in dispatch_gradients.weight_grad_candidates(problem, device):
        with compile_only(capability) as compiled:
            gradients.weight_grad_with(plan, problem, *pair)
        rows.append(_row(plan, compiled))
    return rows


def _launch_fused(plan: dispatch.Plan, problem: Conv1dProblem, x: torch.Tensor, weight: torch.Tensor) -> None:
    from torch_conv_triton.kernels.epilogue import Fusion

    y, second, residual = (x.new_empty((problem.N, problem.C_out, problem.L_out)) for _ in range(3))
    if problem.rounded and problem.layout == "NLC":
        y, second, residual = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (y, second, residual))
    activation = "sin %1; pow2 %2; add %1 %3" if problem.rounded else "mul %1 0.1; gt %1 0.0; where %3 %1 %2"
    text = f"ncl; add %0 a0; {activation}; out %4; out %1"
    execute.launch_kernel(plan, problem, x, weight, None, y, Fusion(text, (second, residual), rounded=problem.rounded))


def _launch_gated(plan: dispatch.Plan, problem: Conv1dProblem, x: torch.Tensor, weight: torch.Tensor) -> None:
    from torch_conv_triton.kernels.epilogue import Fusion

    C = problem.C_out // 2
    y, residual = (x.new_empty((problem.N, C, problem.L_out)) for _ in range(2))
    condition = x.new_empty((problem.N, C, 1))
    text = "nc nc ncl; halve; add %0 a0; add %1 a1; tanh %2; sigmoid %3; mul %4 %5; add %6 a2; out %7"
    fusion = Fusion(text, (condition, condition, residual), rounded=problem.rounded)
    execute.launch_kernel(plan, problem, x, weight, None, y, fusion)


def _row(plan: dispatch.Plan, compiled: list[Compiled]) -> dict:
    # the sum of the partial sums of a weight's gradient comes last
    kernels = [asdict(kernel) | {"ptx": None} for kernel in compiled if kernel.name != "sum_partials_kernel"]
    return {"plan": f"{plan.kernel} {plan.config}", "kernel": plan.kernel, "compiled": kernels}


def tuned(part: slice = slice(None)) -> dict[str, tuple[Conv1dProblem, dispatch.Plan]]:
    """By key, a problem of each entry of the H200's table that a case of the suite has, with the entry's plan.

    Channels-last convolutions may have a channels-first gradient too.
    """
    found = {}
    for case in load_suite()[part]:
        contiguous = case.grad_output("meta").contiguous()
        for problem in (case.problem(), *case.gradient_problems(), *case.gradient_problems(grad_output=contiguous)):
            plan = dispatch.tuned_plan(problem, H200, dispatch_gradients.plan_refusal)
            if plan is not None:
                found.setdefault(tables.key(problem), (problem, plan))
    return found


def tuned_kernels(part: slice) -> dict[str, list[dict]]:
    """The plan of each `tuned` problem with the kernels it launches, by key."""
    found = {}
    for key, (problem, plan) in tuned(part).items():
        compiled: list[Compiled] = []
        if not plan.is_aten:
            with mock.patch.object(dispatch, "device_for", lambda _: H200), compile_only(H200.capability) as compiled:
                run(plan, problem, tensors(problem))
        found[key] = [_row(plan, compiled)]
    return found


def tensors(problem: Conv1dProblem) -> tuple[torch.Tensor, ...]:
    """What a plan of the problem is run on, without data."""
    p = problem
    x = torch.empty_strided((p.N, p.C_in, p.L_in), p.x_strides, dtype=p.dtype, device="meta")
    if p.kind == "weight_grad":
        return torch.empty_strided((p.N, p.C_out, p.L_out), p.y_strides, dtype=p.dtype, device="meta"), x, None
    shape = (p.C_in, p.C_out_per_group, p.K) if p.transposed else (p.C_out, p.C_in_per_group, p.K)
    return x, x.new_empty(shape), x.new_empty(p.C_out) if p.has_bias else None


def targets(workload: Workload) -> tuple[int, ...]:
    """Architectures to compile a workload for: one of four for all, the others for three unless ALL_TARGETS=1 says so."""
    everywhere = workload in WORKLOADS[3::4] or os.environ.get("ALL_TARGETS") == "1"
    return tuple(SHARED_MEMORY) if everywhere else (80, 89, 90)


def on_nvidia(part: slice) -> dict[str, dict[int, list[dict]]]:
    devices = {c: Device(f"sm_{c}", c, sm_count=128, shared_memory=memory) for c, memory in SHARED_MEMORY.items()}
    return {str(w): {c: compiled_kernels(w, devices[c], c) for c in targets(w)} for w in WORKLOADS[part]}


def on_amd(part: slice) -> dict[str, list[dict]]:
    # kernels ask it when they are imported, which launching them does
    torch.version.hip = "6.0"
    return {str(w): compiled_kernels(w, GFX942, None) for w in WORKLOADS[part] if len(targets(w)) > 3}


if __name__ == "__main__":
    what = {"heuristics": on_nvidia, "gfx942": on_amd, "tables": tuned_kernels}
    part = slice(int(sys.argv[2]), None, int(sys.argv[3]))
    json.dump(what[sys.argv[1]](part), sys.stdout)
