"""Chooses how convolutions of ours store what others of ours read next: rounded to TF32 or not, channels-last or not.

What Inductor computes on the way to the next convolutions follows. What a graph returns keeps the strides that eager gives it,
and so does what operators read that may rely on strides, but for transposed views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from torch_conv_triton.configs_thin import THIN
from torch_conv_triton.epilogue import Instruction, Output, Program, Value
from torch_conv_triton.graph.call import CONVOLUTIONS, FUSED, OperatorCall
from torch_conv_triton.graph.convolution import value
from torch_conv_triton.graph.region import Region, find_regions
from torch_conv_triton.graph.report import ConvRecord
from torch_conv_triton.problem import current_precision

# why a tensor is stored channels-last
READ_FASTER, ADDED, AS_IN_EAGER = "read faster so", "added to such", "as in eager"
# depthwise kernels that load a sample of channels-last x once
SLIDING = ("depthwise_sliding", "depthwise_skewed")


def choose_layouts(graph: Graph, records: dict[Node, ConvRecord]) -> None:
    """Choose how every output of a convolution of ours is stored, and tell the convolutions that read it.

    The records of the nodes are replaced by those of the calls that stand in for them.
    """
    calls = {node: OperatorCall.of(node) for node in sorted(records) if node.target in (*CONVOLUTIONS, *FUSED)}
    calls = {node: call for node, call in calls.items() if len(call.program.outputs) == len(OperatorCall.outputs(node))}
    choice = _Choice(find_regions(graph, calls))
    for node in calls:
        before, outputs = OperatorCall.of(node), OperatorCall.outputs(node)
        source = choice.stored.get(before.input, Storage("NCL"))
        chosen = choice.of(before, outputs)
        call = replace(before, program=_store(before.program, chosen), rounded=source.rounded)
        words = *(storage.words for storage in chosen), "reads rounded" * call.rounded
        if call == before or (call.plan().is_aten and not any(storage.through for storage in chosen)):
            if all(storage.layout == "NCL" for storage in chosen) and not call.plan().is_aten:
                records[node] = records[node].also_folding(*words)
            continue
        new_outputs = call.take_place_of(node, outputs, records, (records[node].folded, *words))
        choice.stored.update(zip(new_outputs, chosen, strict=True))


@dataclass(frozen=True, slots=True)
class Storage:
    """How a value is stored: contiguous ("NCL") or channels-last ("NLC"), rounded to TF32 or not.

    `through` names what Inductor computes of it in that layout, on the way to the next convolutions. `why` says why it is
    channels-last, or why not where its readers would be faster so.
    """

    layout: str
    rounded: bool = False
    through: tuple[str, ...] = ()
    why: str = ""

    @property
    def words(self) -> str:
        layout = ["to NLC"] if self.layout == "NLC" else ["NCL"] * bool(self.why)
        through = ["through", *self.through] if self.through else []
        return " ".join(["rounded"] * self.rounded + layout + through + [f"({self.why})"] * bool(self.why))


class _Choice:
    """How tensors are stored: those of a region alike, decided at the first of them.

    A region is channels-last if nothing forbids it and its readers are faster so. `stored` says how tensors are that convolutions
    may read.
    """

    def __init__(self, regions: dict[Node, Region]) -> None:
        self.stored: dict[Node, Storage] = {}
        self._regions = regions
        self._decided: dict[Region, Storage] = {}

    def of(self, call: OperatorCall, outputs: Sequence[Node]) -> list[Storage]:
        """How to store the outputs of a call."""
        regions = [self._regions[output] for output in outputs]
        new = [region for region in dict.fromkeys(regions) if region not in self._decided]
        rounded = {region: _may_be_rounded(region) for region in new}
        for region in new:
            self._decide(region, rounded[region], READ_FASTER if self._is_read_faster(region, rounded[region]) else None)
        for region in new:
            if not region.inputs and self._decided[region].layout == "NCL":
                self._decide(region, rounded[region], ADDED if self._is_added_channels_last(region) else None)
        chosen = [self._decided[region] for region in regions]
        # what eager stores channels-last is not made contiguous
        return [
            replace(storage, layout="NLC", why=AS_IN_EAGER) if (storage.layout, output.layout) == ("NCL", "NLC") else storage
            for storage, output in zip(chosen, call.program.outputs, strict=True)
        ]

    def _is_added_channels_last(self, region: Region) -> bool:
        """Whether most convolutions that read it in their epilogues compute on channels-last tiles, as they read their inputs.

        8 x 64 x 38400 K3 with a residual and two outputs, all contiguous, 0.125 ms, with the residual channels-last 0.198.
        """
        layouts = [self._expected_layout(OperatorCall.of(node).input) for node in region.operands]
        return 2 * layouts.count("NLC") > len(layouts)

    def _expected_layout(self, node: Node) -> str:
        if node in self.stored or node not in self._regions:
            return self.stored.get(node, Storage("NCL")).layout
        region = self._regions[node]
        if region in self._decided:
            return self._decided[region].layout
        read_faster = region.refusal is None and self._is_read_faster(region, _may_be_rounded(region))
        return "NLC" if read_faster else "NCL"

    def _decide(self, region: Region, rounded: bool, why: str | None) -> None:
        """Store a region channels-last for a reason, if nothing forbids it."""
        values = region.channels_last() if why and _may_be_channels_last(region, rounded) else None
        if values is None:
            self._decided[region] = Storage("NCL", rounded, why=(why and region.refusal) or "")
            return
        region.store(values)
        self._decided[region] = Storage("NLC", rounded, region.through, why)
        self.stored.update(dict.fromkeys(region.between, Storage("NLC")))

    def _is_read_faster(self, region: Region, rounded: bool) -> bool:
        """Whether the convolutions that read it would be faster if it were channels-last."""
        gains = [region.gains]
        for node in region.inputs:
            call = OperatorCall.of(node)
            outputs = [output for output in OperatorCall.outputs(node) if output in self._regions]
            free = not any(self._regions[output].refusal for output in outputs)
            # a depthwise convolution of contiguous rows that is to store the other layout is slower than on its own
            torn = call.problem().is_depthwise and free and all(self._expected_layout(output) == "NLC" for output in outputs)
            gains.append(_gain(call, rounded, free, torn))
        # one reader is enough of what a convolution stores for it; all of them together of what Inductor computes once for all
        return sum(gains) > 0 if region.between else max(gains) > 0


def _may_be_rounded(region: Region) -> bool:
    """Whether TF32 values are as good as any to its readers, and our kernels read them."""
    tf32 = value(region.outputs[0]).dtype == torch.float32 and current_precision(torch.float32) == "tf32"
    readers = map(OperatorCall.of, region.inputs)
    return tf32 and region.is_read_by_convolutions_alone and not any(call.plan_reading("NCL", True).is_aten for call in readers)


def _may_be_channels_last(region: Region, rounded: bool) -> bool:
    if region.refusal is not None or any(OperatorCall.of(node).plan_reading("NLC", rounded).is_aten for node in region.inputs):
        return False
    # what aten computes would be copied
    return not region.between or not any(_channels_last(OperatorCall.of(node)).plan().is_aten for node in region.writers)


def _gain(call: OperatorCall, rounded: bool, free: bool, torn: bool) -> int:
    """1 if a convolution is faster on channels-last input than on contiguous input, -1 if it is slower, 0 if there is no telling.

    The one place where that is decided. `free`: its output may be channels-last then. `torn`: it will be in any case.

    Measured on an H200, convolutions of HiFi-GAN with a leaky ReLU, ms gathered from NCL and from rounded NLC: 32 channels K3
    .142 and .118, K11 .334 and .258; 64 channels K7 .146 and .103; 128 channels K11 .126 and .104. A tile of NCL in shared memory
    is better still for few channels: 32 channels K3 .087, K11 .167; 64 channels K11 .126 against .150; but 128 channels K7 .086
    against .077, 96 channels K7 with Snake .720 against .601. Float32 that has yet to be rounded gains nothing but the copy that
    some kernels make first, and whole vectors where rows start off 16 bytes. The layout of the output makes no difference, but to
    depthwise convolutions.
    """
    plan, problem = (_channels_last(call) if torn else call).plan_reading("NCL", rounded), call.problem()
    if problem.is_depthwise:
        after = (_channels_last(call) if free else call).plan_reading("NLC", rounded)
        # what shifts or slides over vectors loads a sample once
        return (after.kernel in SLIDING) - (plan.kernel != "depthwise")
    if plan.kernel in THIN or (plan.kernel == "dense_halo" and problem.C_in <= 64):
        return -1
    if problem.C_in * problem.dtype.itemsize % 16:
        # rows of channels that start off 16 bytes are gathered; a copy pads them
        return -1
    if plan.config is not None and plan.config.copy_to_nlc:
        return 1
    dense = problem.C_in_per_group % 16 == 0 and problem.C_out_per_group >= 16
    skewed = problem.K == 1 and problem.L_in * problem.dtype.itemsize % 16
    return int(dense and (rounded or problem.dtype.itemsize == 2 or skewed > 0))


def _channels_last(call: OperatorCall) -> OperatorCall:
    """The call with all that it stores channels-last."""
    outputs = tuple(replace(output, layout="NLC") for output in call.program.outputs)
    return replace(call, program=replace(call.program, outputs=outputs))


def _store(program: Program, storage: list[Storage]) -> Program:
    instructions, outputs = list(program.instructions), []
    for output, chosen in zip(program.outputs, storage, strict=True):
        value = output.value
        if chosen.rounded:
            instructions.append(Instruction("tf32", (value,)))
            value = Value(len(instructions))
        outputs.append(Output(value, output.dtype, chosen.layout))
    return Program(tuple(instructions), tuple(outputs))
