"""Data sets by their name on the Hugging Face hub, as the Arrow files of the local cache."""


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
        loaded = datasets.load_dataset(path, config or None, split=split)
    except Exception as failed:  # the hub client raises dozens of types for "not found"
        said = str(failed).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"{name} is no file or folder, and loading it as a data set from the hub failed: "
            f"{said}; check the name and the network"
        ) from None
    if isinstance(loaded, datasets.DatasetDict):
        if len(loaded) > 1:
            raise ValueError(f"{name} has several splits; choose one of: {', '.join(loaded)}")
        split, loaded = next(iter(loaded.items()))
    files = [entry["filename"] for entry in loaded.cache_files]
    if not files:
        raise ValueError(
            f"{name} has no rows in its cache; save it with save_to_disk and name that"
        )
    return f"{name}#{split}", files
