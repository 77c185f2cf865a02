"""What devices send in a training step, read in the compiled program: the TPU's own, and the CPU's."""

import pytest

from clip_jax.config import Architecture, Config, MeshConfig, ResNet, TextTransformer, TrainConfig, ViT
from clip_jax.devices import sharding
from tests.tpu import collectives, compile_step, v4_mesh

TEXT = TextTransformer(512, 16, 511, width=64, layers=3, heads=4)  # a loop of one would be none
TOWERS = {"vit": ViT(32, 8, 64, 3, 4), "resnet": ResNet(32, 16, (2, 1), heads=2)}


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_slice_sends_gradients_and_embeddings_alone(micro_batches):
    """16 chips send the gradient, in its dtype, once for every part, and the loss's embeddings: nothing for packing."""
    text = TextTransformer(64, 77, 63, width=32, layers=3, heads=2)
    config = Config(
        model=Architecture(ViT(16, 8, 32, 3, 2), text, 16),
        train=TrainConfig(batch_size=512, dtype="float32", remat="full", micro_batches=micro_batches),
    )
    compiled, parameters = compile_step(config, v4_mesh({"slice": 1, "data": 16, "fsdp": 1, "tensor": 1}))
    assert sum(size for _, size in collectives(compiled)) <= 1.1 * 4 * parameters + 5 * 512 * 16 * 4


@pytest.mark.parametrize("tower", TOWERS)
def test_parameters_are_sent_and_no_activations(tower):
    """Where `fsdp` cuts parameters, they and their gradients are sent, and embeddings; unpinned, 250 to 330 MB are."""
    config = Config(
        model=Architecture(TOWERS[tower], TEXT, 64),
        train=TrainConfig(batch_size=1024, dtype="float32", remat="full"),
        mesh=MeshConfig(fsdp=8),
    )
    compiled, parameters = compile_step(config, sharding.make_mesh(fsdp=8))
    sizes = [size for _, size in collectives(compiled)]
    embeddings = 1024 * 64 * 4
    # At once: the loss's embeddings, or gradients, of the table of tokens, the last block, a projection and small ones.
    assert max(sizes) <= max(embeddings, (512 * 64 + 14 * 64**2) * 4)
    # Gathered forward and backward, reduced; the text's in either branch, captions end to end or in rows.
    assert sum(sizes) <= 2 * 3 * 4 * parameters + 5 * embeddings
