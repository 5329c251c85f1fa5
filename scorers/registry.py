"""Names of scorers, as text: listing them imports neither torch nor a scorer.

Plug-ins add names through the entry-point group `curate.scorers`.
"""

from collections.abc import Iterable
from dataclasses import fields
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

import yaml

from curate.scorers.protocol import Scorer

SCORERS = {
    "aum": "curate.scorers.aum:AUM",
    "el2n": "curate.scorers.el2n:EL2N",
    "el2n_seq": "curate.scorers.el2n_seq:EL2NSeq",
    "entropy": "curate.scorers.entropy:Entropy",
    "forgetting": "curate.scorers.forgetting:Forgetting",
    "grand": "curate.scorers.grand:GraNd",
    "gwa": "curate.scorers.gwa:GWA",
    "loss": "curate.scorers.loss:Loss",
    "margin": "curate.scorers.margin:Margin",
    "self_influence": "curate.scorers.self_influence:SelfInfluence",
}
