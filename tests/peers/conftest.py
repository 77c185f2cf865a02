"""The peers, imported as far as they go without compiled torchvision: its wheels are for CUDA."""

import sys
import types
import warnings


def _import_peers() -> None:
    import torch

    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # clip-anytorch looks for `packaging` where current setuptools no longer has it.
    if "pkg_resources" not in sys.modules:
        import packaging.version

        sys.modules["pkg_resources"] = types.SimpleNamespace(packaging=packaging)
    import clip
    import open_clip
    import transformers

    assert clip and open_clip and transformers
    torch.set_num_threads(2)


# They warn of what is deprecated in each other; ours stay errors.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    _import_peers()
