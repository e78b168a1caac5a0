"""Programs of pointwise instructions: their text, what they refuse, and what they compute in torch operators."""

import pytest
import torch
import torch.nn.functional as F

from torch_conv_triton.epilogue import INSTRUCTIONS, Builder, Operand, Value, evaluate, parse

LEAKY = "mul %0 0.1; gt %0 0.0; where %2 %0 %1; add %3 a0; out %4 fp32 NCL"


def run(text, y, *operands, tf32=True):
    return evaluate(parse(text, y.dtype), y, operands, tf32)


def test_a_program_is_built_printed_and_parsed():
    builder = Builder()
    y = Value(0)
    scaled = builder.emit("mul", y, 0.1)
    kept = builder.emit("where", builder.emit("gt", y, 0.0), y, scaled)
    builder.out(builder.emit("add", kept, Operand(0)), torch.float32)
    program = builder.program()
    assert str(program) == LEAKY
    assert parse(str(program), torch.float32) == program
    assert program.operands == 1


def test_what_was_computed_is_not_computed_again():
    builder = Builder()
    assert builder.emit("exp", Value(0)) == builder.emit("exp", Value(0))
    assert builder.emit("exp", Value(1)) == Value(2)


def test_an_empty_program_stores_the_convolution():
    assert str(parse("", torch.bfloat16)) == "out %0 bf16 NCL"
    assert parse(" ", torch.float16) == parse("out %0 fp16 NCL", torch.float32)


@pytest.mark.parametrize("number", [0.1, -2.5e-7, float("inf"), -float("inf"), 1e30])
def test_numbers_survive_the_text(number):
    builder = Builder()
    builder.out(builder.emit("add", Value(0), number), torch.float32)
    assert parse(str(builder.program()), torch.float32).instructions[0].arguments[1] == number


@pytest.mark.parametrize(
    "text, message",
    [
        ("softmax %0; out %1 fp32 NCL", "no instruction 'softmax'"),
        ("add %0; out %1 fp32 NCL", "add takes 2 arguments"),
        ("add %0 %1; out %1 fp32 NCL", "%1 is not computed before"),
        ("neg b0; out %1 fp32 NCL", "'b0'"),
        ("neg %0", "one or two outputs"),
        ("out %0 fp32 NCL; out %0 bf16 NCL; out %0 fp16 NCL", "one or two outputs, but got 3"),
        ("out %0 fp32 NCL; neg %0", "follows the outputs"),
        ("out %1 fp32 NCL", "no value %1"),
        ("out a0 fp32 NCL", "no value a0"),
        ("out %0 int8 NCL", "out <value>"),
        ("out %0 fp32 CNL", "out <value>"),
        ("neg %0; halve; out %1 fp32 NCL", "halve comes first"),
        ("halve %0; out %1 fp32 NCL", "halve comes first and has no arguments"),
        ("mul %0 %1; halve; out %1 fp32 NCL", "%1 is not computed before"),
    ],
)
def test_what_is_no_program_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text, torch.float32)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_instruction_computes_in_float32_and_rounds_once(name):
    torch.manual_seed(0)
    y = torch.randn(2, 3, 5).to(torch.bfloat16)
    arguments = " ".join(("%0", "0.7", "-1.5")[: INSTRUCTIONS[name].arity])
    (actual,) = run(f"{name} {arguments}; out %1 bf16 NCL", y)
    (exact,) = run(f"{name} {arguments}; out %1 fp32 NCL", y)
    assert actual.dtype == torch.bfloat16 and exact.dtype == torch.float32
    assert torch.equal(actual.nan_to_num(7), exact.to(torch.bfloat16).nan_to_num(7))


def test_activations_and_residuals_are_what_torch_computes():
    torch.manual_seed(0)
    y, residual, slopes = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.rand(3, 1)
    (actual,) = run(LEAKY, y, residual)
    torch.testing.assert_close(actual, F.leaky_relu(y, 0.1) + residual)
    (actual,) = run("mul %0 a0; gt %0 0.0; where %2 %0 %1; out %3 fp32 NLC", y, slopes)
    torch.testing.assert_close(actual, F.prelu(y, slopes[:, 0]))
    assert actual.stride() == (15, 1, 3)
    first, second = run("sigmoid %0; mul %0 %1; out %2 fp32 NCL; out %0 fp16 NLC", y)
    torch.testing.assert_close(first, F.silu(y))
    assert torch.equal(second, y.half())


def test_gates_are_computed_of_the_halves_of_the_channels():
    torch.manual_seed(0)
    y, residual = torch.randn(2, 6, 5), torch.randn(2, 3, 5)
    (actual,) = run("halve; sigmoid %1; mul %0 %2; out %3 fp32 NCL", y)
    torch.testing.assert_close(actual, F.glu(y, 1))
    first, second = run("halve; tanh %0; sigmoid %1; mul %2 %3; add %4 a0; out %5 fp32 NLC; out %1 bf16 NCL", y, residual)
    torch.testing.assert_close(first, y[:, :3].tanh() * y[:, 3:].sigmoid() + residual)
    assert first.stride() == (15, 1, 3)
    assert torch.equal(second, y[:, 3:].bfloat16())


def test_minimum_and_maximum_keep_nan():
    y = torch.tensor([[[torch.nan, 1.0, -9.0]]])
    (actual,) = run("max %0 0.0; min %1 0.5; out %2 fp32 NCL", y)
    assert torch.equal(actual.nan_to_num(-1), torch.tensor([[[-1.0, 0.5, 0.0]]]))


def test_tf32_rounds_to_nearest_where_the_switch_asks_for_it():
    one, step = 1.0, 2.0**-10
    y = torch.tensor([[[one + 0.49 * step, one + 0.5 * step, -one - 0.51 * step, torch.inf, torch.nan]]])
    rounded = torch.tensor([[[one, one + step, -one - step, torch.inf, -7]]])
    assert torch.equal(run("tf32 %0; out %1 fp32 NCL", y)[0].nan_to_num(-7, posinf=torch.inf), rounded)
    assert torch.equal(run("tf32 %0; out %1 fp32 NCL", y, tf32=False)[0].nan_to_num(), y.nan_to_num())


def test_float64_is_computed_in_float64():
    y = torch.randn(1, 2, 3, dtype=torch.float64)
    (actual,) = run("exp %0; out %1 fp64 NCL", y)
    torch.testing.assert_close(actual, y.exp(), rtol=1e-15, atol=0)
