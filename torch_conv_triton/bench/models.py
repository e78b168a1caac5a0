"""Whole models for the benchmark, built from their published configurations with random weights; nothing is downloaded."""

from __future__ import annotations

import importlib
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_conv_triton.bench.errors import BenchError
from torch_conv_triton.bench.suite import DTYPES


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model is called with, before it is moved to its device and dtype."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A model of the benchmark: `convolutions` 1-D convolutions in one forward at full size, the usual `dtype`, and its builder.

    `make(small)` gives the module and its inputs; `small` ones run on a CPU in seconds.
    """

    convolutions: int
    dtype: str
    make: Callable[[bool], tuple[nn.Module, Inputs]]


def build(
    name: str, device: str | torch.device = "cuda", dtype: str | None = None, size: str = "full"
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Model `name` of `MODELS` in eval mode with its ``args, kwargs``, on `device` in `dtype` (its usual one by default).

    Weights and inputs are the same on every call; `size` is "full" or "small". Raises BenchError for an unknown name, or if the
    library that defines the model is not installed.
    """
    if name not in MODELS:
        raise BenchError(f"unknown model {name!r}; there are {', '.join(MODELS)}")
    if size not in ("full", "small"):
        raise BenchError(f"size must be 'full' or 'small', got {size!r}")
    spec = MODELS[name]
    torch_dtype = DTYPES[dtype or spec.dtype]
    torch.manual_seed(0)
    module, inputs = spec.make(size == "small")
    module = with_plain_integers(module).to(device=device, dtype=torch_dtype).eval().requires_grad_(False)

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device=device, dtype=torch_dtype if value.is_floating_point() else value.dtype)

    return module, tuple(map(move, inputs.args)), {key: move(value) for key, value in inputs.kwargs.items()}


def library(name: str) -> types.ModuleType:
    """An optional library by name. Raises BenchError, with the way to install it, if it is missing."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise BenchError(f"this model needs {name} ({error}): pip install {name}") from error


class Codec(nn.Module):
    """Encoder and decoder of a neural codec, without the quantizer between them."""

    def __init__(self, codec: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = codec.encoder, codec.decoder

    def forward(self, wave: Tensor) -> Tensor:
        return self.decoder(self.encoder(wave))


class WholeLSTM(nn.Module):
    """The outputs of an LSTM ``(L, N, C)``, for inference, as one operator that torch.compile does not look into.

    Else the graph would end there, and inside a loop over layers everything in that loop would be compiled layer by layer.
    """

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.layers, self.weights = lstm.num_layers, nn.ParameterList(lstm._flat_weights)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return _lstm(x, list(self.weights), self.layers), None


@torch.library.custom_op("torch_conv_triton_bench::lstm", mutates_args=())
def _lstm(x: Tensor, weights: list[Tensor], layers: int) -> Tensor:
    states = [x.new_zeros(layers, x.shape[1], weights[1].shape[1]) for _ in range(2)]
    return torch.lstm(x, states, weights, True, layers, 0.0, False, False, False)[0]


@_lstm.register_fake
def _(x: Tensor, weights: list[Tensor], layers: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], weights[1].shape[1])


class VitsVocoder(nn.Module):
    """The part of VITS after the length of the speech has been predicted: flow and decoder."""

    def __init__(self, vits: nn.Module) -> None:
        super().__init__()
        self.flow, self.decoder = vits.flow, vits.decoder

    def forward(self, prior: Tensor, mask: Tensor) -> Tensor:
        latents = self.flow(prior, mask, None, reverse=True)
        return self.decoder(latents * mask, None)


def with_plain_integers(model: nn.Module) -> nn.Module:
    """The same function without integers that live in tensors, which cut a compiled graph at every convolution.

    Encodec keeps strides and kernel sizes in buffers, and VITS passes a channel count as a tensor.
    """
    for module in model.modules():
        sizes = [name for name in ("stride", "kernel_size", "padding_total") if name in module._buffers]
        if len(sizes) == 3:
            _unbuffer(module, [*sizes, "padding_left", "padding_right"])
            module._get_extra_padding_for_conv1d = types.MethodType(_extra_padding, module)
        if type(module).__name__ == "VitsWaveNet":
            importlib.import_module(type(module).__module__).fused_add_tanh_sigmoid_multiply = _gate
    return model


def with_whole_lstms(model: nn.Module) -> nn.Module:
    """The same function, for inference, with each LSTM of a codec as a `WholeLSTM`."""
    for module in list(model.modules()):
        if type(module).__name__ == "EncodecLSTM":
            module.lstm = WholeLSTM(module.lstm)
    return model


def _unbuffer(module: nn.Module, names: list[str]) -> None:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, Tensor):
            delattr(module, name)
            setattr(module, name, int(value))


def _extra_padding(conv: nn.Module, x: Tensor) -> int:
    """Zeros to add on the right for the last window to be whole."""
    return -(x.shape[-1] - conv.kernel_size + conv.padding_total) % conv.stride


def _gate(a: Tensor, b: Tensor, _channels: Any) -> Tensor:
    left, right = (a + b).chunk(2, dim=1)
    return torch.tanh(left) * torch.sigmoid(right)


def _speecht5_hifigan(small: bool) -> tuple[nn.Module, Inputs]:
    transformers = library("transformers")
    model = transformers.SpeechT5HifiGan(transformers.SpeechT5HifiGanConfig())
    return model, Inputs((torch.randn((1, 20, 80) if small else (8, 600, 80)),))


def _encodec_24khz(small: bool) -> tuple[nn.Module, Inputs]:
    transformers = library("transformers")
    model = Codec(transformers.EncodecModel(transformers.EncodecConfig()))
    return model, Inputs((torch.randn((1, 1, 3200) if small else (8, 1, 240000)),))


def _dac_44khz(small: bool) -> tuple[nn.Module, Inputs]:
    transformers = library("transformers")
    rates = [2, 4, 8, 8]
    config = transformers.DacConfig(
        sampling_rate=44100, hop_length=512, n_codebooks=9, downsampling_ratios=rates, upsampling_ratios=rates[::-1]
    )
    return Codec(transformers.DacModel(config)), Inputs((torch.randn((1, 1, 4096) if small else (4, 1, 220160)),))


def _wav2vec2_base(small: bool) -> tuple[nn.Module, Inputs]:
    transformers = library("transformers")
    config = transformers.Wav2Vec2Config(apply_spec_augment=False, layerdrop=0.0, num_hidden_layers=2 if small else 12)
    wave = torch.randn((1, 8000) if small else (16, 160000))
    return transformers.Wav2Vec2Model(config), Inputs(kwargs={"input_values": wave})


def _parakeet_ctc(small: bool) -> tuple[nn.Module, Inputs]:
    transformers = library("transformers")
    config = transformers.ParakeetEncoderConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2 if small else 24,
        num_attention_heads=8,
        conv_kernel_size=9,
        num_mel_bins=80,
        layerdrop=0.0,
    )
    N, frames = (1, 200) if small else (16, 3000)
    mask = torch.ones(N, frames, dtype=torch.long)
    return transformers.ParakeetEncoder(config), Inputs(
        kwargs={"input_features": torch.randn(N, frames, 80), "attention_mask": mask}
    )


def _lfm2_350m(small: bool) -> tuple[nn.Module, Inputs]:
    transformers = library("transformers")
    config = transformers.Lfm2Config(
        vocab_size=65536,
        hidden_size=1024,
        intermediate_size=6656,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=8,
        full_attn_idxs=[2, 5, 8, 10, 12, 14],
        use_cache=False,
    )
    tokens = torch.randint(config.vocab_size, (1, 64) if small else (4, 4096))
    return transformers.Lfm2Model(config), Inputs(kwargs={"input_ids": tokens, "use_cache": False})


def _conv_tasnet(small: bool) -> tuple[nn.Module, Inputs]:
    model = library("torchaudio").models.conv_tasnet_base(num_sources=2)
    return model, Inputs((torch.randn((1, 1, 1600) if small else (16, 1, 32000)),))


def _vits_mms_tts(small: bool) -> tuple[nn.Module, Inputs]:
    transformers = library("transformers")
    N, frames = (1, 20) if small else (8, 400)
    prior, mask = torch.randn(N, 192, frames), torch.ones(N, 1, frames)
    return VitsVocoder(transformers.VitsModel(transformers.VitsConfig())), Inputs((prior, mask))


def _squeezebert(small: bool) -> tuple[nn.Module, Inputs]:
    transformers = library("transformers")
    tokens = torch.randint(30000, (1, 16) if small else (64, 128))
    model = transformers.SqueezeBertModel(transformers.SqueezeBertConfig())
    return model, Inputs(kwargs={"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})


def _wav2letter(small: bool) -> tuple[nn.Module, Inputs]:
    model = library("torchaudio").models.Wav2Letter(num_classes=40, input_type="waveform", num_features=1)
    return model, Inputs((torch.randn((1, 1, 16000) if small else (16, 1, 160000)),))


MODELS = {
    "speecht5_hifigan": ModelSpec(78, "fp32", _speecht5_hifigan),
    "encodec_24khz": ModelSpec(36, "fp32", _encodec_24khz),
    "dac_44khz": ModelSpec(60, "fp32", _dac_44khz),
    "wav2vec2_base": ModelSpec(8, "fp16", _wav2vec2_base),
    "parakeet_ctc_0_6b": ModelSpec(72, "bf16", _parakeet_ctc),
    "lfm2_350m": ModelSpec(10, "bf16", _lfm2_350m),
    "conv_tasnet_base": ModelSpec(99, "fp32", _conv_tasnet),
    "vits_mms_tts": ModelSpec(118, "fp32", _vits_mms_tts),
    "squeezebert": ModelSpec(72, "fp16", _squeezebert),
    "wav2letter_waveform": ModelSpec(12, "fp32", _wav2letter),
}
