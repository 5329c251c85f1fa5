"""Data sets by their name on the Hugging Face hub, as the Arrow files of the local cache."""

import contextlib
import socket
import urllib.request
from collections.abc import Iterator
from unittest import mock
from urllib.parse import urlparse


def hub_files(name: str, split: str | None) -> tuple[str, list[str]]:
    """Return a name that finds the same split again, and its cached Arrow files.

    `name` is `owner/data`, or `owner/data:config`. The data set is downloaded unless it is cached.

    Raises:
        ValueError: there is no such data set, no network and no copy in the cache, or several
            configurations or splits and none asked for.
    """
    import datasets

    path, _, config = name.partition(":")
    try:
        with _offline_if_unreachable() as is_offline:
            loaded = datasets.load_dataset(path, config or None, split=split)
    except Exception as failed:  # the client raises dozens of types for "not found"
        said = str(failed).strip().split("\n")[0].rstrip(".")
        advice = "no network reaches the hub" if is_offline else "check the name"
        raise ValueError(
            f"{name} is no file or folder, and as a data set of the hub it cannot be loaded: "
            f"{said}; {advice}"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) > 1:
            raise ValueError(f"{name} has several splits; choose one of: {', '.join(loaded)}")
        split, loaded = next(iter(loaded.items()))
    files = [entry["filename"] for entry in loaded.cache_files]
    if not files:
        raise ValueError(f"{name} is not cached as Arrow files; save it with save_to_disk first")
    return f"{name}#{split}", files


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[bool]:
    """Spare a machine without network the client's half minute of retries; the cache still works.

    Both libraries read the environment at import only, hence the patch.
    """
    import datasets.config
    import huggingface_hub.constants as hub

    if is_reachable(hub.ENDPOINT):
        yield False
        return
    with (
        mock.patch.object(hub, "HF_HUB_OFFLINE", True),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
    ):
        yield True


def is_reachable(endpoint: str) -> bool:
    """True unless the hub's name cannot even be looked up, and no proxy would do that for us."""
    host = urlparse(endpoint).hostname
    if urllib.request.getproxies() or host is None:
        return True
    try:
        socket.getaddrinfo(host, 443)
    except socket.gaierror:
        return False
    return True
