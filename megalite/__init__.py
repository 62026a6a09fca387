"""A trainer for large Transformers; `megalite.__version__` is its version. Importing it loads nothing else."""


def __getattr__(name: str) -> str:
    """Look the version up when somebody asks: reading the metadata of a package takes longer than the import."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("megalite")
