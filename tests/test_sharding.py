"""Sharding: rules for all models, bytes per device, rejected meshes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from clip_jax.config import MODELS, Config, MeshConfig, OptimConfig, ResNet
from clip_jax.devices import sharding
from clip_jax.models import make_model, split_batch_stats
from clip_jax.training import optim, step
from tests import tiny_models


def _params(name: str):
    params = jax.eval_shape(make_model(MODELS[name]).init, jax.random.key(0))
    params.pop("batch_stats", None)
    return params


def _rules(name: str):
    return sharding.sharding_rules(MODELS[name])


def _state(mesh, **changes):
    config = Config(model=MODELS["vit_b32"], mesh=MeshConfig(mesh.shape["fsdp"]), optim=OptimConfig(**changes))
    model, optimizer = step.model_from_config(config, mesh), optim.make_optimizer(config.optim, 5000)
    return step.abstract_state(model, optimizer, config, mesh)


@pytest.mark.parametrize("name", ["vit_b32", "rn50", "rn50x64", "siglip_b16", "siglip2_b16", "vit_l14_clipa", "emoji"])
def test_every_parameter_has_one_rule(name):
    specs = sharding.param_specs(_params(name), sharding.make_mesh(fsdp=4), _rules(name))
    leaves = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    assert len([spec for spec in leaves if "fsdp" in spec]) >= 6


@pytest.mark.parametrize("name", ["vit", "siglip", "resnet"])
def test_heads_and_mlp_width_are_sharded_over_tensor_and_every_matrix_over_fsdp(name):
    """No other dimension has the sizes of heads (4; 32 in a ResNet's pooling) and MLP (240)."""
    base, sizes = tiny_models.ARCHITECTURES[name], {"width": 96, "heads": 4, "layers": 5, "mlp_ratio": 2.5}
    image = ResNet(64, 12, (2, 2, 2, 2), 32) if name == "resnet" else replace(base.image, **sizes)
    text = replace(base.text, **sizes)
    architecture = replace(base, image=image, text=text, embed_dim=image.fixed_embed_dim or 40)
    params = split_batch_stats(jax.eval_shape(make_model(architecture).init, jax.random.key(0)))[0]
    specs = sharding.param_specs(params, sharding.make_mesh(fsdp=2, tensor=2), sharding.sharding_rules(architecture))
    by_path = dict(jax.tree_util.tree_leaves_with_path(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axes = [*by_path[path], *[None] * (leaf.ndim - len(by_path[path]))]
        assert [axis == "tensor" for axis in axes] == [size in (4, 32, 240) for size in leaf.shape], path
        is_matrix = path[-1].key in ("kernel", "embedding", "patch_embedding", "projection")
        assert axes.count("fsdp") == is_matrix, path


def test_parameter_with_no_rule_or_two_is_rejected_by_name():
    mesh, params = sharding.make_mesh(), {"image": {"strange": jnp.zeros((2, 3))}}
    with pytest.raises(ValueError, match=r"image/strange \(2, 3\): expected one matching sharding rule, got none; see"):
        sharding.param_specs(params, mesh, _rules("vit_b32"))
    with pytest.raises(ValueError, match="got 'image/.*' and 'image/strange'"):
        sharding.param_specs(params, mesh, (("image/.*", ()), ("image/strange", ())))


def test_axis_of_one_device_shards_nothing():
    specs = sharding.param_specs(_params("vit_b32"), sharding.make_mesh(), _rules("vit_b32"))
    assert set(jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))) == {PartitionSpec()}


def test_heads_that_tensor_does_not_divide_are_rejected():
    with pytest.raises(ValueError, match=r"mesh.tensor=8 does not divide 12, an axis of .*key/bias .*; use 4"):
        sharding.param_specs(_params("vit_b32"), sharding.make_mesh(tensor=8), _rules("vit_b32"))


def test_axes_that_do_not_divide_the_devices_are_rejected():
    with pytest.raises(ValueError, match="mesh.fsdp=3 times mesh.tensor=2 does not divide 8 devices"):
        sharding.make_mesh(fsdp=3, tensor=2)


def test_fsdp_and_sharded_moments_divide_the_state():
    """ViT-B/32: parameters and two moments of 577 MiB each. Replicated biases and positions: 1 % of an eighth."""
    replicated = sharding.shard_bytes(_state(sharding.make_mesh()))
    assert replicated == pytest.approx(3 * 151_277_313 * 4, rel=1e-3)
    assert sharding.shard_bytes(_state(sharding.make_mesh(fsdp=8))) == pytest.approx(replicated / 8, rel=0.02)
    sharded_moments = sharding.shard_bytes(_state(sharding.make_mesh(), shard_moments=True))
    assert sharded_moments == pytest.approx(replicated * (1 / 3 + 2 / 3 / 8), rel=0.01)


def test_moments_are_sharded_as_their_parameters():
    state = _state(sharding.make_mesh(fsdp=2))
    kernel = state.params["image"]["transformer"]["blocks"]["mlp"]["in"]["kernel"]
    found = [
        leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state)
        if leaf.shape == kernel.shape and "image" in str(path) and "'in'" in str(path)
    ]
    assert found == [kernel.sharding.spec] * 2 == [PartitionSpec(None, "fsdp")] * 2


def test_devices_along_the_tensor_axis_have_the_same_rows():
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    rows = sharding.to_global(np.arange(8), mesh)
    held = {shard.device.id: tuple(np.asarray(shard.data)) for shard in rows.addressable_shards}
    assert [held[i] for i in range(8)] == [(0, 1), (0, 1), (2, 3), (2, 3), (4, 5), (4, 5), (6, 7), (6, 7)]


def test_micro_batches_take_rows_of_every_device_and_join_to_the_batch():
    mesh = sharding.make_mesh(jax.devices()[:4])
    rows = sharding.to_global(np.arange(16), mesh)
    split, join = sharding.micro_batches(mesh, 2)
    micro_batches = jax.jit(split)(rows)
    np.testing.assert_array_equal(micro_batches, [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]])
    held = {tuple(np.asarray(s.data)[:, 0]) for s in micro_batches.addressable_shards}
    assert held == {(0, 2), (4, 6), (8, 10), (12, 14)}
    np.testing.assert_array_equal(jax.jit(lambda x: join(split(x)))(rows), np.arange(16))
