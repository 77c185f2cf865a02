"""Train, evaluate and exchange CLIP models in JAX and Flax."""

from importlib import metadata as _metadata

__version__ = "0.1.0"


def _refuse_namesake() -> None:
    """Raise ImportError if PyPI's `clip-jax`, another project with the same import name, is installed too.

    Both write site-packages/clip_jax, so the modules of the two projects would be mixed.
    """
    try:
        other = _metadata.distribution("clip-jax")
    except _metadata.PackageNotFoundError:
        return
    raise ImportError(
        f"clip-jax {other.version} and clip-jax-tpu are both installed. They are different projects with the same"
        " import name, so their files are mixed. Keep one per environment. To keep this one:\n"
        "    pip uninstall --yes clip-jax clip-jax-tpu\n"
        "    pip install --editable .        # in the clone of this project"
    )


_refuse_namesake()


def __getattr__(name: str) -> object:
    # On first use: JAX and Flax take a second to import, which `clip_jax.__version__` does not need.
    if name == "load":
        from clip_jax.inference import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", "load"]
