"""Loads evaluation datasets by name: the stored test split and its prompts, as an EvalDataset. Nothing is downloaded.

With several processes, all of them load a split or none: an error in one process is raised on all.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from clip_jax.config import DataConfig, check_name
from clip_jax.devices import distributed
from clip_jax.devices.distributed import DATA_ERRORS
from clip_jax.evals import prompts
from clip_jax.evals.datasets.builtin import read_builtin
from clip_jax.evals.datasets.files import in_class_order
from clip_jax.evals.datasets.folder import ASSOCIATIONS, CAPTIONS, read_folder
from clip_jax.evals.datasets.own import is_own, own_dataset
from clip_jax.evals.datasets.registry import DATASETS, SUITES, Dataset
from clip_jax.evals.datasets.tfds import read_tfds
from clip_jax.evals.datasets.webdataset import read_webdataset
from clip_jax.evals.zeroshot import MIN_CANDIDATES, cue_prompt
from clip_jax.typing import DatasetSplit, EvalDataset, Unavailable


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """Options of `load_dataset`."""

    data_dir: str = ""  # directory of stored datasets: webdataset folders, class folders, TFDS
    templates: str = ""  # argument of `prompts.templates`; '' for the registry's
    class_names: str = ""  # argument of `prompts.class_names`; '' for the registry's
    data: DataConfig = DataConfig()  # for datasets that are generated

    def check(self) -> None:
        """Raise ValueError for templates or class names that do not exist."""
        for read, name in ((prompts.templates, self.templates), (prompts.class_names, self.class_names)):
            if name:
                with contextlib.suppress(Unavailable):  # reported for each dataset
                    read(name)


def load_split(row: Dataset, part: str, data_dir: str) -> DatasetSplit:
    """Load a split from a Python package, else from `<data_dir>/<row.folder>/<split>`, else from TFDS below `data_dir`.

    Raises Unavailable if the split is not on this machine: the message lists the places and how to prepare the data.
    """
    if row.builtin:
        return read_builtin(row.builtin, part)
    if not data_dir:
        raise Unavailable("expected the directory of the evaluation data: set --data_dir or eval.data_dir")
    split, tfds_split = row.split(part), row.split(part, tfds=True)
    root = Path(data_dir).expanduser()
    folder = root / row.folder / split
    if row.folder and split and folder.is_dir():
        return (read_webdataset if any(folder.glob("*.tar")) else read_folder)(root / row.folder, split)
    problems = []
    if row.folder and split:
        problems.append(
            f"{folder} is not a folder. Expected tar shards 0.tar, 1.tar, … of images with .cls, .npy or .txt,\n"
            f"or images in one folder per class, or images and {CAPTIONS} or {ASSOCIATIONS}"
        )
    if row.tfds and tfds_split:
        try:
            return read_tfds(row.tfds, tfds_split, data_dir)
        except Unavailable as error:
            problems.append(str(error))
    place = f"{row.folder or row.tfds} ({split or tfds_split})"
    raise Unavailable("\n".join([f"{place} is not on this machine:", *problems, row.note]).rstrip())


def find(name: str, key: str = "dataset") -> Dataset:
    """Return the row of a dataset: of DATASETS, or of the user's own data, e.g. 'folder:/my/test'.

    Raises ValueError for an unknown name, and for files that do not exist. key: name of `name` in errors.
    """
    if is_own(name):
        return own_dataset(name)
    check_name(key, name, DATASETS)
    return DATASETS[name]


def load_dataset(name: str, options: LoadOptions = LoadOptions()) -> EvalDataset:  # noqa: B008 (frozen)
    """Load the test split of a dataset (see `find`). Its other splits are loaded on access.

    Raises:
      ValueError: for an unknown name, and for damaged data.
      Unavailable: if the dataset is not on this machine, or has another size than in the registry.

    >>> dataset = load_dataset("digits")
    >>> len(dataset.images), dataset.texts[3]
    (450, ('a photo of a 3.',))
    """
    row = find(name)

    def load(part: str) -> DatasetSplit:
        if part != "test" and row.read or part == "validation" and not (row.validation or row.tfds_validation):
            raise Unavailable(f"{row.name} has no {part} split")
        with distributed.synchronized_errors(Unavailable, *DATA_ERRORS):
            found = row.read(options.data) if row.read else load_split(row, part, options.data_dir)
            if part != "test" and found.class_keys and found.class_keys != split.class_keys:
                raise ValueError(_other_classes(row.split(part), found.class_keys, row.test, split.class_keys))
        return found

    if row.generate is not None:
        with distributed.synchronized_errors(Unavailable, *DATA_ERRORS):
            dataset = row.generate(options.data)
        kind = f"{len(dataset.texts)} {'captions' if row.task == 'retrieval' else 'classes'}"
        metric = row.metric if row.task == "retrieval" else dataset.metric
        description = f"{len(dataset.images):,} images; {kind}; metric {metric}"
        prompts_source = f"{sum(map(len, dataset.texts)):,} prompts of the dataset"
        return dataclasses.replace(
            dataset, name=row.name, description=description, prompts=prompts_source, class_names=dataset.texts
        )
    split = load("test")
    found, kind = (len(split.cues), "cues") if row.task == "association" else (len(split.images), "images")
    if row.size and found != row.size:
        raise Unavailable(f"expected {row.size:,} {kind} in the {row.test} split, found {found:,}: not comparable")
    groups = None
    if row.group_column >= 0:
        if split.metadata is None:
            raise Unavailable(f"{row.metric} needs groups, and the split has no metadata (.npy)")
        groups = split.metadata[:, row.group_column]
        groups = np.where(np.isin(groups, row.excluded_groups), -1, groups)
    parts = [f"{len(split.images):,} images of the {row.test} split", f"metric {row.metric}"]
    if row.classes:
        parts.insert(1, f"{row.classes} classes")
    dataset = EvalDataset(
        row.name,
        split.images,
        (),
        split.targets,
        groups=groups,
        metric=row.metric,
        cues=split.cues,
        load_split=load,
        description="; ".join(parts),
        classes=row.classes,
    )
    return dataclasses.replace(dataset, **TEXTS[row.task](row, split, options))


def expand(names: list[str] | tuple[str, ...]) -> list[str]:
    """Return the datasets of names and suites, each once.

    Raises ValueError for an unknown name, for files of the user's that do not exist, and for two equal metric names.
    """
    for name in names:
        if not is_own(name):
            check_name("dataset or suite", name, [*SUITES, *DATASETS])
    found = list(dict.fromkeys(dataset for name in names for dataset in SUITES.get(name, (name,))))
    titles: dict[str, str] = {}
    for name in found:
        if (other := titles.setdefault(find(name).name, name)) != name:
            raise ValueError(f"datasets {other!r} and {name!r}: both are {find(name).name!r} in metrics; rename a file")
    return found


# By `Dataset.task`: fields of EvalDataset from the row, the test split and the options.


def _captions(row: Dataset, split: DatasetSplit, options: LoadOptions) -> dict:
    if not split.captions:
        raise Unavailable("expected captions, found classes")
    templates = prompts.templates(options.templates or row.templates or "name")
    texts = [
        tuple(template.replace(prompts.SLOT, caption) for template in templates)
        for captions in split.captions
        for caption in captions
    ]
    image_M = np.repeat(np.arange(len(split.images)), [len(captions) for captions in split.captions])
    image_n = np.arange(len(split.images))
    targets = image_n if np.array_equal(image_n, image_M) else image_M == image_n[:, None]
    source = f"{len(texts):,} captions in {', '.join(map(repr, templates))}"
    return {"texts": texts, "targets": targets, "prompts": source}


def _class_prompts(row: Dataset, split: DatasetSplit, options: LoadOptions) -> dict:
    if split.targets is None:
        raise Unavailable("expected classes, found captions")
    stored, keys = (tuple((name,) for name in names) for names in (split.class_names, split.class_keys))
    try:
        names, names_source = _first_source(prompts.class_names, options.class_names, stored, row.class_names, keys)
        templates, source = _first_source(prompts.templates, options.templates, split.templates, row.templates, ())
        if not templates:
            templates, source = prompts.templates("photo"), "photo"
        if not names:
            raise Unavailable(
                "no class names: neither stored with the data (classnames.txt) nor published; give --class_names"
            )
        if keys:
            try:
                names = in_class_order(names, split.class_keys, f"class names {names_source}")
            except ValueError as error:
                raise Unavailable(str(error)) from error
        if row.classes and len(names) != row.classes:
            got = f"{len(names)} ({names_source})"
            raise Unavailable(f"expected {row.classes} class names, got {got}: give --class_names")
    except Unavailable as error:  # probes need no texts
        return {"missing_texts": str(error)}
    texts = prompts.class_texts(names, templates)
    sources = f"class names {names_source}, templates {source}"
    numbers = f"{sum(map(len, texts)):,} prompts, {prompts.digest(names, templates)}"
    return {"texts": texts, "class_names": names, "prompts": f"{sources}, {numbers}"}


def _first_source(
    read: Callable[[str], tuple], user: str, stored: tuple, registered: str, keys: tuple
) -> tuple[tuple, str]:
    """Return class names or templates and their source.

    The first of: the user's, those stored in files of the dataset, the registry's, the keys of the stored classes.
    Raises Unavailable if the registry's are of a package that is not installed: other prompts give another result.
    """
    if user:
        return read(user), user
    if stored:
        return stored, "stored with the data"
    if not registered:
        return keys, "of the stored classes"
    try:
        return read(registered), registered
    except Unavailable as error:
        raise Unavailable(f"{error}; or choose others, e.g. --templates=photo, --class_names=mine.json") from error


def _other_classes(part: str, found: Sequence[str], test: str, expected: Sequence[str]) -> str:
    only = [sorted(set(a) - set(b)) for a, b in ((found, expected), (expected, found))]
    return (
        f"expected the same classes in {part} and {test}; only in {part}: {', '.join(only[0]) or 'none'}; only in "
        f"{test}: {', '.join(only[1]) or 'none'}: add empty folders, so that equal class ids are equal classes"
    )


def _cue_prompts(row: Dataset, split: DatasetSplit, options: LoadOptions) -> dict:
    if not split.cues:
        raise Unavailable("expected cues in associations.jsonl, found none")
    templates = prompts.templates(options.templates) if options.templates else ()
    texts = [
        tuple(template.replace(prompts.SLOT, cue.text) for template in templates) or (cue_prompt(cue.text),)
        for cue in split.cues
    ]
    counted = f"those with {MIN_CANDIDATES} candidates or more count"
    return {"texts": texts, "prompts": f"{len(split.cues):,} cues, such as {texts[0][0]!r}; {counted}"}


TEXTS: dict[str, Callable[[Dataset, DatasetSplit, LoadOptions], dict]] = {
    "zeroshot": _class_prompts,
    "retrieval": _captions,
    "association": _cue_prompts,
}
