"""Local paths of published weights: OpenAI's by clip_jax model names, and repositories of the Hugging Face hub.

OpenAI's files are looked up in the cache of its code (`~/.cache/clip`). The hub's are downloaded by `huggingface_hub`
(extra `interop`) into its cache.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import pathlib
import re
from collections.abc import Sequence

from clip_jax.interop.directory import SENTENCE_TRANSFORMERS, WEIGHT_FILES, without_weights
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
_CONFIGS = (".json", ".model", "merges.txt")  # endings of configurations and tokenizers


def locate(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the local path of a path, a name in `OPENAI`, or `hf-hub:<owner>/<name>[@revision]`, downloaded.

    Raises FileNotFoundError for a repository that can't be downloaded and, with the command that downloads it, if
    OpenAI's file is not in the cache.
    """
    name = os.fspath(path)
    check_local("weights", name)
    if name.startswith(HUB):
        return _download(name)
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


def _download(name: str) -> pathlib.Path:
    """Download the files of a repository that are read, and return their directory; offline, that in the cache."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(f"{name} needs huggingface_hub: pip install 'clip-jax-tpu[interop]'") from error
    repository, _, revision = name.removeprefix(HUB).partition("@")
    version = {"revision": revision or None}
    try:
        listed = huggingface_hub.list_repo_files(repository, **version)
    # Errors of the hub and of its HTTP client have no common base class.
    except Exception as error:
        try:
            return pathlib.Path(huggingface_hub.snapshot_download(repository, local_files_only=True, **version))
        except Exception:
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            raise FileNotFoundError(
                f"{name}: expected a repository on the hub or in its cache, got {reason}; check name and revision, or"
                " log in with `hf auth login`"
            ) from error
    files = needed_files(listed, name)
    patterns = [glob.escape(file) for file in files]
    return pathlib.Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns, **version))


def needed_files(listed: Sequence[str], name: str) -> list[str]:
    """Return the files of a repository to download: one copy of the weights, configurations and tokenizer.

    Raises ValueError if none of the files is a weight file that `directory.weight_file` finds.
    """
    nested = {file.partition("/")[0] for file in listed if fnmatch.fnmatch(file, f"{SENTENCE_TRANSFORMERS}/*")}
    folders = ["", *(f"{folder}/" for folder in sorted(nested))]
    copies = ((folder, weights) for folder in folders for weights in WEIGHT_FILES if folder + weights in listed)
    folder, weights = next(copies, ("", ""))
    if not weights:
        repository = name.removeprefix(HUB).partition("@")[0]
        raise ValueError(
            f"{name}: {without_weights(listed, 'DIR')}; to get DIR: hf download {repository} --local-dir DIR"
        )
    stem, ending = re.fullmatch(r"(.*?)(\.\w+)(?:\.index\.json)?", weights).groups()
    shards = re.compile(re.escape(folder + stem) + r"-\d+-of-\d+" + re.escape(ending))
    configs = [file for file in listed if file.endswith(_CONFIGS) and file.rpartition("/")[0] == folder.rstrip("/")]
    others = {folder + file for file in WEIGHT_FILES} - {folder + weights}
    return sorted(
        {folder + weights, *(set(configs) - others)}
        | {file for file in listed if weights.endswith(".index.json") and shards.fullmatch(file)}
    )
