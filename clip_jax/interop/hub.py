"""Where weights that others published lie on this machine: OpenAI's by our models' names, and Hugging Face's hub.

OpenAI's are found where its own code puts them (`~/.cache/clip`); the hub's are fetched by `huggingface_hub`, of the
extra `interop`, into its cache, and need a network once.
"""

from __future__ import annotations

import os
import pathlib

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
# All that any format of weights consists of; the hub's repositories often hold several, and pictures.
_PATTERNS = ["*.json", "*.safetensors", "*.model", "merges.txt", "open_clip_pytorch_model.bin", "pytorch_model*.bin"]


def locate(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the file or directory of a path, a name in OPENAI, or `hf-hub:<owner>/<name>`.

    Raises:
      FileNotFoundError: if it is not on this machine, saying how to get it.
      ValueError: if the hub's library isn't installed.
    """
    name = os.fspath(path)
    if name.startswith(HUB):
        return _from_hub(name.removeprefix(HUB))
    place = pathlib.Path(name).expanduser()
    if name not in OPENAI or place.exists():
        return place
    theirs = OPENAI[name]
    file = pathlib.Path(CACHE).expanduser() / f"{theirs.replace('/', '-').replace('@', '-')}.pt"
    if not file.exists():
        raise FileNotFoundError(
            f"the weights of {name} are not at {file}. OpenAI's code puts them there: pip install clip-anytorch;"
            f" python -c \"import clip; clip.load('{theirs}', 'cpu')\""
        )
    return file


def _from_hub(repository: str) -> pathlib.Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"{HUB}{repository} needs huggingface_hub: pip install 'clip-jax-tpu[interop]'") from error
    return pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=_PATTERNS))
