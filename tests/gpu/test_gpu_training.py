"""Training on a GPU: what training loops do with gradients, in eager and in compiled graphs."""

import pytest
import torch
import training

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("way", training.WAYS)]


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


def test_gradients_repeat_bit_for_bit_and_pytorch_s_deterministic_mode_changes_nothing(way):
    training.check_repeats(way, "cuda")


def test_gradients_accumulate(way):
    training.check_accumulation(way, "cuda")


def test_checkpointed_layers_give_the_same_bits(way):
    training.check_checkpointing(way, "cuda")


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_parametrized_weights(way, kind):
    training.check_parametrization(way, "cuda", kind)


def test_tied_weights_sum_their_gradients(way):
    training.check_tied_weights(way, "cuda")


def test_frozen_layers(way):
    training.check_frozen_layers(way, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(way, dtype):
    training.check_autocast(way, "cuda", dtype)


def test_a_short_training_falls_as_pytorch_s_does_and_repeats_bit_for_bit(way):
    training.check_training(way, "cuda", steps=40, channels=64)
