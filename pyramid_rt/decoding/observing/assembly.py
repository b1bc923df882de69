"""The trace of committed tokens, put together from the verifies of the rounds that committed them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pyramid_rt.result import GenerationTrace
from pyramid_rt.trace import How, JudgedToken, TokenTrace, VerifyRecord


class TraceBuilder:
    """Builds the trace of one generation, commit by commit.

    Args:
        names: of the chain's tiers, small to large.
        spell: the text of a token id.
    """

    def __init__(self, names: Sequence[str], spell: Callable[[int], str]) -> None:
        self._names, self._spell = tuple(names), spell
        self._tokens: list[TokenTrace] = []
        self._rounds: list[VerifyRecord] = []

    def add(self, position: int, tokens: Sequence[int], records: Sequence[VerifyRecord], how: How) -> None:
        """The tokens of a commit.

        Args:
            position: of the first, in the sequence.
            records: verifies of the outer round that committed them; none for tokens that no rule has seen.
            how: of tokens that no rule has seen.
        """
        spelt = [self._spelt(record) for record in records]
        self._rounds += spelt
        self._tokens += [
            self._token(position + place, token, spelt, how) for place, token in enumerate(tokens)
        ]

    def cut(self, count: int) -> None:
        """Only the first tokens are kept."""
        del self._tokens[count:]

    def trace(self) -> GenerationTrace:
        """The trace so far."""
        return GenerationTrace(self._tokens, self._rounds, self._names)

    def _token(self, position: int, token: int, records: Sequence[VerifyRecord], how: How) -> TokenTrace:
        stood, fell = _judgements(position, records)
        number = records[-1].round if records else None
        by = stood[-1].proposed_by if stood else self._names[-1]
        if records:
            top = records[-1]
            how = "proposed" if stood else "correction" if top.replaces else "bonus"
        return TokenTrace(
            token=token,
            text=self._spell(token),
            position=position,
            round=number,
            proposed_by=by,
            accepted_by=tuple(one.judged_by for one in stood),
            how=how,
            judgements=tuple(stood),
            fell=tuple(fell),
        )

    def _spelt(self, record: VerifyRecord) -> VerifyRecord:
        """The same with the texts of its tokens."""
        proposed = tuple(replace(one, text=self._spell(one.token)) for one in record.proposed)
        put = "" if record.replacement is None else self._spell(record.replacement)
        return replace(record, proposed=proposed, replacement_text=put)


def _judgements(
    position: int, records: Sequence[VerifyRecord]
) -> tuple[list[JudgedToken], list[JudgedToken]]:
    """Judgements that let the token stand that was committed at a position, and those of tokens that fell there.

    The round's last verify is the target's. What a lower tier had let stand goes where a tier puts a token of its
    own there, or lets an earlier one fall; then the lower tier looks at the position again.
    """
    stood: list[JudgedToken] = []
    fell: list[JudgedToken] = []
    for record in records:
        place = position - record.position
        if place < 0 or (place >= len(record.proposed) and place != record.accepted):
            continue
        if place < record.accepted:
            stood.append(record.proposed[place])
        else:  # the tier put a token of its own here, or left the place open
            stood = []
            if place < len(record.proposed) and record.proposed[place].reason != "behind":
                fell.append(record.proposed[place])
    return stood, fell
