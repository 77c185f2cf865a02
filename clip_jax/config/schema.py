"""Configuration schema: frozen dataclasses, by default the paper's recipe for ViT models (Radford et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import regex

from clip_jax.losses import ContrastiveLoss, SoftmaxLoss
from clip_jax.models.architecture import Architecture, Preprocess


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Tokenizer. The fields after `path` are for all except "clip_bpe": their files do not contain them."""

    # "xlm_roberta" is a SentencePiece model with the ids of fairseq, as in XLM-R, XLM-V and MetaCLIP 2.
    name: Literal["clip_bpe", "sentencepiece", "xlm_roberta", "huggingface"] = "clip_bpe"
    # clip_bpe: merge table, empty for the published one; sentencepiece, xlm_roberta: `.model` file; huggingface:
    # tokenizer.json.
    path: str = ""
    # 'whitespace': fix mojibake, unescape HTML, collapse white space. 'canonicalize': also remove punctuation and
    # lowercase. 'no_punctuation': remove punctuation and lowercase, without the repair: SigLIP's in transformers.
    clean: Literal["none", "lower", "whitespace", "canonicalize", "no_punctuation"] = "none"
    pad_id: int = -1  # id after the end token; -1: the file's own, or the end token if it has none
    keep_end: bool = True  # False: replace the end token by padding


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
    """Everything needed to use weights elsewhere; stored in weight files (clip_jax/interop/msgpack.py)."""

    model: Architecture = Architecture()
    tokenizer: TokenizerConfig = TokenizerConfig()
    preprocess: Preprocess = Preprocess()
    source: str = ""  # origin of the weights, for reports
    # Content of `tokenizer.path`, so that the weights do not depend on that file; empty without a path.
    tokenizer_file: bytes = dataclasses.field(default=b"", repr=False)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random augmentation of training images. The defaults are the paper's: a random square crop only."""

    min_crop_area: float = 0.9  # of the largest square; 1: crop only the longer side
    rotate_degrees: float = 0.0  # maximum, in both directions
    zoom: float = 0.0  # maximum, in and out after the crop, as a fraction
    shift: float = 0.0  # maximum, as a fraction of the side
    brightness: float = 0.0  # maximum, as a fraction of the range
    contrast: float = 0.0  # maximum, as a fraction
    saturation: float = 0.0  # maximum, as a fraction
    hue_degrees: float = 0.0  # maximum, in both directions
    grayscale_probability: float = 0.0  # of an image without colors
    flip_probability: float = 0.0  # left to right; captions with "left" or "right" become wrong
    cutout: float = 0.0  # maximum side of an erased square, as a fraction


@dataclasses.dataclass(frozen=True)
class FilterConfig:
    """Records to skip; others take their places. Captions that fail are dropped; one of a record must pass."""

    min_image_size: int = 0  # of the shorter side, in pixels
    max_aspect_ratio: float = 0.0  # longer side / shorter side; 0: any
    min_caption_characters: int = 0  # of a caption; shorter ones are dropped
    max_caption_characters: int = 0  # 0: any
    # Unicode scripts, e.g. ('Han', 'Hiragana', 'Katakana'), that have more than half of a caption's letters; (): any.
    caption_scripts: tuple[str, ...] = ()

    def __post_init__(self):
        for name in self.caption_scripts:
            try:
                regex.compile(rf"\p{{Script={name}}}")
            except regex.error as error:
                raise ValueError(
                    f"data.filters.caption_scripts: {name!r} is no Unicode script; give e.g. 'Latin' or 'Cyrillic'"
                ) from error
        if 0 < self.max_aspect_ratio < 1:
            raise ValueError(f"data.filters.max_aspect_ratio={self.max_aspect_ratio}: expected 1 or more; 0: any")
        if 0 < self.max_caption_characters < self.min_caption_characters:
            raise ValueError(
                f"data.filters.max_caption_characters={self.max_caption_characters} is less than"
                f" min_caption_characters={self.min_caption_characters}: no caption passes"
            )


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """A dataset of a mixture; the other keys of `data` are those of all."""

    source: str = ""  # as data.source
    files: str = ""  # as data.files
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)  # as data.options
    weight: float = 1.0  # its pairs in every batch, relative to those of the others


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training data."""

    source: str = ""  # a name in clip_jax.data.SOURCES; '': the one that reads `files`
    # Files as a folder, glob, brace range or comma-separated list, e.g. '/data/cc3m/{00000..00331}.tfrecord'.
    files: str = ""
    # Several datasets by names of your own, in place of source, files and options.
    mixture: Mapping[str, DatasetConfig] = dataclasses.field(default_factory=dict)
    # Features with captions and their sampling weights; absent and empty features are skipped.
    captions: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"txt": 1.0, "caption": 1.0})
    # Maximum number of a record's texts that are sampled and joined by commas, e.g. for a name and its tags.
    texts_per_caption: int = 1
    # Pairs that are held out for the validation loss and never trained on, by a hash of each one's key; of sources that
    # are read by blocks, such as object stores, whole files by a hash of the name. 0: none.
    validation_fraction: float = 0.0
    filters: FilterConfig = FilterConfig()
    augment: AugmentConfig = AugmentConfig()
    # JPEGs: 'fast' decodes crops of twice the image size or more at 1/2, 1/4 or 1/8 and resizes in uint8; 'exact'
    # resizes bicubically in float32, close to evaluation, which never uses 'fast'. The crops are the same.
    # 'fast' on photographs of 240 to 1024 px: mean PSNR to Pillow's bicubic 38 to 49 dB, docs/performance.md.
    decode: Literal["fast", "exact"] = "fast"
    # Settings of the source, arguments of its `from_config`, e.g. {'examples': 4096} for `synthetic`.
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    cache_dir: str = "~/.cache/clip_jax"  # for rendered images and shard indices
    max_bad_fraction: float = 0.01  # bad records / records read; above it the run stops and lists some of them
    max_stall_seconds: float = 600.0  # how long a store that does not answer is waited for, before the run stops
    decode_threads: int = 0  # 0: one per core
    prefetch_batches: int = 2  # prepared in advance


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Pretrained weights to start from, of the same model; position embeddings are resized."""

    weights: str = ""  # anything that `clip_jax.load` reads, e.g. 'ViT-L-14.pt'; empty: random initialization
    model: str = ""  # architecture of the file, a name in MODELS, if the file does not determine it
    activation: str = ""  # activation of the file, if the file does not determine it
    preprocess: str = ""  # of the file, a name in PREPROCESS or a JSON file, if the file does not determine it


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """A frozen model whose softmax over the batch is distilled; preprocessing and token ids must be the run's.

    Image size and context length may differ from `model`'s, as in `init`.
    """

    weights: str = ""  # anything that `clip_jax.load` reads; empty: no teacher
    model: str = ""  # architecture of the file, a name in MODELS, if the file does not determine it
    activation: str = ""  # activation of the file, if the file does not determine it
    preprocess: str = ""  # of the file, a name in PREPROCESS or a JSON file, if the file does not determine it
    weight: float = 1.0  # of the cross-entropy with the teacher; the contrastive loss has weight 1


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer with linear warm-up and cosine decay to zero. The defaults are the paper's for ViT models."""

    name: Literal["adamw", "adafactor", "lion"] = "adamw"  # the update rule
    learning_rate: float = 5e-4  # peak; lion: 3 to 10 times smaller, with a weight decay 3 to 10 times larger
    warmup_steps: int = 2000  # the rate of step n, counted from 1, is n / warmup_steps of the peak
    b1: float = 0.9  # adafactor: 0 for no first moment
    b2: float = 0.98  # 0.999 for ResNets; adafactor: upper bound of 1 - t^-0.8
    eps: float = 1e-6  # 1e-8 for ResNets; adamw only
    # Storage of the moments, as the paper's half-precision Adam statistics. Stochastic rounding keeps them unbiased.
    moment_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    stochastic_rounding: bool = True  # of half-precision moments; False: round to nearest
    # Regular expression of parameters stored in bfloat16, rounded stochastically after each update; paper: '^text/'.
    half_precision_params: str = ""
    weight_decay: float = 0.2  # times the learning rate, of every step; decoupled from the gradient
    # Regular expression of parameters without weight decay, or 'open_clip': class and position embeddings. Gains,
    # biases and the logit scale never have it (paper).
    no_weight_decay: str = ""
    # Regular expression of parameters that are not trained; '^image/' is locked-image tuning.
    freeze: str = ""
    layer_decay: float = 1.0  # factor of the learning rate per layer of distance from a tower's output
    max_grad_norm: float = 0.0  # 0: no clipping
    ema_decay: float = 0.0  # of the parameters' moving average, which is evaluated and exported; 0: no EMA
    shard_moments: bool = False  # over all devices that share the batch, with replicated parameters (ZeRO 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Duration, batch and computation. Set exactly one of total_steps, total_epochs and total_examples."""

    batch_size: int = 32_768  # pairs in the global batch
    total_steps: int = 0  # steps of the run; 0: by one of the next two
    total_epochs: float = 0.0  # passes over the training data
    total_examples: int = 0  # pairs seen, with repetitions
    seed: int = 0  # of the initialization, the data order, augmentation and stochastic rounding
    # Of the computation; parameters are float32. float32 uses full-precision matmuls, which are slow on TPUs.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    micro_batches: int = 1  # encoded one after another to save memory; the loss is of the global batch
    # Residuals saved for the backward pass. 'none': all; 'dots': matmuls; 'names': outputs of attention and
    # convolutions; 'full': inputs of layers.
    remat: Literal["none", "dots", "names", "full"] = "names"
    unroll_layers: bool = False  # write the loop over layers out: the same numbers, minutes to compile
    # Packed captions, for causal towers: positions as a fraction of the batch's text positions. A batch that needs more
    # (metric text/filled) is encoded padded (metric text/padded). 1: no packing.
    text_capacity: float = 0.35
    log_every_steps: int = 50  # steps between two records of metrics, which are means over them
    max_nonfinite_steps: int = 10  # consecutive steps with a non-finite loss or gradient, after which the run stops
    patch_dropout: float = 0.0  # fraction of an image's patches dropped in training (Li et al. 2023)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Device mesh. The batch is sharded over `fsdp` and over `data`, which has the remaining devices."""

    fsdp: int = 1  # size of the fsdp axis: parameters, optimizer state and batch are sharded over it
    tensor: int = 1  # size of the tensor axis: attention heads and MLP width are sharded over it


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoint schedule."""

    every_steps: int = 1000  # steps between two checkpoints; the last step has one, too
    keep: int = 3  # number of newest checkpoints to keep
    keep_every_steps: int = 0  # keep every multiple of this, a multiple of every_steps, permanently; 0: none


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """An evaluator and a dataset."""

    evaluator: str = "retrieval"  # key of clip_jax.evals.EVALUATORS
    dataset: str = "emoji_unseen_concepts"  # key of DATASETS (clip_jax.evals.datasets.registry), or own data
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)  # keyword arguments of the evaluator


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training and at its end. A task's key is the dataset's name in metrics."""

    every_steps: int = 0  # 0: at the end only
    batch_size: int = 512  # images or texts per batch, over all devices; pairs per batch of the validation loss
    validation_examples: int = 4096  # of each dataset, for the validation loss; rounded down to batches
    data_dir: str = ""  # directory of stored datasets: webdataset folders, class folders, TFDS
    baselines_dataset: str = ""  # key of DATASETS that the baselines are fitted to; '': no baselines
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)  # required values, by metric key
    # By the name of the dataset in metrics, e.g. {'cifar10': {'evaluator': 'zeroshot', 'dataset': 'cifar10'}}.
    tasks: Mapping[str, EvalTask] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of a training run."""

    model: Architecture = Architecture()
    tokenizer: TokenizerConfig = TokenizerConfig()
    preprocess: Preprocess = Preprocess()
    data: DataConfig = DataConfig()
    loss: ContrastiveLoss = SoftmaxLoss()  # the class that LOSSES has for loss.name
    init: InitConfig = InitConfig()
    teacher: TeacherConfig = TeacherConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
