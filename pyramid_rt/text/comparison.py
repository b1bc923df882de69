"""The comparison of two tokenizers of one pyramid: they must agree on what ids mean.

The target's tokenizer alone turns text into ids and ids into text. A lower tier only ever sees and proposes ids, so
of its tokenizer nothing counts but which token stands behind which id. How it would have cut a text (merges,
normalizer, pre-tokenizer, post-processor) and how it flags its added tokens changes nothing that is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any


def vocabulary_difference(mine: Mapping[str, int], theirs: Mapping[str, int], added: Set[int]) -> str | None:
    """A description of how ids differ in what they mean; None when they do not.

    Args:
        mine, theirs: ids by spelling, added tokens included.
        added: ids of added tokens, in either. That only one has such a token is no difference.
    """
    if mine == theirs:
        return None
    here = {index: token for token, index in mine.items()}
    there = {index: token for token, index in theirs.items()}
    other = sorted(index for index in here.keys() | there.keys() if here.get(index) != there.get(index))
    other = [index for index in other if (index in here and index in there) or index not in added]
    if not other:
        return None
    index = other[0]
    return (
        f"vocabulary: {len(mine)} tokens against {len(theirs)}, {len(other)} ids differ, "
        f"the first is {index}: {_short(here.get(index))} against {_short(there.get(index))}"
    )


def _short(value: Any) -> str:
    text = "none" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
