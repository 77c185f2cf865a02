"""The configuration schema: frozen dataclasses and their defaults.

Defaults are the paper's recipe for ViT (Radford et al. 2021, table 18 and section 2.5).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from clip_jax.losses import ContrastiveLoss, SoftmaxLoss
from clip_jax.models.architecture import Architecture, Preprocess


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer; its vocabulary must fit `model.text.vocab_size`, its length is `model.text.length`.

    path: clip_bpe: empty for the published merge table. sentencepiece: the `.model` file. huggingface: tokenizer.json.

    The rest is for the latter two, whose files don't say it:

    clean: 'lower'; 'whitespace': mojibake and HTML undone, white space collapsed; 'canonicalize': that, punctuation
      dropped, lower case.
    pad_id: behind the end token; -1 for the file's own, or the end token where it has none.
    keep_end: False for padding in place of the end token.
    """

    name: Literal["clip_bpe", "sentencepiece", "huggingface"] = "clip_bpe"
    path: str = ""
    clean: Literal["none", "lower", "whitespace", "canonicalize"] = "none"
    pad_id: int = -1
    keep_end: bool = True


@dataclasses.dataclass(frozen=True)
class WeightsConfig:
    """All that weights need to mean the same elsewhere: it travels in their file (clip_jax/interop/msgpack.py).

    tokenizer_file: what `tokenizer.path` contained, so that the weights outlive that path; empty without a path.
    source: for people: where the weights come from.
    """

    model: Architecture = Architecture()
    tokenizer: TokenizerConfig = TokenizerConfig()
    preprocess: Preprocess = Preprocess()
    source: str = ""
    tokenizer_file: bytes = dataclasses.field(default=b"", repr=False)


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes of a training picture. The defaults are the paper's: a random square crop, nothing else."""

    min_crop_area: float = 0.9  # of the largest square; 1 crops nothing away but the longer side
    rotate_degrees: float = 0.0  # up to, either way
    zoom: float = 0.0  # up to, as a fraction, in and out, after the crop
    shift: float = 0.0  # up to, as a fraction of the side
    brightness: float = 0.0  # up to, as a fraction of the range
    contrast: float = 0.0  # up to, as a fraction
    saturation: float = 0.0  # up to, as a fraction
    hue_degrees: float = 0.0  # up to, either way
    grayscale_probability: float = 0.0
    flip_probability: float = 0.0  # left to right; captions that say left or right become wrong
    cutout: float = 0.0  # side of a square that is erased, up to, as a fraction


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the pairs come from and how they become arrays."""

    source: str = "tfrecord"  # a name in clip_jax.data.SOURCES
    # tfrecord: shards by glob, brace range or comma list, e.g. '/data/cc3m/{00000..00331}.tfrecord'.
    files: str = ""
    # Features that hold captions, each with its weight; weights of absent and empty ones fall away.
    captions: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"txt": 1.0, "caption": 1.0})
    # Up to so many texts of a record are drawn and joined by commas: for tags, and names that go with them.
    texts_per_caption: int = 1
    augment: AugmentConfig = AugmentConfig()
    # Settings of the source beyond these, e.g. {'examples': 4096} of `synthetic`: arguments of its `from_config`.
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    cache_dir: str = "~/.cache/clip_jax"  # rendered pictures and indices of shards
    max_bad_fraction: float = 0.01  # of the records read so far: above it, the run ends and names some
    decode_threads: int = 0  # 0: as many as cores
    prefetch_batches: int = 2


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Weights to start from instead of random ones: anything that `clip_jax.load` takes, e.g. 'ViT-L-14.pt'.

    Picture size and context length may differ from `model`'s: position embeddings are resized. All else has to fit.
    """

    weights: str = ""  # empty: random
    model: str = ""  # a name in MODELS, for files that can't tell
    activation: str = ""  # likewise; the file's, not the run's


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """A trained model whose softmax over the batch is learnt from: anything that `clip_jax.load` takes.

    It is frozen, and sees the run's pictures and texts. Picture size and context length may differ from `model`'s as in
    `init`; preprocessing and token ids have to be the same, all else is its own.
    """

    weights: str = ""  # empty: none
    model: str = ""  # a name in MODELS, for files that can't tell
    activation: str = ""  # likewise
    weight: float = 1.0  # of the cross-entropy with the teacher; the loss's own is 1


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """An optimizer with warm-up and cosine decay to zero. The defaults are the paper's for ViT."""

    name: Literal["adamw", "adafactor", "lion"] = "adamw"
    learning_rate: float = 5e-4  # lion: a third to a tenth, and as many times the weight decay
    warmup_steps: int = 2000
    b1: float = 0.9  # adafactor: 0 keeps no first moment
    b2: float = 0.98  # 0.999 for ResNets; adafactor: what 1 - t^-0.8 stops at
    eps: float = 1e-6  # 1e-8 for ResNets; of adamw alone, the others have none
    # What moments are stored in: the paper's half-precision Adam statistics. Stochastic rounding keeps them unbiased.
    moment_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    stochastic_rounding: bool = True  # of moments in half precision; False: to the nearest
    # Parameters that are stored in bfloat16 and rounded stochastically after every update; the paper's: '^text/'.
    half_precision_params: str = ""
    weight_decay: float = 0.2
    # Parameters whose path matches are not decayed; gains, biases and the logit scale never are.
    no_weight_decay: str = ""
    # Parameters whose path this regular expression finds are not trained: '^image/' is locked-image tuning.
    freeze: str = ""
    layer_decay: float = 1.0  # of the learning rate, for every layer further from a tower's end
    max_grad_norm: float = 0.0  # 0: no clipping
    ema_decay: float = 0.0  # 0: no average; evaluation and export use the average where there is one
    shard_moments: bool = False  # over all devices that share the batch, though parameters are not (ZeRO 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, how many at a time, in which precision. Give one of steps, epochs, examples; 0 is none."""

    batch_size: int = 32_768  # pairs in the global batch
    total_steps: int = 0
    total_epochs: float = 0.0
    total_examples: int = 0
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of the computation; parameters are float32
    micro_batches: int = 1  # parts that are embedded one after another; the loss is still the whole batch's
    # What the backward pass computes again: nothing; all but products; all but attention; all of a layer.
    remat: Literal["none", "dots", "names", "full"] = "names"
    unroll_layers: bool = False  # write the loop over layers out: the same numbers, minutes to compile
    # Causal towers: captions end to end, in room for this fraction of a batch's text positions. A batch that needs more
    # is encoded in rows (metric text/in_rows; text/filled is what was needed). 1: all in rows.
    text_capacity: float = 0.35
    log_every_steps: int = 50
    max_nonfinite_steps: int = 10  # in a row; then the run ends
    patch_dropout: float = 0.0  # the fraction of a picture's patches that a step leaves out (Li et al. 2023)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices share the work: `data`, what remains of them, by the batch alone."""

    fsdp: int = 1  # so many neighbours share the batch too, and each holds its part of every large parameter
    tensor: int = 1  # so many neighbours share each layer's heads and perceptron, and have the same rows of the batch


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and what is kept."""

    every_steps: int = 1000
    keep: int = 3  # the newest
    keep_every_steps: int = 0  # besides, every so many steps for good; 0: none


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """An evaluator and a dataset."""

    evaluator: str = "retrieval"  # key of clip_jax.evals.EVALUATORS
    dataset: str = "emoji_unseen_concepts"  # key of clip_jax.evals.datasets.registry.DATASETS
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)  # keyword arguments of the evaluator


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training and at its end. A task's key is the dataset's name in metrics."""

    every_steps: int = 0  # 0: at the end only
    batch_size: int = 512  # images or texts per batch, over all devices
    data_dir: str = ""  # directory of stored datasets: webdataset folders, class folders, TFDS
    baselines_dataset: str = ""  # key of DATASETS that the baselines are fitted to; '': no baselines
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)  # required values, by metric key
    tasks: Mapping[str, EvalTask] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

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
