"""Everything that a round reads or writes on the device, in one place.

N tiers, numbered from 0 (draft) to N - 1 (target). M_i is the longest proposal of tier i. `RoundPlan` holds what is
fixed when a round is captured; `State` holds what may change from request to request without a new capture.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyramid_rt.decoding.counters import COUNTERS
from pyramid_rt.decoding.rules import Rule, rows_needed
from pyramid_rt.errors import InputError
from pyramid_rt.kernels.limits import NO_POSITION, WINDOW
from pyramid_rt.models.llama import SLACK_ROWS

if TYPE_CHECKING:
    from pyramid_rt.kernels.decide.decode_state import DecodeState

MAX_WINDOW = WINDOW  # a window that starts at the end of the context must fit into the slack


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """The static shape of an outer round.

    Attributes:
        rules: N - 1 rules, lowest stage first.
        lengths: N - 1 lengths: draft_length, then for each tier between draft and target how many tokens must
            stand before the tier above verifies (qualifier_length in a pyramid of three).
        inner_rounds: None for "until enough stand"; else this fixed number of inner rounds at each such tier.
        host_control: the host reads one flag per inner round, stops early and trims windows.
        sampled: own tokens are drawn with noise (temperature above 0).
        filters: top-k, top-p or min-p is on.
        logprobs: None, or how many most likely tokens to report beside each committed one.
        trace: every verify is watched, and the host reads it after the round.
    """

    rules: tuple[Rule, ...]
    lengths: tuple[int, ...]
    inner_rounds: int | None
    host_control: bool
    sampled: bool
    filters: bool
    logprobs: int | None = None
    trace: bool = False
    longest: tuple[int, ...] = field(init=False)
    keep_own: tuple[bool, ...] = field(init=False)
    keep_effective: tuple[bool, ...] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.rules):
            raise InputError(f"{len(self.rules)} rules need as many lengths, found {len(self.lengths)}")
        for length in self.lengths:
            if length < 1:
                raise InputError(f"speculation lengths must be at least 1, found {length}")
        if self.inner_rounds is not None and self.inner_rounds < 1:
            raise InputError(f"inner_rounds must be at least 1, found {self.inner_rounds}")
        object.__setattr__(self, "longest", self._longest_proposals())
        own, effective = rows_needed(self.rules)
        object.__setattr__(self, "keep_own", own)
        object.__setattr__(self, "keep_effective", effective)
        for level in range(self.tiers):
            if self.window(level) > MAX_WINDOW:
                raise InputError(self._too_wide(level))

    def _too_wide(self, level: int) -> str:
        """The error of a tier's window, by the names of the options that make it so wide."""
        options = ("draft_length", "qualifier_length")[: len(self.lengths)]
        given = [f"{name}={length}" for name, length in zip(options, self.lengths, strict=False)]
        if len(self.lengths) > len(given):
            given = [f"lengths {self.lengths}"]
        if self.inner_rounds is not None:
            given.append(f"inner_rounds={self.inner_rounds}")
        who = "the target" if level == self.tiers - 1 else f"tier {level}"
        return (
            f"{who} would look at {self.window(level)} tokens at a time, more than {MAX_WINDOW}: lower "
            + " or ".join(given)
        )

    def _longest_proposals(self) -> tuple[int, ...]:
        longest: list[int] = []
        for level, length in enumerate(self.lengths):
            if level == 0:
                longest.append(length)
            elif self.inner_rounds is None:
                longest.append(length + longest[-1])
            else:
                longest.append(self.inner_rounds * (longest[-1] + 1))
        return tuple(longest)

    @property
    def tiers(self) -> int:
        return len(self.rules) + 1

    def window(self, level: int) -> int:
        """Fixed width of a tier's window: N - i pending tokens, and the proposal it verifies."""
        return self.tiers - level + (self.longest[level - 1] if level > 0 else 0)

    @property
    def burst(self) -> int:
        """Tokens that the lowest tier draws at a time."""
        return self.lengths[0] if self.lengths else 1

    @property
    def device_rows(self) -> int:
        """Rows of a tier's logits from an outer round's first position on, those of inactive steps included."""
        return self.longest_commit + (self.longest[-2] + 1 if self.tiers > 2 else 1)

    @property
    def longest_commit(self) -> int:
        """Most tokens one outer round can commit."""
        return self.longest[-1] + 1 if self.rules else 1


@dataclass
class State:
    """Device buffers of one pyramid running one plan. Scalars are tensors of shape []."""

    tokens: Tensor  # int64 [max_seq + 64]: the token buffer; its last entry takes masked writes
    origin: Tensor  # int64 [max_seq + 64]: the tier that put each token there
    end: Tensor  # int64 []: tokens known, proposals included
    limit: Tensor  # int64 []: no token is put at or after this position
    ended: Tensor  # bool []: the last token is a stop token of this request
    cached: list[Tensor]  # N x int64 []: positions in each tier's cache that hold what the token buffer says
    stop_mask: Tensor  # bool [V]: end-of-sequence and stop tokens of this request
    seed: Tensor  # int64 [2]: low and high word
    temperature: Tensor  # float32 []
    top_k: Tensor  # int64 []
    top_p: Tensor  # float32 []
    min_p: Tensor  # float32 []
    thresholds: Tensor  # float32 [max(1, N - 1)]: of the fuzzy rules; unused elsewhere
    counters: Tensor  # int64 [N, len(COUNTERS)]
    bad: Tensor  # int64 [N]: first position with non-finite logits, NO_POSITION when there is none
    own_rows: list[Tensor | None]  # N - 1: float32 [M_i + M_(i-1) + 2, V] raw rows of tier i's proposal
    effective_rows: list[Tensor | None]  # N - 1: likewise, log of the effective distributions
    logprob_rows: Tensor | None  # float32 [M_(N-2) + 1, V]: the target's raw rows of the last verify
    decode_state: DecodeState | None = None  # what kernels decide on; the fields above are then views of it

    @classmethod
    def allocate(cls, plan: RoundPlan, max_seq: int, vocab_size: int, device: torch.device) -> State:
        """Take every buffer of `plan` at once. `max_seq` counts positions without the slack."""

        def scalar(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((), value, dtype=dtype, device=device)

        def rows(level: int, wanted: bool) -> Tensor | None:
            below = plan.longest[level - 1] if level > 0 else 0
            # An inactive verify still writes its rows, past everything that stands.
            count = plan.longest[level] + below + 2
            return torch.zeros(count, vocab_size, dtype=torch.float32, device=device) if wanted else None

        stages = range(plan.tiers - 1)
        return cls(
            tokens=torch.zeros(max_seq + SLACK_ROWS, dtype=torch.int64, device=device),
            origin=torch.zeros(max_seq + SLACK_ROWS, dtype=torch.int64, device=device),
            end=scalar(0, torch.int64),
            limit=scalar(0, torch.int64),
            ended=scalar(0, torch.bool),
            cached=[scalar(0, torch.int64) for _ in range(plan.tiers)],
            stop_mask=torch.zeros(vocab_size, dtype=torch.bool, device=device),
            seed=torch.zeros(2, dtype=torch.int64, device=device),
            temperature=scalar(0.0, torch.float32),
            top_k=scalar(0, torch.int64),
            top_p=scalar(1.0, torch.float32),
            min_p=scalar(0.0, torch.float32),
            thresholds=torch.tensor(
                [rule.threshold for rule in plan.rules] or [0.0], dtype=torch.float32, device=device
            ),
            counters=torch.zeros(plan.tiers, len(COUNTERS), dtype=torch.int64, device=device),
            bad=torch.full((plan.tiers,), NO_POSITION, dtype=torch.int64, device=device),
            own_rows=[rows(level, plan.keep_own[level]) for level in stages],
            effective_rows=[rows(level, plan.keep_effective[level]) for level in stages],
            logprob_rows=(
                torch.zeros(plan.longest_commit, vocab_size, dtype=torch.float32, device=device)
                if plan.logprobs is not None
                else None
            ),
        )

    @classmethod
    def for_kernels(cls, plan: RoundPlan, max_seq: int, vocab_size: int, device: torch.device) -> State:
        """The same for rounds of kernels: no copies of rows, and every field a view of one `DecodeState`."""
        # Triton, which the decode_state brings in, is not everywhere.
        from pyramid_rt.kernels.decide.decode_state import END, LIMIT, DecodeState, bad_at, cached_at

        kinds = [rule.divergence_kind or "" for rule in plan.rules]
        decode_state = DecodeState.allocate(
            plan.tiers,
            plan.device_rows,
            max_seq + SLACK_ROWS,
            vocab_size,
            lists=plan.filters or any(kind.startswith("topk_") for kind in kinds),
            device=device,
        )
        for stage, rule in enumerate(plan.rules):
            decode_state.thresholds[stage] = rule.threshold
        unused: list[Tensor | None] = [None] * len(plan.rules)
        wanted = plan.logprobs is not None
        return cls(
            tokens=decode_state.tokens,
            origin=decode_state.origin,
            end=decode_state.word(END),
            limit=decode_state.word(LIMIT),
            ended=decode_state.ended,
            cached=[decode_state.word(cached_at(level)) for level in range(plan.tiers)],
            stop_mask=decode_state.stop_mask,
            seed=decode_state.seed,
            temperature=decode_state.temperature,
            top_k=decode_state.top_k,
            top_p=decode_state.top_p,
            min_p=decode_state.min_p,
            thresholds=decode_state.thresholds,
            counters=decode_state.counters,
            bad=decode_state.control[bad_at(plan.tiers) :],
            own_rows=unused,
            effective_rows=unused,
            logprob_rows=decode_state.rows[-1, : plan.longest_commit, :vocab_size] if wanted else None,
            decode_state=decode_state,
        )

    def nbytes(self) -> int:
        """Bytes of all buffers."""
        if self.decode_state is not None:
            return self.decode_state.nbytes()
        singles = [value for value in vars(self).values() if isinstance(value, Tensor)]
        listed = [
            value
            for values in (self.cached, self.own_rows, self.effective_rows)
            for value in values
            if value is not None
        ]
        return sum(value.numel() * value.element_size() for value in [*singles, *listed])
