"""A training step of CLIP in torch for benchmarks/accelerator.py: open_clip's model, or torch.nn modules without it."""

from __future__ import annotations

import time
from typing import Any

import torch
from accelerator import SMALL_MAX_ROWS, STEPS, Record, largest_batch, small_architecture
from torch import nn

from clip_jax.config import MODELS


def train(small: bool, deadline: float, record: Record) -> None:
    """Time training steps at the largest batch that fits: eager mode, bfloat16 autocast, fused AdamW."""
    architecture = small_architecture() if small else MODELS["vit_b16"]
    device, text = "cpu" if small else "cuda", architecture.text
    torch.manual_seed(0)
    source, model = _make_model(architecture)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4, (0.9, 0.98), 1e-6, weight_decay=0.2, fused=not small)
    record({"model": source, "torch": torch.__version__})

    def step(image: Any, tokens: Any) -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            features = model(image.float() / 127.5 - 1, tokens)
            logits = features[2] * features[0] @ features[1].T
            target = torch.arange(len(tokens), device=device)
            cross_entropy = torch.nn.functional.cross_entropy
            loss = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        loss.backward()
        optimizer.step()
        return loss

    def attempt(rows: int) -> dict[str, Any] | None:
        if small and rows > SMALL_MAX_ROWS:
            return None
        try:
            size = architecture.image.image_size
            image = torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, device=device)
            tokens = torch.randint(1, text.eos_id, (rows, text.context_length), device=device)
            tokens[:, -1] = text.eos_id
            step(image, tokens).item()
            start = time.monotonic()
            for _ in range(STEPS):
                loss = step(image, tokens)
            loss = loss.item()
            seconds = (time.monotonic() - start) / STEPS
        except torch.OutOfMemoryError:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return None
        peak = {} if small else {"peak_bytes": torch.cuda.max_memory_allocated()}
        return {"loss": loss, "step_seconds": seconds, "images_per_second_per_device": rows / seconds} | peak

    largest_batch(attempt, 4 if small else 256, deadline, record)


def _make_model(architecture: Any) -> tuple[str, Any]:
    """Return a torch model (image, tokens) -> (image features, text features, scale), and its source."""
    image, text = architecture.image, architecture.text
    try:
        import open_clip
    except Exception:  # noqa: BLE001 (torchvision may not match torch)
        return "torch.nn", CLIP(architecture)
    vision = {"image_size": image.image_size, "patch_size": image.patch_size, "width": image.width}
    vision |= {"layers": image.layers, "head_width": image.width // image.heads}
    texts = {"context_length": text.context_length, "vocab_size": text.vocab_size, "width": text.width}
    texts |= {"layers": text.layers, "heads": text.heads}
    return f"open_clip {open_clip.__version__}", open_clip.model.CLIP(architecture.embed_dim, vision, texts)


class Transformer(nn.Module):
    """Pre-norm transformer whose attention is torch's fused one; returns one position, projected and normalized."""

    def __init__(self, tower: Any, tokens: int, embed_dim: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.01 * torch.randn(tokens, tower.width))
        options = {"activation": "gelu", "batch_first": True, "norm_first": True, "dropout": 0.0}
        layer = nn.TransformerEncoderLayer(tower.width, tower.heads, 4 * tower.width, **options)
        self.blocks = nn.TransformerEncoder(layer, tower.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(tower.width)
        self.projection = nn.Linear(tower.width, embed_dim, bias=False)

    def forward(self, x: torch.Tensor, position: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.blocks(x + self.positions, mask=mask, is_causal=mask is not None)
        return nn.functional.normalize(self.projection(self.norm(x[:, position])), dim=-1)


class CLIP(nn.Module):
    """CLIP with a ViT, written with torch.nn modules; returns image features, text features and the logit scale."""

    def __init__(self, architecture: Any) -> None:
        super().__init__()
        image, text, embed_dim = architecture.image, architecture.text, architecture.embed_dim
        self.patches = nn.Conv2d(3, image.width, image.patch_size, image.patch_size, bias=False)
        self.class_token = nn.Parameter(torch.zeros(1, 1, image.width))
        self.image = Transformer(image, (image.image_size // image.patch_size) ** 2 + 1, embed_dim)
        self.tokens = nn.Embedding(text.vocab_size, text.width)
        self.text = Transformer(text, text.context_length, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(text.context_length), persistent=False
        )

    def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        patches = self.patches(image).flatten(2).transpose(1, 2)
        patches = torch.cat([self.class_token.expand(len(image), -1, -1).to(patches.dtype), patches], 1)
        return self.image(patches, 0), self.text(self.tokens(tokens), -1, self.mask), self.logit_scale.exp()
