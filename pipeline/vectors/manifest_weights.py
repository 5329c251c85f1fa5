"""The weights that a manifest gives the rows of a score table, for methods that pass them on."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from curate.pipeline.manifests.among import manifest_of
from curate.pipeline.manifests.manifest import Manifest
from curate.pipeline.manifests.merge import row_keys
from curate.pipeline.scoring.score_table import ScoreTable
from curate.selectors.protocol import Table


def weighted_manifest(path: str, scores: ScoreTable) -> Manifest:
    """Return the manifest in this folder if its weights belong to the rows of the score table.

    Raises:
        ValueError: there is no manifest, it has no weights, a part was changed, or it selects from
            other data.
    """
    manifest = manifest_of(path, scores)
    if manifest.weight_kind == "none":
        raise ValueError(f"the manifest {path} has no weights to spread")
    return manifest


def table_weights(manifest: Manifest, table: Table) -> Float64[ndarray, " n"]:
    """Return the weight of each row of the table, NaN where the manifest leaves it out.

    Memory: 8 bytes a row and 12 a row of the manifest.

    Raises:
        ValueError: the manifest has rows that the table lacks.
    """
    batches = list(manifest.batches(["shard", "row", "weight"]))
    keys = _joined([row_keys(batch) for batch in batches])
    weights = _joined([batch.column("weight").to_numpy() for batch in batches])
    found, start, matched = np.full(table.rows, np.nan), 0, 0
    for batch in table.scan(["shard", "row"]):
        wanted = row_keys(batch)
        at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        here = np.flatnonzero(keys[at] == wanted)
        found[start + here] = weights[at[here]]
        start, matched = start + batch.num_rows, matched + len(here)
    if matched < len(keys):
        raise ValueError(
            f"the manifest {manifest.path} keeps {len(keys) - matched} rows that the score table "
            "lacks"
        )
    return found


def _joined(parts: Sequence[ndarray]) -> ndarray:
    assert parts, "a manifest has rows"
    return np.concatenate(parts)
