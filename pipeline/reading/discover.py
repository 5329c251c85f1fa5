"""Which files make up a corpus, from what the user wrote: paths, folders, globs, data set names."""

import glob
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsspec.implementations.arrow import ArrowFSWrapper

from curate.pipeline.reading.fingerprint import FileState, file_state, pool, state_of_entry
from curate.pipeline.reading.formats import ENDINGS, format_of, sniff_format
from curate.pipeline.storing.storage import absolute, filesystem, is_url, join, split_url

READABLE = ", ".join(ends[0] for ends in ENDINGS.values()) + ", .jsonl.gz, .jsonl.zst"


@dataclass(frozen=True)
class Found:
    """The shards of a corpus in order: names below `root`, and the state of each file.

    `uri` finds them again without `split`. `features` is what `datasets` says of the columns.
    """

    uri: str
    root: str
    form: str
    names: tuple[str, ...]
    states: tuple[FileState, ...] = field(repr=False)
    features: dict[str, Any] | None = None


def discover(uri: str | os.PathLike[str] | Sequence[str], split: str | None = None) -> Found:
    """Return the files of a corpus, sorted by path below their common folder.

    Raises:
        ValueError: there is nothing to read, or files of several formats, or several splits and
            none asked for.
    """
    listed = [uri] if isinstance(uri, str | os.PathLike) else list(uri)
    parts = [line for part in listed for line in os.fspath(part).split("\n") if line]
    if not parts:
        raise ValueError("no corpus given; name a file, folder, glob or data set")
    if len(parts) > 1:
        return _found_list(parts)
    place, _, fragment = parts[0].partition("#")
    if fragment and not _exists(parts[0]):
        return _found(place, split or fragment)
    return _found(parts[0], split)


def _found(uri: str, split: str | None) -> Found:
    place = absolute(uri)
    if is_url(place):
        return _found_remote(place, split)
    if os.path.isdir(place):
        return _found_folder(place, split)
    if split is not None and os.path.exists(place):
        raise ValueError(f"{uri} has no splits; leave out split={split!r}")
    if os.path.isfile(place):
        return _of_files(place, os.path.dirname(place), [place])
    if glob.has_magic(place):
        root = _fixed_part(place)
        files = [f for f in glob.glob(place, recursive=True) if os.path.isfile(f)]
        files = [f for f in files if _is_visible(os.path.relpath(f, root))]
        return _of_files(place, root, [f for f in files if format_of(f)] or files)
    if re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:[\w.-]+)?", uri) and format_of(uri) is None:
        from curate.pipeline.reading.hub import hub_files

        name, files = hub_files(uri, split)
        return _of_files(name, os.path.commonpath([os.path.dirname(f) for f in files]), files)
    raise ValueError(f"no such file or folder: {uri}")


def _found_list(parts: Sequence[str]) -> Found:
    """Several places as one corpus; each may be a file, a folder or a glob."""
    found = [_found(part, None) for part in parts]
    urls = [join(f.root, name) for f in found for name in f.names]
    states = [state for f in found for state in f.states]
    if len({is_url(url) for url in urls}) > 1:
        raise ValueError("a corpus is either local or remote; the list given mixes both")
    for url in urls:
        if urls.count(url) > 1:
            raise ValueError(f"{url} is listed twice; name each shard once")
    forms = {f.form: f.names[0] for f in found}
    _refuse_mixture(forms)
    bodies = [split_url(url)[0] if is_url(url) else url for url in urls]
    folders = [body.rpartition("/")[0] + "/" for body in bodies]
    root = os.path.commonprefix(folders)  # noqa: RUF071, as commonpath would break "s3://"
    root = root.rpartition("/")[0]
    if root.endswith(":/") or root.endswith(":"):
        raise ValueError("the shards listed lie in different stores; name shards of one store")
    tail = split_url(urls[0])[1] if is_url(urls[0]) else ""
    order = sorted(range(len(urls)), key=lambda i: bodies[i][len(root) + 1 :])
    return Found(
        "\n".join(absolute(p) for p in parts),
        (root or "/") + tail,
        found[0].form,
        tuple(bodies[i][len(root) + 1 :] for i in order),
        tuple(states[i] for i in order),
        found[0].features,
    )


def _found_folder(folder: str, split: str | None) -> Found:
    splits = _splits_of_dict(folder)
    if splits:
        if split is None and len(splits) > 1:
            raise ValueError(
                f"{folder} holds several splits; choose one of: {', '.join(sorted(splits))}"
            )
        chosen = split or splits[0]
        if chosen not in splits:
            raise ValueError(
                f"{folder} has no split {chosen!r}; choose one of: {', '.join(sorted(splits))}"
            )
        return _found_folder(os.path.join(folder, chosen), None)
    if split is not None:
        raise ValueError(f"{folder} has no splits; leave out split={split!r}")
    if os.path.isfile(os.path.join(folder, "state.json")):
        return _found_saved(folder)
    files = [os.path.join(folder, name) for name in _walk(folder)]
    return _of_files(folder, folder, [f for f in files if format_of(f)])


def _splits_of_dict(folder: str) -> list[str]:
    written = Path(folder, "dataset_dict.json")
    return list(json.loads(written.read_text())["splits"]) if written.is_file() else []


def _found_saved(folder: str) -> Found:
    """A `datasets.save_to_disk` folder: its own list of files, and what its columns are."""
    state = json.loads(Path(folder, "state.json").read_text())
    files = [os.path.join(folder, entry["filename"]) for entry in state["_data_files"]]
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(f"{file} is missing, though {folder}/state.json names it")
    info = Path(folder, "dataset_info.json")
    features = json.loads(info.read_text()).get("features") if info.is_file() else None
    return _of_files(folder, folder, files, features)


def _found_remote(uri: str, split: str | None) -> Found:
    if split is not None:
        raise ValueError(f"{uri} has no splits; leave out split={split!r}")
    fs, path = filesystem(uri)
    body, tail = split_url(uri)
    root = (_fixed_part(body) if glob.has_magic(path) else body) + tail
    try:
        fs.invalidate_cache()
        if fs.isfile(path):
            folder, _, name = body.rpartition("/")
            return _ordered(uri, folder + tail, {name: file_state(uri)})
        look = fs.glob if glob.has_magic(path) else fs.find
        entries = look(path, detail=True)
    except FileNotFoundError:
        entries = {}
    except Exception as failed:  # each store's client has its own errors
        said = " ".join(str(failed).split())
        raise ValueError(f"cannot list {uri}: {said}; check the address and access") from None
    base = filesystem(root)[1].rstrip("/")
    below = {name[len(base) :].lstrip("/"): entry for name, entry in entries.items()}
    files = {
        name: entry
        for name, entry in below.items()
        if entry["type"] == "file" and _is_visible(name) and format_of(name)
    }
    if isinstance(fs, ArrowFSWrapper):
        with pool() as threads:
            states = threads.map(file_state, [join(root, name) for name in files])
            return _ordered(uri, root, dict(zip(files, states, strict=True)))
    return _ordered(uri, root, {name: state_of_entry(entry) for name, entry in files.items()})


def _of_files(
    uri: str, root: str, files: Sequence[str], features: dict[str, Any] | None = None
) -> Found:
    return _ordered(uri, root, {os.path.relpath(f, root): file_state(f) for f in files}, features)


def _ordered(
    uri: str, root: str, states: dict[str, FileState], features: dict[str, Any] | None = None
) -> Found:
    names = tuple(sorted(states))
    if not names:
        exists = _exists(uri) or glob.has_magic(split_url(uri)[0])
        said = "holds no file to read" if exists else "does not exist or is empty"
        raise ValueError(f"{uri} {said}; a corpus has files like {READABLE}")
    forms: dict[str, str] = {}
    for name in names:
        forms.setdefault(format_of(name) or sniff_format(join(root, name)) or "", name)
    if "" in forms:
        raise ValueError(
            f"cannot tell the format of {join(root, forms[''])}; a corpus has files like {READABLE}"
        )
    _refuse_mixture(forms)
    return Found(
        uri, root, next(iter(forms)), names, tuple(states[name] for name in names), features
    )


def _refuse_mixture(forms: dict[str, str]) -> None:
    if len(forms) > 1:
        examples = ", ".join(f"{name} ({form})" for form, name in sorted(forms.items()))
        raise ValueError(f"a corpus has one format, here are several: {examples}; name a glob")


def _walk(folder: str) -> list[str]:
    """Return the visible files below a folder; links are followed, once each."""
    names, seen = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        below = os.path.relpath(place, folder)
        folders[:] = [] if real in seen else sorted(f for f in folders if _is_visible(f))
        if real not in seen:
            names += [os.path.normpath(os.path.join(below, f)) for f in files if _is_visible(f)]
        seen.add(real)
    return names


def _is_visible(name: str) -> bool:
    return not any(part.startswith((".", "_")) for part in name.split("/"))


def _fixed_part(pattern: str) -> str:
    """Return the folder above the first wildcard."""
    fixed = []
    for part in pattern.split("/")[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return "/".join(fixed) or "/"


def _exists(uri: str) -> bool:
    place = absolute(uri)
    if not is_url(place):
        return os.path.exists(place)
    fs, path = filesystem(place)
    return bool(fs.exists(path))
