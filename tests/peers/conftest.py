"""Imports the peers without torchvision's compiled operators, whose wheels need CUDA."""

import sys
import types
import warnings

import jax

jax.config.update("jax_disable_most_optimizations", False)  # the program that users run


def _import_peers() -> None:
    import torch

    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # clip-anytorch imports `packaging` from pkg_resources, which current setuptools no longer has.
    if "pkg_resources" not in sys.modules:
        import packaging.version

        sys.modules["pkg_resources"] = types.SimpleNamespace(packaging=packaging)
    import clip
    import open_clip
    import transformers.utils.sentencepiece_model_pb2_new

    assert clip and open_clip and transformers
    # sentencepiece 0.2.3 contains code of protobuf 7, which apache-beam does not accept; transformers has its own copy.
    sys.modules["sentencepiece.sentencepiece_model_pb2"] = transformers.utils.sentencepiece_model_pb2_new
    torch.set_num_threads(2)


# The peers' own deprecation warnings are ignored; warnings in tests stay errors.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _import_peers()
