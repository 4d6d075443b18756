"""Errors for packages that are not installed, which name the extra of setup.cfg that has them."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Name the extra to install, such as `"train"`, in the ImportError of a package that the block imports and that is
    not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0].replace("_", "-")
        raise ImportError(
            f"{package} is not installed. It comes with the extra {name!r}: pip install 'self-powered-lsm[{name}]', or "
            f"pip install '.[{name}]' in a checkout."
        ) from error
