"""Chooses how convolutions of ours store what others of ours read next: rounded to TF32 or not, channels-last or not.

What a graph returns keeps the strides that eager gives it. What other operators read stays as it is, but for transposed views.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Graph, Node

from torch_conv_triton.epilogue import Instruction, Output, Program, Value
from torch_conv_triton.graph.call import CONVOLUTIONS, FUSED, OperatorCall
from torch_conv_triton.graph.convolution import aten
from torch_conv_triton.graph.report import ConvRecord
from torch_conv_triton.problem import current_precision


def choose_layouts(graph: Graph, records: dict[Node, ConvRecord]) -> None:
    """Choose how every output of a convolution of ours is stored, and tell the convolutions that read it.

    The records of the nodes are replaced by those of the calls that stand in for them.
    """
    chosen_by_node: dict[Node, Storage] = {}
    for node in sorted(node for node in records if node.target in (*CONVOLUTIONS, *FUSED)):
        before, outputs = OperatorCall.of(node), OperatorCall.outputs(node)
        if len(outputs) < len(before.program.outputs):
            continue
        source = chosen_by_node.get(before.input, Storage("NCL"))
        chosen = _choose([_Reading.of(*pair, records) for pair in zip(outputs, before.program.outputs, strict=True)], source)
        call = replace(before, program=_store(before.program, chosen), rounded=source.rounded)
        if call == before or (plan := call.plan()).is_aten:
            continue
        new, new_outputs = call.put(graph, node, outputs)
        for unused in dict.fromkeys((*outputs, node)):
            graph.erase_node(unused)
        chosen_by_node.update(zip(new_outputs, chosen, strict=True))
        record = records.pop(node)
        words = filter(None, [record.folded, *(storage.words for storage in chosen), "reads rounded" * call.rounded])
        record = ConvRecord.of(record.module, "forward", call.problem(), rewritten=True, plan=plan)
        records[new] = replace(record, folded=", ".join(words))


@dataclass(frozen=True, slots=True)
class Storage:
    """How a value is stored: contiguous ("NCL") or channels-last ("NLC"), rounded to TF32 or not."""

    layout: str
    rounded: bool = False

    @property
    def words(self) -> str:
        return " ".join(["rounded"] * self.rounded + ["to NLC"] * (self.layout == "NLC"))


@dataclass(frozen=True, slots=True)
class _Reading:
    """What reads an output that is stored as `layout` now.

    `inputs`: convolutions of ours that it is the input of; `operand`: an epilogue reads it; `transposed`: it has views
    ``(N, L, C)``; `others`: it has readers that rely on its strides, or that our choice might make slower.
    """

    layout: str
    inputs: tuple[OperatorCall, ...]
    operand: bool
    transposed: bool
    others: bool
    float32: bool

    @classmethod
    def of(cls, node: Node, output: Output, records: dict[Node, ConvRecord]) -> _Reading:
        inputs, operand, transposed, others = [], False, False, False
        for user in node.users:
            call = OperatorCall.of(user) if user in records and user.target in (*CONVOLUTIONS, *FUSED) else None
            if call is None or node in (call.weight, call.bias):
                transposed |= _is_transposition(user)
                others |= not _is_transposition(user)
                continue
            operand |= node in call.operands
            if call.input is node:
                inputs.append(call)
        return cls(output.layout, tuple(inputs), operand, transposed, others, output.dtype == torch.float32)

    @property
    def may_be_rounded(self) -> bool:
        tf32 = self.float32 and current_precision(torch.float32) == "tf32"
        alone = bool(self.inputs) and not (self.operand or self.transposed or self.others)
        return tf32 and alone and not any(call.plan_reading(self.layout, True).is_aten for call in self.inputs)

    def may_be_channels_last(self, rounded: bool) -> bool:
        return not self.others and not any(call.plan_reading("NLC", rounded).is_aten for call in self.inputs)

    def is_better_channels_last(self, rounded: bool) -> bool:
        return self.transposed or any(_reads_better_channels_last(call, rounded) for call in self.inputs)


def _choose(readings: list[_Reading], source: Storage) -> list[Storage]:
    """How to store the outputs of a call whose input is stored as `source`."""
    rounded = [reading.may_be_rounded for reading in readings]
    possible = [reading.may_be_channels_last(r) for reading, r in zip(readings, rounded, strict=True)]
    better = [p and reading.is_better_channels_last(r) for p, reading, r in zip(possible, readings, rounded, strict=True)]
    # what is only added later follows the tensors beside it
    follows = any(better) or source.layout == "NLC"
    return [
        Storage("NLC" if b or (p and follows and not reading.inputs) else reading.layout, r)
        for reading, r, p, b in zip(readings, rounded, possible, better, strict=True)
    ]


def _reads_better_channels_last(call: OperatorCall, rounded: bool) -> bool:
    """Whether a convolution is faster on channels-last input; the one place where that is decided.

    Measured on an H200, convolutions of HiFi-GAN with a leaky ReLU, ms gathered from NCL and from rounded NLC: 32 channels K3
    .142 and .118, K11 .334 and .258; 64 channels K7 .146 and .103; 128 channels K11 .126 and .104. A tile of NCL in shared memory
    is better still for few channels: 32 channels K3 .087, K11 .167; 64 channels K11 .126 against .150; but 128 channels K7 .086
    against .077. Float32 that has yet to be rounded gains nothing but the copy that some kernels make first. The layout of the
    output makes no difference.
    """
    plan = call.plan_reading("NCL", rounded)
    if plan.kernel == "dense_halo" and call.problem().C_in < 128:
        return False
    if plan.config is not None and plan.config.copy_to_nlc:
        return True
    problem = call.problem()
    dense = problem.C_in_per_group % 16 == 0 and problem.C_out_per_group >= 16
    return dense and (rounded or problem.dtype.itemsize == 2)


def _store(program: Program, storage: list[Storage]) -> Program:
    instructions, outputs = list(program.instructions), []
    for output, chosen in zip(program.outputs, storage, strict=True):
        value = output.value
        if chosen.rounded:
            instructions.append(Instruction("tf32", (value,)))
            value = Value(len(instructions))
        outputs.append(Output(value, output.dtype, chosen.layout))
    return Program(tuple(instructions), tuple(outputs))


def _is_transposition(node: Node) -> bool:
    """Whether a node is a view ``(N, L, C)`` whose strides nothing relies on."""
    fixed = any(user.op == "output" or user.target is aten.as_strided.default for user in node.users)
    return node.target is aten.permute.default and list(node.args[1]) == [0, 2, 1] and not fixed
