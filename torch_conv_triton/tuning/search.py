"""Which plans are worth a measurement for a problem: of each kernel family the configs around its heuristic one, and aten's ways.

Rules choose a tile from a few measured cases. What they miss is mostly a step away: a tile twice as large or half as large, one
more stage, the operands exchanged, a copy to NLC or none. So a family's grid is the product of such steps, of which those nearest
to the heuristic config are tried. The counts keep a problem to some forty plans, which 16 cores compile in a few seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import islice, product
from math import log2
from types import ModuleType

from torch_conv_triton import dispatch, dispatch_gradients
from torch_conv_triton.configs import Config, Device, gemm_config
from torch_conv_triton.configs_gradients import WeightGradConfig
from torch_conv_triton.configs_halo import RING_SLOTS
from torch_conv_triton.dispatch import ATEN, Plan
from torch_conv_triton.problem import Conv1dProblem, ceil_pow2, layout_of

# accumulators of a thread: with fewer the tile does not pay for its loads, with more it spills
FEWEST_ACCUMULATORS, MOST_ACCUMULATORS = 8, 128

Steps = Iterator[Config]
Accepts = Callable[[Config], bool]


def plans(problem: Conv1dProblem, device: Device) -> tuple[Plan, ...]:
    """The plans to time for a problem that the kernels support, the one by rule first, each kernel and config once."""
    rules = _rules(problem)
    proposed = [rules.plan_by_rule(problem, device)]
    for heuristic in reversed(rules.candidates(problem, device)):
        proposed.append(heuristic)
        steps = _STEPS.get(heuristic.kernel)
        # one channel a group leaves a matrix product almost empty
        if steps is not None and ("depthwise" in heuristic.kernel or "grad" in heuristic.kernel or not problem.is_depthwise):
            accepted = partial(_accepts, heuristic.kernel, problem, device)
            proposed += [
                Plan(heuristic.kernel, config, "searched") for config in steps(problem, device, heuristic.config, accepted)
            ]
    proposed += [plan for plan in (Plan(kernel, None, "searched") for kernel in ATEN) if _runs(plan, problem, device)]
    found: dict[tuple[str, Config | None], Plan] = {}
    for plan in proposed:
        found.setdefault((plan.kernel, plan.config), plan)
    return tuple(found.values())


def _runs(plan: Plan, problem: Conv1dProblem, device: Device) -> bool:
    return _rules(problem).plan_refusal(plan, problem, device) is None


def _rules(problem: Conv1dProblem) -> ModuleType:
    return dispatch if problem.kind == "forward" else dispatch_gradients


def _accepts(kernel: str, problem: Conv1dProblem, device: Device, config: Config) -> bool:
    return _runs(Plan(kernel, config, "searched"), problem, device)


def nearest(start: Config, count: int, accepted: Callable[[Config], bool], **axes: Iterable[object]) -> list[Config]:
    """The `count` accepted configs of the product of the axes, fields of `Config`, that are the fewest steps from `start`."""
    configs = (replace(start, **dict(zip(axes, values, strict=True))) for values in product(*axes.values()))
    return list(islice(filter(accepted, sorted(configs, key=partial(distance, start))), count))


def distance(a: Config, b: Config) -> float:
    """Steps between two configs: a factor of 2 is one, and so is one stage, one program more or a flag."""
    steps = 0.0
    for name in (field.name for field in fields(a)):
        x, y = getattr(a, name), getattr(b, name)
        if x != y:
            doubles = name.startswith("BLOCK") or name in ("num_warps", "splits")
            steps += abs(log2(x / y)) if doubles and x and y else abs(int(x) - int(y))
    return steps


def _product_tile(accepted: Callable[[Config], bool], config: Config) -> bool:
    accumulators = config.BLOCK_M * config.BLOCK_N // (32 * config.num_warps)
    return FEWEST_ACCUMULATORS <= accumulators <= MOST_ACCUMULATORS and accepted(config)


def _dense(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    accepted = partial(_product_tile, accepted)
    axes = {
        "BLOCK_M": (32, 64, 128, 256),
        "BLOCK_N": _channel_blocks(problem, 256),
        "BLOCK_K": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
        "weights_left": (False, True),
    }
    yield from nearest(start, 14, accepted, **axes)
    if problem.layout != "NLC":
        if start.copy_to_nlc:
            yield from nearest(replace(start, copy_to_nlc=False), 6, accepted, **axes)
        elif problem.C_in_per_group >= 64:
            # below, the copy costs more than the vectors that it allows gain
            nlc = replace(problem, x_strides=(problem.C_in * problem.L_in, 1, problem.C_in))
            yield from nearest(replace(gemm_config(nlc, device), copy_to_nlc=True, prefetch=False), 8, accepted, **axes)
    if start.tap_major and problem.C_in_per_group < 64:
        # a slice of all taps of a few channels fills where one of a tap's channels is mostly empty
        other = replace(start, tap_major=False, merge_taps=False, copy_to_nlc=False, prefetch=False)
        yield from nearest(other, 6, accepted, **axes)


def _dense_tma(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    yield from nearest(
        start,
        8,
        partial(_product_tile, accepted),
        BLOCK_M=(64, 128, 256),
        BLOCK_N=_channel_blocks(problem, 256),
        BLOCK_K=(16, 32, 64, 128),
        num_warps=(4, 8),
        num_stages=(2, 3, 4, 5),
    )


def _dense_persistent(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    # the weights take what shared memory there is, so tiles of x and their stages decide what fits
    yield from nearest(
        start,
        8,
        partial(_product_tile, accepted),
        BLOCK_M=(64, 128, 256),
        BLOCK_K=(16, 32, 64),
        num_warps=(4, 8),
        num_stages=(2, 3),
        programs_per_sm=(1, 2),
        weights_left=(False, True),
    )


def _dense_halo(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    # weights that stay leave the fewest steps, those that pass through leave room for larger tiles and more programs
    for slots in sorted({start.num_stages, problem.K * (problem.C_in // start.BLOCK_K), RING_SLOTS}):
        yield from nearest(
            replace(start, num_stages=slots),
            6,
            accepted,
            BLOCK_M=(128, 256, 512),
            num_warps=(4, 8),
            programs_per_sm=(1, 2, 3, 4),
            weights_left=(False, True),
            prefetch=(False, True),
        )


def _transposed(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    # it computes every phase apart, and wins only where the others do not run
    yield from nearest(
        start,
        6,
        partial(_product_tile, accepted),
        BLOCK_M=(64, 128),
        BLOCK_N=_channel_blocks(problem, 128),
        BLOCK_K=(16, 32, 64),
        num_warps=(4, 8),
        num_stages=(2, 3, 4),
    )


def _interleaved(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    # BLOCK_N counts phases too, so the heuristic one may be halved or doubled whatever the channels are
    axes = {
        "BLOCK_M": (16, 32, 64, 128, 256),
        "BLOCK_N": [size for size in (start.BLOCK_N // 2, start.BLOCK_N, 2 * start.BLOCK_N) if 16 <= size <= 256],
        "BLOCK_K": (16, 32, 64),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    }
    yield from nearest(start, 12, partial(_product_tile, accepted), **axes)
    if problem.layout != "NLC":
        other = replace(start, copy_to_nlc=not start.copy_to_nlc)
        yield from nearest(other, 6, partial(_product_tile, accepted), **axes)


def _transposed_tma(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    yield from nearest(
        start,
        10,
        partial(_product_tile, accepted),
        BLOCK_M=(64, 128),
        BLOCK_N=[size for size in (start.BLOCK_N // 2, start.BLOCK_N, 2 * start.BLOCK_N) if 16 <= size <= 256],
        BLOCK_K=(16, 32, 64),
        num_warps=(4, 8),
        num_stages=(2, 3, 4),
    )


def _depthwise(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    # it moves bytes: tiles long in the contiguous dimension of x, and enough elements a thread to keep loads in flight
    wide = {"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (16, 32, 64, 128, 256)}
    long = {"BLOCK_M": (32, 64, 128, 256, 512, 1024), "BLOCK_N": (1, 2, 4, 8, 16)}
    yield from nearest(
        start,
        10,
        lambda config: 4 <= config.BLOCK_M * config.BLOCK_N // (32 * config.num_warps) <= 32 and accepted(config),
        **(wide if problem.layout == "NLC" else long),
        num_warps=(1, 2, 4, 8),
    )


def _depthwise_bands(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    for warps in (1, 2):
        yield from nearest(replace(start, BLOCK_M=16 * warps, num_warps=warps), 6, accepted, run=(1, 2, 3, 4), steps=(1, 2, 4, 8))


def _depthwise_short(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    yield from nearest(
        start,
        8,
        lambda config: 32 * config.num_warps <= config.BLOCK_M * config.BLOCK_N <= 256 * config.num_warps and accepted(config),
        BLOCK_M=(1, 2, 4, 8),
        BLOCK_N=(32, 64, 128, 256),
        num_warps=(1, 2, 4, 8),
    )


def _depthwise_vector(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    vector = 16 // problem.dtype.itemsize
    yield from nearest(
        start,
        8,
        lambda config: config.BLOCK_M // (32 * config.num_warps * vector) in (1, 2, 4) and accepted(config),
        BLOCK_M=(128, 256, 512, 1024, 2048, 4096),
        num_warps=(1, 2, 4),
    )


def _depthwise_sliding(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    # a thread has one vector of channels and one run of outputs, so warps follow from the tile
    vector = 16 // problem.dtype.itemsize
    yield from nearest(
        start,
        10,
        lambda config: 32 * config.num_warps * vector * config.run == config.BLOCK_M * config.BLOCK_N and accepted(config),
        BLOCK_M=(16, 32, 64, 128, 256),
        BLOCK_N=(16, 32, 64, 128),
        num_warps=(1, 2, 4, 8),
        run=(2, 4, 8) if problem.K <= 4 else (2, 4),
    )


def _depthwise_skewed(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    vector = 16 // problem.dtype.itemsize
    yield from nearest(
        start,
        8,
        lambda config: 32 * config.num_warps * vector * config.run == config.BLOCK_M * config.BLOCK_N and accepted(config),
        BLOCK_M=(32, 64, 128, 256),
        BLOCK_N=(16, 32, 64, 128),
        num_warps=(1, 2, 4, 8),
        run=(start.run // 2, start.run),
        steps=(1, 2),
    )


def _depthwise_toeplitz(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    # a run of 0 is the loop over products that are too many to be written out
    yield from nearest(
        start,
        14,
        lambda config: 64 * 32 * config.num_warps >= config.BLOCK_M * config.BLOCK_N and accepted(config),
        BLOCK_M=(16, 32, 64, 128),
        BLOCK_N=(16, 32, 64),
        BLOCK_K=(16, 32, 64),
        num_warps=(1, 2, 4),
        run=(1, 2, 3, 4) if start.run else (0,),
        steps=(1, 2, 4, 8),
    )


def _weight_grad(problem: Conv1dProblem, device: Device, start: WeightGradConfig, accepted: Accepts) -> Steps:
    def left(config: WeightGradConfig) -> bool:
        # of the two sides of a product, the one with 64 rows is to be on the left
        return config.grad_left == (config.BLOCK_O >= 64 or config.BLOCK_C < 64) and accepted(config)

    axes = {
        "BLOCK_O": (32, 64, 128, 256),
        "BLOCK_C": (16, 32, 64, 128, 256),
        "BLOCK_L": (16, 32, 64, 128),
        "splits": _splits(start),
        "num_warps": (4, 8),
        "num_stages": (1,) if start.prefetch else (2, 3, 4),
        "grad_left": (False, True),
    }
    yield from nearest(start, 16, left, **axes)
    if problem.dtype.itemsize == 2 and "NCL" in (problem.layout, layout_of(problem.y_strides, problem.C_out, problem.L_out)):
        yield from nearest(replace(start, tap_major=True, prefetch=False, copy_to_nlc=not start.copy_to_nlc), 6, left, **axes)
    if not start.prefetch:
        return
    yield from nearest(replace(start, tap_major=not start.tap_major), 6, left, **axes)
    if problem.stride == 1:
        yield from nearest(replace(start, exchanged=not start.exchanged), 6, left, **axes)


def _weight_grad_pointwise(problem: Conv1dProblem, device: Device, start: WeightGradConfig, accepted: Accepts) -> Steps:
    yield from nearest(
        start,
        20,
        accepted,
        BLOCK_O=(64, 128, 256),
        BLOCK_C=(64, 128, 256),
        BLOCK_L=(32, 64, 128),
        splits=_splits(start),
        num_warps=(4, 8),
        num_stages=(3, 4, 5),
    )


def _weight_grad_rows(problem: Conv1dProblem, device: Device, start: WeightGradConfig, accepted: Accepts) -> Steps:
    yield from _weight_grad(problem, device, start, accepted)
    if problem.K > 1:
        yield from _weight_grad(problem, device, replace(start, tap_rows=True), accepted)


def _weight_grad_depthwise(problem: Conv1dProblem, device: Device, start: WeightGradConfig, accepted: Accepts) -> Steps:
    yield from nearest(
        start,
        16,
        lambda config: 64 * config.num_warps <= config.BLOCK_O * config.BLOCK_L and accepted(config),
        BLOCK_O=(1, 2, 4, 8, 16, 32, 64, 128),
        BLOCK_C=(1, 2, 4, 8),
        BLOCK_L=(4, 8, 16, 32, 64, 128, 256, 512, 1024),
        splits=_splits(start),
        num_warps=(1, 2, 4, 8),
    )


def _weight_grad_sliding(problem: Conv1dProblem, device: Device, start: WeightGradConfig, accepted: Accepts) -> Steps:
    vector = 16 // problem.dtype.itemsize
    yield from nearest(
        start,
        16,
        lambda config: 32 * config.num_warps * vector * config.BLOCK_C == config.BLOCK_O * config.BLOCK_L and accepted(config),
        BLOCK_O=(16, 32, 64, 128),
        BLOCK_C=(2, 4, 8),
        BLOCK_L=(16, 32, 64, 128, 256, 512),
        splits=_splits(start),
        num_warps=(1, 2, 4),
    )


def _weight_grad_banded(problem: Conv1dProblem, device: Device, start: WeightGradConfig, accepted: Accepts) -> Steps:
    yield from nearest(
        start,
        16,
        accepted,
        BLOCK_O=(1, 2, 4, 8),
        BLOCK_C=(16, 32),
        BLOCK_L=(256, 512, 1024),
        splits=_splits(start),
        num_warps=(2, 4, 8),
        num_stages=(1, 2, 3),
    )


def _splits(start: WeightGradConfig) -> Sequence[int]:
    return sorted({max(1, start.splits // 2), start.splits, 2 * start.splits})


def _few_outputs(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    vector = 16 // problem.dtype.itemsize
    yield from nearest(
        start,
        10,
        lambda config: config.BLOCK_M * config.BLOCK_K // (32 * config.num_warps * vector) in (1, 2) and accepted(config),
        BLOCK_M=(32, 64, 128, 256, 512, 1024, 2048),
        BLOCK_K=[size for size in (1, 2, 4, 8, 16, 32, 64) if size <= ceil_pow2(problem.C_in)],
        num_warps=(2, 4, 8),
    )


def _few_inputs(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    vector = 16 // problem.dtype.itemsize
    yield from nearest(
        start,
        8,
        lambda config: config.BLOCK_M // (32 * config.num_warps * vector) in (1, 2) and accepted(config),
        BLOCK_M=(128, 256, 512, 1024, 2048, 4096),
        BLOCK_N=(8, 16, 32, 64),
        num_warps=(2, 4, 8),
    )


def _runs_of_outputs(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    yield from nearest(
        start,
        10,
        partial(_product_tile, accepted),
        BLOCK_M=(64, 128, 256),
        BLOCK_N=(64, 128, 256),
        BLOCK_K=(32, 64),
        num_warps=(4, 8),
        num_stages=(2, 3, 4),
        run=(2, 4, 8),
    )


def _frames(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    # the copy of x rounds it, where threads would otherwise do so in registers
    for copied in (False, True):
        yield from nearest(
            replace(start, copy_to_nlc=copied),
            6,
            partial(_product_tile, accepted),
            BLOCK_M=(64, 128, 256),
            BLOCK_N=_channel_blocks(problem, 256),
            BLOCK_K=(32, 64),
            num_warps=(4, 8),
            num_stages=(2, 3, 4),
        )


def _skewed(problem: Conv1dProblem, device: Device, start: Config, accepted: Callable[[Config], bool]) -> Steps:
    yield from nearest(
        start,
        6,
        partial(_product_tile, accepted),
        BLOCK_M=(64, 128, 256),
        BLOCK_N=(64, 128),
        num_warps=(2, 4, 8),
    )


def _channel_blocks(problem: Conv1dProblem, most: int) -> Sequence[int]:
    """Powers of two that the output channels of a group fill, from a quarter of them on."""
    whole = max(16, ceil_pow2(problem.C_out_per_group))
    return [size for size in (16, 32, 64, 128, 256) if min(whole, most) // 4 <= size <= min(whole, most)]


_STEPS: dict[str, Callable[[Conv1dProblem, Device, Config, Callable[[Config], bool]], Steps]] = {
    "dense": _dense,
    "dense_tma": _dense_tma,
    "dense_persistent": _dense_persistent,
    "dense_few_inputs": _few_inputs,
    "dense_few_outputs": _few_outputs,
    "dense_frames": _frames,
    "dense_runs": _runs_of_outputs,
    "dense_skewed": _skewed,
    "dense_halo": _dense_halo,
    "transposed": _transposed,
    "transposed_interleaved": _interleaved,
    "transposed_tma": _transposed_tma,
    "depthwise": _depthwise,
    "depthwise_bands": _depthwise_bands,
    "depthwise_short": _depthwise_short,
    "depthwise_vector": _depthwise_vector,
    "depthwise_skewed": _depthwise_skewed,
    "depthwise_sliding": _depthwise_sliding,
    "depthwise_toeplitz": _depthwise_toeplitz,
    "weight_grad": _weight_grad,
    "weight_grad_pointwise": _weight_grad_pointwise,
    "weight_grad_rows": _weight_grad_rows,
    "weight_grad_depthwise": _weight_grad_depthwise,
    "weight_grad_sliding": _weight_grad_sliding,
    "weight_grad_banded": _weight_grad_banded,
}
