"""Tiles of the kernel that keeps a tile of x with its halo in shared memory. Measured on an H200; ms in comments."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch_conv_triton.configs import INTERPRETER, Config, Device
from torch_conv_triton.problem import INT32_MAX, Conv1dProblem, ceil_pow2

# products written out one by one; beyond, the weights pass through and the loop stays a loop
MOST_RESIDENT_TILES = 48
# slots for weights that pass through: two are being filled, one is read, one is still being read
RING_SLOTS = 4
# shared memory of a multiprocessor of sm_90, of which every program takes 1 KB more than it asks for
SHARED_MEMORY_PER_SM = 228 * 1024


@dataclass(frozen=True, slots=True)
class HaloShape:
    """What follows from a problem and a config.

    A tile of x begins `lead` rows early, so that its loads are aligned; it has `step` outputs, and its last taps read `extra`
    rows beyond it. `slots` weight tiles are in shared memory. x is loaded `x_vector` positions at a time, and y, which passes
    through shared memory if `staged`, is stored `y_vector` at a time. `shared_memory` is in bytes.
    """

    lead: int
    step: int
    extra: int
    slots: int
    x_vector: int
    y_vector: int
    staged: bool
    shared_memory: int

    @classmethod
    def of(cls, problem: Conv1dProblem, config: Config) -> HaloShape:
        """The shape of a plain problem that `halo_refusal` accepts with the config."""
        itemsize = problem.dtype.itemsize
        x_vector = _x_vector(problem, config)
        lead = -problem.padding % x_vector
        reach = lead + (problem.K - 1) * problem.dilation
        slots = min(config.num_stages, problem.K * (problem.C_in // config.BLOCK_K))
        extra = -(-reach // 8) * 8
        weights = slots * config.BLOCK_N * config.BLOCK_K * itemsize
        x_tile = config.BLOCK_M * problem.C_in * itemsize + 16 * extra
        outputs = max(x_tile, 4 * config.BLOCK_M * config.BLOCK_N)
        staged = _stages(problem, config) and _fits(weights + outputs, config)
        return cls(
            lead=lead,
            # every tile begins on a sector of memory
            step=(config.BLOCK_M - reach) // 16 * 16,
            extra=extra,
            slots=slots,
            x_vector=x_vector,
            y_vector=_vector(16 // itemsize, problem.L_out, *problem.y_strides[:2]) if problem.y_strides[2] == 1 else 1,
            staged=staged,
            shared_memory=weights + (outputs if staged else x_tile),
        )


def _fits(shared_memory: int, config: Config) -> bool:
    return (shared_memory + 1024) * config.programs_per_sm <= SHARED_MEMORY_PER_SM


def _vector(most: int, *lengths: int) -> int:
    """The largest power of two, at most `most`, that divides all lengths."""
    while any(length % most for length in lengths):
        most //= 2
    return most


def _x_vector(problem: Conv1dProblem, config: Config) -> int:
    """Positions of x a load: more are fewer instructions, but conflicts in the banks of shared memory.

    64 -> 128 K3: 4 at a time 1.20, 2 at a time 1.23; 32 -> 32 K7: 0.152 and 0.137.
    """
    chunk = 16 // problem.dtype.itemsize
    # a warp has 32 vectors of rows; warps that have no rows left take other chunks
    most = min(4 if problem.C_out > problem.C_in else 2, config.BLOCK_M // 32)
    while most > 1 and config.num_warps * chunk * 32 * most > config.BLOCK_M * config.BLOCK_K:
        most //= 2
    return _vector(most, problem.L_in, *problem.x_strides[:2])


def _stages(problem: Conv1dProblem, config: Config) -> bool:
    """Whether outputs are worth the way through shared memory.

    From the accumulators a store has 8 positions of 4 channels: whole sectors of float32 if rows begin on one. 64 -> 128 K3, with
    rows that do not, 1.23 against 1.45, in bfloat16 0.71 against 1.82; 32 -> 32 K7, with rows that do, 0.137 against 0.148 in
    tiles of 256 rows and 0.148 against 0.140 in tiles of 128.
    """
    if problem.y_strides[2] != 1:
        # channels-last: the accumulators hold whole sectors of channels
        return False
    return config.BLOCK_M >= 256 or problem.dtype.itemsize == 2 or problem.L_out % 8 != 0


def halo_config(problem: Conv1dProblem) -> Config:
    """The config for a plain problem; `halo_refusal` says whether it can be had."""
    BLOCK_N = min(128, max(16, ceil_pow2(problem.C_out)))
    BLOCK_K = 64 if problem.C_in % 64 == 0 and problem.C_in < 128 else 32
    if problem.dtype.itemsize == 4:
        config = _config_32bit(problem, BLOCK_N, BLOCK_K)
    else:
        # 32 -> 32 K7 256 w8 0.116, w4 0.121; 64 -> 64 K11 128 w4 0.210, 256 w4 0.231; 64 -> 128 K3 128 w4 p2 0.670, w8 p1 0.768
        rows, warps = (256, 8) if BLOCK_N <= 32 else (128, 4)
        config = Config(rows, BLOCK_N, BLOCK_K, num_warps=warps, programs_per_sm=2, prefetch=True)
    if problem.y_strides[2] != 1:
        # 64 -> 64 K7 with Snake 0.880 with the weights on the left
        config = replace(config, weights_left=False)
    reach = (problem.K - 1) * problem.dilation
    while config.BLOCK_M < 512 and 2 * reach > config.BLOCK_M:
        config = replace(config, BLOCK_M=2 * config.BLOCK_M, num_warps=8)
    tiles_w = problem.K * -(-problem.C_in // BLOCK_K)
    resident = replace(config, num_stages=tiles_w)
    alone = replace(resident, programs_per_sm=1)
    if (
        config.num_stages != RING_SLOTS
        and tiles_w <= MOST_RESIDENT_TILES
        and _fits(HaloShape.of(problem, alone).shared_memory, alone)
    ):
        config = resident
    else:
        config = replace(config, num_stages=RING_SLOTS)
    while config.programs_per_sm > 1 and not _fits(HaloShape.of(problem, config).shared_memory, config):
        config = replace(config, programs_per_sm=config.programs_per_sm - 1)
    if config.programs_per_sm == 1 and config.BLOCK_M >= 256:
        # p31, whose weights leave room for one program, w8 0.058, w4 0.059
        config = replace(config, num_warps=8)
    return config


def _config_32bit(problem: Conv1dProblem, BLOCK_N: int, BLOCK_K: int) -> Config:
    if problem.C_in > 64:
        if problem.C_in == BLOCK_N == 128:
            # p05 256 w8 0.398, 128 w8 0.404; x_hifi128_k7 0.086 and 0.095
            return Config(256, BLOCK_N, BLOCK_K, num_warps=8, num_stages=RING_SLOTS)
        # p06 with the weights on the left 0.227, on the right 0.262; x_dac96 128 w4 p2 0.68, 256 w8 p1 0.82
        return Config(128, BLOCK_N, BLOCK_K, 4, RING_SLOTS, programs_per_sm=2, weights_left=BLOCK_N == 64)
    if BLOCK_N <= 32:
        # p17 p3 0.102, p5 0.107; x_hifi32_k3 p2 0.087
        return Config(256, BLOCK_N, BLOCK_K, num_warps=4, programs_per_sm=3 if BLOCK_N == 16 else 2, prefetch=True)
    if BLOCK_N == 128 or problem.C_in == 32:
        # kb67 128x128 w8 1.20, without prefetch 2.0; kb74 256x64 w8 0.531
        return Config(128 if BLOCK_N == 128 else 256, BLOCK_N, BLOCK_K, num_warps=8, prefetch=True)
    if problem.K <= 3:
        # p07 256 w8 p2 0.104, 128 w4 p2 with prefetch 0.106; 8 x 64 x 38400 K3 0.064 and 0.066, rounded, with a leaky ReLU and L2
        # flushed w8 0.098, w4 0.070
        warps = 4 if problem.rounded else 8
        return Config(256, BLOCK_N, BLOCK_K, num_warps=warps, programs_per_sm=2, weights_left=True)
    if problem.K <= 7:
        # x_dac64k7d9 0.258, with the weights on the right 0.262, passing through 0.292
        return Config(256, BLOCK_N, BLOCK_K, num_warps=8, weights_left=True, prefetch=True)
    # x_hifi64_k11, weights resident, 128 w4 0.126; passing through 0.130, 256 w4 0.137
    return Config(128, BLOCK_N, BLOCK_K, num_warps=4, prefetch=True)


def halo_refusal(problem: Conv1dProblem, device: Device, config: Config) -> str | None:
    """Why x cannot be kept with its halo in shared memory with this config, or None."""
    if device == INTERPRETER or device.capability != 90:
        return "its products are instructions of sm_90"
    if problem.dtype.itemsize == 4 and problem.precision == "ieee":
        return "full float32 takes three products of split operands"
    if problem.stride > 1 or problem.groups > 1:
        return "taps of a stride or of groups are not rows of one tile"
    if problem.x_strides[2] != 1 or problem.K == 1:
        return "there is no halo to keep, or x is not channels-first"
    if problem.C_in % config.BLOCK_K or problem.C_in > 128 or config.BLOCK_K < 32:
        return "the channels are not a few multiples of 32"
    if max((problem.C_in - 1) * problem.x_strides[1] + problem.L_in, problem.L_out) > INT32_MAX // 2:
        return "offsets in a sample of x pass 2^30"
    if 2 * (problem.K - 1) * problem.dilation > config.BLOCK_M:
        return "the halo is larger than half a tile"
    if config.weights_left and problem.y_strides[2] != 1:
        return "the accumulators hold positions in a row, and y is channels-last"
    accumulators = config.BLOCK_M * config.BLOCK_N // (32 * config.num_warps)
    rows = config.BLOCK_N if config.weights_left else config.BLOCK_M
    if config.num_warps not in (4, 8) or rows < 64 or accumulators > 128:
        return "a tile is not what one or two warp groups compute"
    tiles_w = problem.K * (problem.C_in // config.BLOCK_K)
    if config.num_stages < min(RING_SLOTS, tiles_w) or config.num_stages >= tiles_w > MOST_RESIDENT_TILES:
        return "too few slots for weights, or too many products"
    shared_memory = HaloShape.of(problem, config).shared_memory
    if shared_memory > device.shared_memory or not _fits(shared_memory, config):
        return "it does not fit into shared memory, as many programs as there are to be"
    return None


def halo_wins(problem: Conv1dProblem, device: Device, config: Config) -> bool:
    """Whether it beats gathering x once a tap: with enough tiles to walk over, and work that the other kernels do not do as well.

    ms, of the others in brackets: 32 -> 32 K3 0.087 (0.137), K7 0.137 (0.232), K11 0.167 (0.327), K39 0.058 (0.120), in bfloat16
    K7 0.116 (0.282); 64 -> 64 K3 0.064 (0.083), K7 0.258 (0.390), K11 0.126 (0.206); 64 -> 128 K3 1.20 (1.67); 96 -> 96 K7 0.68
    (0.92); 128 -> 64 K3 0.227 (0.256), 128 -> 128 K7 0.086 (0.095), K3 2.58 (2.43).
    """
    tiles = problem.N * -(-problem.L_out // HaloShape.of(problem, config).step)
    if tiles < 2 * device.sm_count or not 8 < problem.C_out <= 128:
        return False
    return problem.C_in <= 96 or (problem.dtype.itemsize == 4 and (problem.K >= 7 or problem.C_out <= 64))
