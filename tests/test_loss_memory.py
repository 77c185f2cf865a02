"""What a loss holds and sends, by the compilers' own account: XLA's for this CPU, and the TPU's."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding

from clip_jax.losses import LOSSES
from tests.tpu import collectives, shapes, v4_mesh

GIB = 2**30


def _compile(name: str, mesh: Mesh, batch: int, width: int, dtype: jnp.dtype) -> jax.stages.Compiled:
    """Compile value and gradient of a loss over a batch that is sharded over all axes of a mesh."""
    rows, whole = jax.P(mesh.axis_names), jax.P()
    loss = jax.shard_map(
        functools.partial(LOSSES[name], axis=mesh.axis_names),
        mesh=mesh,
        in_specs=(rows, rows, whole, whole),
        out_specs=whole,
    )
    embeddings = jax.ShapeDtypeStruct((batch, width), dtype, sharding=NamedSharding(mesh, rows))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, whole))
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    return gradient.lower(embeddings, embeddings, scalar, scalar).compile()


@pytest.mark.parametrize(("chips", "batch"), [(16, 131_072), (256, 1_048_576)])
def test_a_chip_holds_as_little_at_eight_times_the_batch(chips, batch):
    """0.30 GiB; others take 4.2 to 16.2 for the first, and grow with the batch."""
    compiled = _compile("softmax", v4_mesh({"data": chips}), batch, 768, jnp.float32)
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.30 * GIB
    assert not shapes(compiled) & {(batch // chips, batch), (batch, batch // chips), (batch, batch)}


@pytest.mark.parametrize("name", LOSSES)
def test_the_papers_batch_is_two_messages_on_a_pod(name):
    """The texts gathered, and their gradients sent home; ids and statistics are 1 % more. No hop waits for a ring."""
    chips, batch, width = 256, 32_768, 768
    compiled = _compile(name, v4_mesh({"data": chips}), batch, width, jnp.bfloat16)
    sent = collectives(compiled)
    assert len(sent) <= 8
    assert sum(size for _, size in sent) <= 1.05 * 2 * batch * width * 2
    assert not shapes(compiled) & {(batch // chips, batch), (batch, batch // chips), (batch, batch)}


@pytest.mark.parametrize("name", LOSSES)
def test_one_device_holds_a_thirtieth_of_the_similarities(name):
    batch, width = 16_384, 512
    compiled = _compile(name, Mesh(jax.devices()[:1], ("data",)), batch, width, jnp.float32)
    # Value and gradient of the form with all similarities take at least two matrices of them: 2 GiB.
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * batch * batch * 4 / 30
