"""Episodes: a query image, support images with masks, and the truth, from files or from fonts."""

from fss_models.data.episodes import Episodes, collate, to_batch
from fss_models.data.folds import fold_classes
from fss_models.data.glyphs import GlyphEpisodes
from fss_models.data.protocols import PROTOCOLS, Protocol, protocol
from fss_models.data.sources import Source, fss_source, labelled_source

__all__ = [
    "PROTOCOLS",
    "Episodes",
    "GlyphEpisodes",
    "Protocol",
    "Source",
    "collate",
    "fold_classes",
    "fss_source",
    "labelled_source",
    "protocol",
    "to_batch",
]
