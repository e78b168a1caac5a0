"""Folds what surrounds a convolution of ours into one call of the fused operator: padding, cropping, pointwise nodes after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from torch_conv_triton.dispatch import HALVING, Plan
from torch_conv_triton.graph.call import CONVOLUTIONS, OperatorCall
from torch_conv_triton.graph.convolution import aten, before_writes, writes
from torch_conv_triton.graph.epilogue import Epilogue, grow_epilogues, is_read_from_memory
from torch_conv_triton.graph.padding import fold_crop, fold_padding
from torch_conv_triton.graph.report import ConvRecord


@dataclass(frozen=True, slots=True)
class Fold:
    """What would stand in for a convolution: the `call`, the nodes it replaces, in order, and those that are its outputs.

    `words` says what was folded.
    """

    call: OperatorCall
    replaced: tuple[Node, ...]
    outputs: tuple[Node, ...]
    words: tuple[str, ...]


def fold(graph: Graph, records: dict[Node, ConvRecord]) -> None:
    """Fold around every convolution of ours in the graph, where one kernel of ours then computes it all.

    The records of the nodes are replaced by those of the calls that stand in for them.
    """
    first_write = next(filter(writes, graph.nodes), None)
    foldable = [node for node in before_writes(graph) if node in records and node.target in CONVOLUTIONS]
    # later ones first: the sum of two convolutions goes to the one that finds both there
    for node in reversed(foldable):
        _fold_one(graph, node, first_write, records)


def _fold_one(graph: Graph, node: Node, first_write: Node | None, records: dict[Node, ConvRecord]) -> None:
    whole = OperatorCall.of(node)
    call, padding = fold_padding(graph, whole)
    if call.padding_mode != "zeros" and whole.plan().kernel == "dense_few_outputs":
        # it reads whole vectors; 32 -> 1 channels K7 0.073, gathered 0.274
        call, padding = whole, None
    call, result, crop = fold_crop(call, node)
    words = [str(padding)] if padding else []
    if crop:
        words.append(f"cut {crop[0]}+{crop[1]}")
    bare = Fold(call, tuple(dict.fromkeys((node, result))), (result,), tuple(words))
    epilogues = grow_epilogues(graph, result, first_write)
    for candidate in (*(_with_epilogue(bare, epilogue) for epilogue in epilogues), bare):
        if not candidate.words:
            continue
        plan = candidate.call.plan()
        if not plan.is_aten and _is_gain(candidate, whole.plan()):
            record = ConvRecord.of(records.pop(node).module, "forward", candidate.call.problem(), rewritten=True, plan=plan)
            records[_put(graph, candidate)] = replace(record, folded=", ".join(candidate.words))
            return
        # halves of operands that were cut for this one
        erase_unused(graph, candidate.call.operands)


def _is_gain(fold: Fold, alone: Plan) -> bool:
    """Whether it is faster than the convolution by its plan alone, with what Inductor makes of the rest."""
    if alone.is_aten:
        return _saves_a_pass(fold)
    # by another kernel halves of the channels would be computed together, but the sums more slowly
    return not fold.call.program.halves or alone.kernel in HALVING


def _saves_a_pass(fold: Fold) -> bool:
    """Whether the outputs are written to memory anyway; otherwise Inductor folds the epilogue into what reads them."""
    inside = set(fold.replaced)
    return all(is_read_from_memory(output, inside) for output in fold.outputs)


def _with_epilogue(bare: Fold, epilogue: Epilogue) -> Fold:
    names = " ".join(instruction.name for instruction in epilogue.program.instructions)
    return Fold(
        bare.call.with_program(epilogue.program, epilogue.operands),
        bare.replaced + epilogue.nodes,
        epilogue.outputs,
        (*bare.words, names or "rounding"),
    )


def _put(graph: Graph, fold: Fold) -> Node:
    """Put the call in the place of the nodes that it replaces; returns its node."""
    call, _ = fold.call.put(graph, fold.replaced[0], fold.outputs)
    erase_unused(graph, fold.replaced)
    return call


def erase_unused(graph: Graph, nodes: Sequence[Node]) -> None:
    """Erase nodes, in order and none of them used but by a later one, and whatever nothing uses after that."""
    waiting, gone = list(nodes), set()
    while waiting:
        node = waiting.pop()
        # circular padding leaves slices behind that nothing reads
        waiting += [user for user in node.users if user.target is aten.slice.Tensor and not user.users]
        if node.op == "call_function" and not node.users and not node.is_impure() and node not in gone:
            waiting += node.all_input_nodes
            graph.erase_node(node)
            gone.add(node)
