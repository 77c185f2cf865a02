"""Local paths of published weights: OpenAI's by clip_jax model names, and repositories of the Hugging Face hub.

OpenAI's files are looked up in the cache of its code (`~/.cache/clip`). The hub's are downloaded by `huggingface_hub`
(extra `interop`) into its cache.
"""

from __future__ import annotations

import os
import pathlib

from clip_jax.paths import check_local

HUB = "hf-hub:"
CACHE = "~/.cache/clip"
OPENAI = {
    "rn50": "RN50",
    "rn101": "RN101",
    "rn50x4": "RN50x4",
    "rn50x16": "RN50x16",
    "rn50x64": "RN50x64",
    "vit_b32": "ViT-B/32",
    "vit_b16": "ViT-B/16",
    "vit_l14": "ViT-L/14",
    "vit_l14_336": "ViT-L/14@336px",
}
# Files that the formats consist of. Repositories often contain several formats, and images.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "merges.txt", "open_clip_pytorch_model.bin", "pytorch_model*.bin"]


def locate(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the local path of a path, a name in `OPENAI`, or `hf-hub:<owner>/<name>`, which is downloaded.

    Raises FileNotFoundError, with the command that downloads it, if OpenAI's file is not in the cache.
    """
    name = os.fspath(path)
    check_local("weights", name)
    if name.startswith(HUB):
        try:
            import huggingface_hub
        except ImportError as error:
            raise ValueError(f"{name} needs huggingface_hub: pip install 'clip-jax-tpu[interop]'") from error
        return pathlib.Path(huggingface_hub.snapshot_download(name.removeprefix(HUB), allow_patterns=_PATTERNS))
    local = pathlib.Path(name).expanduser()
    if name not in OPENAI or local.exists():
        return local
    published = OPENAI[name]
    file = pathlib.Path(CACHE).expanduser() / f"{published.replace('/', '-').replace('@', '-')}.pt"
    if not file.exists():
        raise FileNotFoundError(
            f"{name}: expected OpenAI's weights at {file}, got no file; download them: pip install clip-anytorch;"
            f" python -c \"import clip; clip.load('{published}', 'cpu')\""
        )
    return file
