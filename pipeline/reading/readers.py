"""Opening shards: what goes wrong is told with the shard's name, and a few stay open."""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator

import pyarrow as pa

from curate.pipeline.reading.formats import ShardReader, open_shard
from curate.pipeline.storing.storage import is_url

OPEN_READERS = 8


@contextlib.contextmanager
def named(url: str) -> Iterator[None]:
    """Turn what Arrow or the system says about a damaged shard into one sentence naming it."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"shard {url} is gone; restore it") from None
    except (pa.ArrowException, OSError, EOFError) as error:
        said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        is_damaged = isinstance(error, pa.ArrowException) or not is_url(url)
        cause = "it is truncated or damaged" if is_damaged else "the store failed or it is damaged"
        raise ValueError(
            f"cannot read shard {url}: {said}; {cause}, restore it or leave it out"
        ) from None


class Readers:
    """The few readers kept open between calls, apart per process and thread."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], ShardReader] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, form: str, url: str, hint: object, fingerprint: str) -> ShardReader:
        """Return an open reader of the shard; use it before asking for the next."""
        # A forked process must not share file positions with its parent.
        key = (os.getpid(), threading.get_ident(), url, fingerprint)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        reader = open_shard(form, url, hint)
        with self._lock:
            self._kept[key] = reader
            while len(self._kept) > OPEN_READERS:
                self._kept.popitem(last=False)
        return reader
