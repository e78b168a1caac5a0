"""A transformers model, compiled unedited: wav2vec2, whose positional convolution (K 128, 16 groups) cuDNN is slow at.

python examples/transformers_model.py
torch-conv-triton explain examples.transformers_model:build
"""

import sys

import torch
from torch import Tensor, nn

try:
    from transformers import Wav2Vec2Config, Wav2Vec2Model
except ImportError:
    sys.exit("this example compiles a model of transformers: pip install transformers")


def build() -> tuple[nn.Module, tuple[Tensor]]:
    """The model with random weights, and samples ``(N, L)`` for it: of its real size in fp16 on a GPU, tiny in fp32 elsewhere."""
    torch.manual_seed(0)
    if torch.cuda.is_available():
        return Wav2Vec2Model(Wav2Vec2Config()).eval().to("cuda", torch.float16), (
            torch.randn(8, 80000).to("cuda", torch.float16),
        )
    config = Wav2Vec2Config(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_hidden_layers=1,
        conv_dim=(16, 16),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    return Wav2Vec2Model(config).eval(), (torch.randn(1, 400),)


@torch.no_grad()
def main() -> None:
    model, (samples,) = build()
    compiled = torch.compile(model, backend="triton_conv")

    actual = compiled(samples).last_hidden_state.double()
    expected = model.double()(samples.double()).last_hidden_state
    error = ((actual - expected).norm() / expected.norm()).item()
    print(
        f"wav2vec2, {samples.dtype}, {tuple(samples.shape)} on {samples.device.type}: relative error {error:.1e} against float64"
    )
    if not error < 1e-2:
        sys.exit("the compiled model is wrong")


if __name__ == "__main__":
    main()
