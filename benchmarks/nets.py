"""The networks of the end-to-end measurement: random weights and synthetic batches, since only speed is looked at."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Task:
    """A network, a batch, and the mean loss of the network over a batch or a part of it: `loss(model, *batch)`."""

    model: nn.Module
    batch: tuple[Tensor, ...]
    loss: Callable[..., Tensor]


@dataclass(frozen=True)
class Net:
    """One network: `unit` is what a batch is counted in, `threads` None for the run's own number of threads."""

    name: str
    title: str
    unit: str
    units_per_batch: int
    make: Callable[[], Task]
    threads: int | None = None
    why_not: Callable[[], str | None] = lambda: None


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm around a shortcut (arXiv:1512.03385, figure 2)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, channels, H / stride, W / stride]."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


def small_resnet() -> nn.Module:
    """A 20-layer ResNet for 32x32 images: 3 stages of 3 blocks, 16 to 64 channels (arXiv:1512.03385, section 4.2)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    in_channels = 16
    for channels in (16, 32, 64):
        for block in range(3):
            layers.append(BasicBlock(in_channels, channels, 2 if block == 0 and channels != 16 else 1))
            in_channels = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def tiny_mlp() -> nn.Module:
    """Eight layers, 64 wide."""
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


class TokenClassifier(nn.Module):
    """A transformer encoder (arXiv:1706.03762, norm first) over 32 tokens: 4 layers, 128 wide, 4 heads, mean pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        self.positions = nn.Parameter(torch.randn(32, 128) * 0.02)
        layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, 32] -> [N, 10]."""
        hidden: Tensor = self.encoder(self.embedding(tokens) + self.positions)
        return self.head(hidden.mean(1))


def _classification(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs), labels)


def _classifier(network: Callable[[], nn.Module], *shape: int) -> Task:
    return Task(network(), (torch.randn(shape), torch.randint(0, 10, (shape[0],))), _classification)


def _encoder() -> Task:
    return Task(TokenClassifier(), (torch.randint(0, 1000, (32, 32)), torch.randint(0, 10, (32,))), _classification)


def _vit() -> Task:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=64, patch_size=8
    )

    def loss(model: Any, inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(pixel_values=inputs).logits, labels)

    batch = torch.randn(16, 3, 64, 64), torch.randint(0, 2, (16,))
    return Task(ViTForImageClassification(config), batch, loss)


def _gpt() -> Task:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=6, n_embd=192, n_head=6, vocab_size=8192, n_positions=128, bos_token_id=None, eos_token_id=None)

    def loss(model: Any, tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return Task(GPT2LMHeadModel(config), (torch.randint(0, config.vocab_size, (4, 128)),), loss)


def _transformers_missing() -> str | None:
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install transformers"
    return None


NETS: dict[str, Net] = {
    net.name: net
    for net in (
        Net("resnet20", "ResNet-20, 32x32, batch 32", "images", 32, lambda: _classifier(small_resnet, 32, 3, 32, 32)),
        # Measured: a second thread makes nets as small as this one 3 to 8 times slower.
        Net("tiny_mlp", "9-layer MLP, batch 32", "images", 32, lambda: _classifier(tiny_mlp, 32, 64), threads=1),
        Net("encoder", "transformer encoder, 128 wide, 4 layers, batch 32 x 32", "sequences", 32, _encoder),
        Net("vit", "ViT, 192 wide, 12 layers, batch 16", "images", 16, _vit, why_not=_transformers_missing),
        Net("gpt2", "GPT-2, 192 wide, 6 layers, 4 x 128", "tokens", 512, _gpt, why_not=_transformers_missing),
    )
}
DEFAULT_NETS = ("tiny_mlp", "resnet20")
FULL_NETS = tuple(NETS)
