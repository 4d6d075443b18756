"""What an installation may lack: the packages that an extra of setup.cfg brings."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Stands around imports. Where they need a package that is not installed, the error says which extra brings it.

    Args:
        name: of the extra, such as `"train"`.

    Raises:
        ImportError: names the package and the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0].replace("_", "-")
        raise ImportError(
            f"{package} is not installed. It comes with the extra {name!r}: pip install 'self-powered-lsm[{name}]', or "
            f"pip install '.[{name}]' in a checkout."
        ) from error
