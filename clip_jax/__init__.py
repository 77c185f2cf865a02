"""Train, evaluate and exchange CLIP models in JAX and Flax."""

from importlib import metadata as _metadata

__version__ = "0.1.0"


def _refuse_namesake() -> None:
    """Raise ImportError where PyPI's `clip-jax`, another project with our import name, is installed as well.

    Both write site-packages/clip_jax, so some modules would be ours and some theirs, until a strange error.
    """
    try:
        other = _metadata.distribution("clip-jax")
    except _metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"the distribution clip-jax {other.version} is installed beside clip-jax-tpu. It is another project, and both"
        " are imported as clip_jax, so their files are mixed. Keep one in each environment. To keep this one:\n"
        "    pip uninstall --yes clip-jax clip-jax-tpu\n"
        "    pip install --editable .        # in the clone of this project"
    )


_refuse_namesake()


def __getattr__(name: str) -> object:
    # On first use: JAX and Flax take a second to import, which `clip_jax.__version__` shouldn't cost.
    if name == "load":
        from clip_jax.inference import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", "load"]
