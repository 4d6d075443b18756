"""Errors for packages that are not installed, which name the extra of setup.cfg that has them."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Name the extra to install in errors of the imports in the block.

    Args:
        name: name of the extra, such as `"train"`.

    Raises:
        ImportError: a package is not installed. Names the package and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0].replace("_", "-")
        raise ImportError(
            f"{package} is not installed. It comes with the extra {name!r}: pip install 'self-powered-lsm[{name}]', or "
            f"pip install '.[{name}]' in a checkout."
        ) from error
