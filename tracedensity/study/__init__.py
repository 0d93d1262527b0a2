"""Studies: density over a corpus, what drives it, and what circuits hold."""

from tracedensity.study.counts import Counts, count_tokens

__all__ = ["Counts", "count_tokens"]
