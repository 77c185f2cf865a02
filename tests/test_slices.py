"""Collectives of a training step, read from the program compiled for a TPU and for the CPU."""

import pytest

from clip_jax.config import Architecture, Config, MeshConfig, ResNet, TextTransformer, TrainConfig, ViT
from clip_jax.devices import sharding
from tests.tpu import collectives, compile_step, v4_mesh

pytestmark = pytest.mark.slow

TEXT = TextTransformer(512, 16, 511, width=64, layers=3, heads=4)  # at least 2 layers, or XLA removes the loop
TOWERS = {"vit": ViT(32, 8, 64, 3, 4), "resnet": ResNet(32, 16, (2, 1), heads=2)}


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_data_parallel_chips_send_only_gradients_and_embeddings(micro_batches):
    """16 chips send the gradient (in its dtype, per micro-batch) and the loss's embeddings, and nothing for packing."""
    text = TextTransformer(64, 77, 63, width=32, layers=3, heads=2)
    config = Config(
        model=Architecture(ViT(16, 8, 32, 3, 2), text, 16),
        train=TrainConfig(batch_size=512, dtype="float32", remat="full", micro_batches=micro_batches),
    )
    compiled, parameters = compile_step(config, v4_mesh({"slice": 1, "data": 16, "fsdp": 1, "tensor": 1}))
    assert sum(size for _, size in collectives(compiled)) <= 1.1 * 4 * parameters + 5 * 512 * 16 * 4


@pytest.mark.parametrize("tower", TOWERS)
def test_fsdp_sends_parameters_and_no_activations(tower):
    """Parameters, gradients and embeddings. Without sharding constraints on activations, 250 to 330 MB are sent."""
    config = Config(
        model=Architecture(TOWERS[tower], TEXT, 64),
        train=TrainConfig(batch_size=1024, dtype="float32", remat="full"),
        mesh=MeshConfig(fsdp=8),
    )
    compiled, parameters = compile_step(config, sharding.make_mesh(fsdp=8))
    sizes = [size for _, size in collectives(compiled)]
    embeddings = 1024 * 64 * 4
    # Largest message: embeddings of the loss, or combined gradients of token table, last block, projection, small ones.
    assert max(sizes) <= max(embeddings, (512 * 64 + 14 * 64**2) * 4)
    # Gathered in forward and backward, reduced; text parameters in both branches, packed captions and rows.
    assert sum(sizes) <= 2 * 3 * 4 * parameters + 5 * embeddings
