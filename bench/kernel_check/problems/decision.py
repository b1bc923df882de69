"""The decision kernels as problems, see `problems.base`: whole verifies, drawn tokens, reports.

A window of T rows is a verify of T positions: T - 1 proposed tokens and the one after them. Every run begins from
the same open round, which `poison` restores. Rows that nobody may read are NaN, results that nobody may write
stay what they were. Verdicts are those of `gpu_oracle_decision`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.kernel_check.problems import decode_state as decode_states
from bench.kernel_check.problems import oracle
from bench.kernel_check.problems import oracle_decision as decided
from bench.kernel_check.problems.base import Case, Place, Source
from bench.kernel_check.problems.decode_state import BASE, FAR
from pyramid_rt.kernels.decide import decision, readback, sample
from pyramid_rt.kernels.decide import filters as filter_kernels
from pyramid_rt.kernels.decide.decode_state import COUNTERS, END, LIMIT, DecodeState
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.kernels.reference import sampling as ops

# How the proposal fares: as it comes, whole, not at all, up to its last third.
MODES = ("mixed", "all", "none", "late")
# What ends the sequence: nothing, a stop token that stands, one that falls, one that corrects, the limit.
CUTS = ("", "stop stands", "stop falls", "stop corrects", "limit")
THRESHOLD = 0.1


class _OnBoard:
    """The decode state that the problems share, and that every run finds unchanged."""

    rowwise = False
    state: DecodeState
    before: dict[str, Tensor]

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """Rows and an open round; windows all begin at the first row."""
        raise NotImplementedError

    def launches(self, length: int) -> list[Launch]:
        """In order."""
        raise NotImplementedError

    def poison(self) -> None:
        """Every result; the round is open again."""
        decode_states.poison(self.state)
        decode_states.restore(self.state, self.before)

    def start(self, length: int) -> None:
        """All launches."""
        for launch in self.launches(length):
            launch.run()

    def outputs(self, length: int) -> dict[str, Tensor]:
        """The whole state and every result."""
        return decode_states.results(self.state)

    def counters(self) -> list[Tensor]:
        """Arrivals of shares and rows."""
        return [self.state.arrivals]

    def untouched(self, length: int) -> dict[str, Tensor]:
        """Nothing but what a problem names."""
        return {}

    def differences(self, expected: decided.Sequel) -> dict[str, float]:
        """inf for every part of the state that is not as expected."""
        found = decided.Sequel.of({name: getattr(self.state, name) for name in decode_states.STATE})
        return dict.fromkeys(found.differences(expected), math.inf) or {"state": 0.0}


class Verify(_OnBoard):
    """`kernels.decide`: `decision`, `rejection` and `filters`.

    Sizes: vocab, rule (of `decision.RULES`), heat (temperature in tenths); optional tiers, level, kind (of
    `DIVERGENCES`), processed, filters (of `gpu_board.FILTERS`), mode, cut.

    With three tiers the middle one has judged the lowest: what was drawn by either is judged by the target.
    """

    def __init__(self, case: Case, place: Place) -> None:
        source, sizes = Source(place, case), case.sizes
        self.vocab, self.tiers = sizes["vocab"], sizes.get("tiers", 2)
        self.level = sizes.get("level", self.tiers - 1)
        self.rule = decision.RULES[sizes["rule"]]
        self.kind, self.processed = ops.DIVERGENCES[sizes.get("kind", 0)], bool(sizes.get("processed"))
        self.filters, self.heat = sizes.get("filters", 0), sizes["heat"] / 10
        self.mode, self.cut = MODES[sizes.get("mode", 0)], CUTS[sizes.get("cut", 0)]
        self.stored = bool(self.filters) or self.processed or self.rule == "rejection"
        if self.filters and self.level == 1 and (self.processed or self.rule == "rejection"):
            raise ValueError(
                "level is 1, expected 2 with filters: a middle tier's rows are processed like these"
            )
        lists = bool(self.filters) or self.kind.startswith("topk_")
        self.state = decode_states.make_decode_state(place, self.vocab, WINDOW, tiers=self.tiers, lists=lists)
        if place.device.type == "meta":
            return
        decode_states.request(self.state, temperature=self.heat, filters=self.filters, threshold=THRESHOLD)
        self.logits = self._rows(source)
        self.scores = [decode_states.scores(self.state, rows) for rows in self.logits]

    def _rows(self, source: Source) -> list[Tensor]:
        """[64, V] of each tier, lowest first; those below the judge are made from its rows by the mode."""
        p = source.random(WINDOW, self.vocab, scale=3.0)
        rows = [p.clone() for _ in range(self.tiers)]
        rows[self.level] = p
        for tier in range(self.level):
            if self.mode == "mixed":
                rows[tier] = p + source.random(WINDOW, self.vocab, scale=0.8)
            elif self.mode == "none":
                rows[tier][:, self.vocab // 2 :] = -math.inf
        if self.mode == "none":
            p[:, : self.vocab // 2] = -math.inf
        return rows

    def _proposed(self, m: int) -> Tensor:
        """Tokens int64 [m]; where they must fall late, one that the judge does not take."""
        below = self.scores[self.level - 1][:m].argmax(-1)
        if self.mode == "late":
            at = 2 * m // 3
            below[at] = int(self.logits[self.level][at].argmin())
        return below

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """See `_OnBoard`."""
        state, m = self.state, length - 1
        proposed = self._proposed(m)
        for tier, (logits, score) in enumerate(zip(self.logits, self.scores, strict=True)):
            if self.mode == "late" and tier < self.level:
                # There the lower tiers want nothing but the token that falls.
                logits = logits.clone()
                logits[2 * m // 3] = -math.inf
                logits[2 * m // 3, proposed[2 * m // 3]] = 1.0
                score = logits
            decode_states.put_rows(state, tier, logits, score)
            if hide:
                decode_states.hide_rows(state, tier, length if tier > 0 else m)
        state.stop_mask.zero_()
        limit = BASE + m if self.cut == "limit" else FAR
        decode_states.open_verify(
            state, self.level, proposed, limit=limit, ended=self.cut in ("stop stands", "stop falls")
        )
        if self.level == 2 and not self.filters:
            # With filters the lowest tier's rows would be those that its draws left.
            state.source[:m] = torch.arange(m, device=proposed.device) % 2
        if self.cut in ("stop stands", "stop falls"):
            state.stop_mask[proposed[-1]] = True
        elif self.cut == "stop corrects":
            state.stop_mask[self.scores[self.level][2 * m // 3].argmax()] = True
        self.before = decode_states.snapshot(state)

    def launches(self, length: int) -> list[Launch]:
        """As `KernelSteps.verify` writes them; the longest proposal is longer than the window's every other time."""
        state, filters = self.state, bool(self.filters)
        count, made = min(max(2, length + length % 2), WINDOW), list[Launch]()
        if self.stored:
            for level in range(1, self.level + 1):
                below = level == 1 and not filters
                made.append(
                    filter_kernels.plan(state, level, count, draw=False, filters=filters, below=below)
                )
        made.append(
            decision.plan(
                state,
                self.level,
                count,
                self.rule,
                kind=self.kind,
                processed=self.processed,
                stored=self.stored,
            )
        )
        return made

    def untouched(self, length: int) -> dict[str, Tensor]:
        """Results of rows past the verify."""
        state, m = self.state, length - 1
        parts = {"distance": state.distance[m:]}
        for name in ("normaliser", "cut"):
            parts[name] = getattr(state, name)[self.level, length:]
            parts[f"{name} below"] = getattr(state, name)[0, m:]
        return parts

    def verdicts(self, length: int) -> dict[str, float]:
        """Rows against float64, then the whole state from what the rows gave."""
        state, level, m = self.state, self.level, length - 1
        own, winner = state.own[level, :length], self.scores[level][:length].argmax(-1)
        logits = state.rows[:, :length, : self.vocab]
        found: dict[str, float] = {}
        if self.stored:
            places = decode_states.positions(state, length)
            found |= decided.row_ratios(state, level, logits[level], places, winner)
        else:
            found["own"] = oracle.equal(own, winner)
        found["non_finite"] = 0.0 if not bool(state.non_finite[level, :length].any()) else math.inf
        near = [False] * m
        if self.rule.startswith("fuzzy"):
            rows = [logits[level, :m], logits[level - 1, :m]]
            if self.processed:
                rows = [decided.processed(state, level - i, part) for i, part in enumerate(rows)]
            found["distance"] = decided.distance_ratio(self.kind, state.distance[:m], *rows)
            near = ((state.distance[:m] <= THRESHOLD) & (state.distance[:m] < math.inf)).tolist()
        return found | self._state(logits, own.tolist(), near)

    def _state(self, logits: Tensor, own: list[int], near: list[bool]) -> dict[str, float]:
        state, m = self.state, len(own) - 1
        before = decided.Sequel.of(self.before)
        proposed = before.tokens[BASE : BASE + m]
        match = [token == mine for token, mine in zip(proposed, own, strict=False)]
        residual, extra = None, dict[str, float]()
        if self.rule == "rejection":
            stands, residual, extra = self._rejection(logits, before, proposed)
        elif self.rule == "match":
            stands = match
        else:
            stands = [a or (b and self.rule == "fuzzy_or_match") for a, b in zip(near, match, strict=True)]
        expected = decided.after_verify(
            before, self.tiers, self.level, own, stands, near, stops=state.stop_mask.tolist(),
            lossless=self.rule in ("match", "rejection"), residual=residual,
        )  # fmt: skip
        return extra | self.differences(expected)

    def _rejection(
        self, logits: Tensor, before: decided.Sequel, proposed: list[int]
    ) -> tuple[list[bool], int | None, dict[str, float]]:
        """The tokens that stand, the kernel's own correction, and how far that is from the best."""
        state, level, m = self.state, self.level, len(proposed)
        device = logits.device
        places, token = (
            decode_states.positions(state, m),
            torch.tensor(proposed, device=device).unsqueeze(-1),
        )
        p_log = decided.processed(state, level, logits[level, :m])
        below = torch.stack([decided.processed(state, tier, logits[tier, :m]) for tier in range(level)])
        drawn = torch.tensor(before.source[:m], device=device)
        q_log = below[drawn, torch.arange(m, device=device)]
        p, q = (log.gather(-1, token).squeeze(-1).exp() for log in (p_log, q_log))
        u = ops.uniform(ops.random_words(state.seed, places, ops.PURPOSE_ACCEPT, level - 1, 1).squeeze(-1))
        may, must = decided.near_verdicts(u, p, q)
        # How many the kernel let stand: allowed unless one of them must fall, or the next one must stand.
        counted = int(state.counters[level - 1, 1]) - before.counters[level - 1][1]
        allowed = 0 <= counted <= m and all(may[:counted]) and not (counted < m and must[counted])
        if not allowed:
            return must, None, {"verdict": math.inf}
        stands = [i < counted for i in range(m)]
        if counted == m:
            return stands, None, {"verdict": 0.0}
        row = slice(counted, counted + 1)
        noise = decided.exact_noise(state.seed, places[row], ops.PURPOSE_RESIDUAL, level - 1, self.vocab)[0]
        chosen = int(state.tokens[BASE + counted])
        if not 0 <= chosen < self.vocab:
            return stands, None, {"residual": math.inf}
        loss = decided.residual_loss(p_log[counted], q_log[counted], noise, chosen)
        return stands, chosen, {"verdict": 0.0, "residual": loss}


class Draw(_OnBoard):
    """`kernels.decide.sample`, with `filters` where filters are on. Sizes: vocab, heat; filters, first, cut optional.

    The token of row T - 1 is drawn. `first` is the target's after a prompt. A cut: `stop corrects` (the token drawn
    is a stop token), `stop stands` (the sequence has ended), `limit`.
    """

    def __init__(self, case: Case, place: Place) -> None:
        source, sizes = Source(place, case), case.sizes
        self.vocab, self.heat, self.filters = sizes["vocab"], sizes["heat"] / 10, sizes.get("filters", 0)
        self.first, self.cut = bool(sizes.get("first")), CUTS[sizes.get("cut", 0)]
        self.level = 1 if self.first else 0
        self.state = decode_states.make_decode_state(place, self.vocab, WINDOW, lists=bool(self.filters))
        if place.device.type == "meta":
            return
        decode_states.request(self.state, temperature=self.heat, filters=self.filters)
        self.logits = source.random(WINDOW, self.vocab, scale=3.0)
        self.scores = decode_states.scores(self.state, self.logits)

    def launches(self, length: int) -> list[Launch]:
        """One, or two with filters."""
        made, filters = list[Launch](), bool(self.filters)
        if filters:
            made.append(filter_kernels.plan(self.state, self.level, 1, draw=True, filters=True))
        return [*made, sample.plan(self.state, self.level, first=self.first, stored=filters)]

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """T - 1 tokens of the burst are there."""
        state, row = self.state, length - 1
        known = self.scores[:row].argmax(-1)
        decode_states.put_rows(state, self.level, self.logits, self.scores)
        state.rows[1 - self.level] = math.nan
        if hide:
            decode_states.hide_rows(state, self.level, length)
            state.rows[self.level, :row] = math.nan
        state.stop_mask.zero_()
        decode_states.open_verify(state, 1, known, ended=self.cut == "stop stands")
        if self.cut == "limit":
            state.control[LIMIT] = BASE + row
        elif self.cut == "stop corrects":
            state.stop_mask.fill_(True)
        self.before = decode_states.snapshot(state)

    def verdicts(self, length: int) -> dict[str, float]:
        """The token, and the state that follows from it."""
        state, level, row = self.state, self.level, slice(length - 1, length)
        before, winner = decided.Sequel.of(self.before), self.scores[length - 1 : length].argmax(-1)
        token, found = int(winner), dict[str, float]()
        if self.filters:
            token = int(state.own[level, length - 1])
            found = self._stored(row, winner)
        expected = decided.after_draw(
            before, 2, level, token, stops=state.stop_mask.tolist(), first=self.first
        )  # fmt: skip
        return found | self.differences(expected)

    def _stored(self, row: slice, winner: Tensor) -> dict[str, float]:
        """The row's results of `filters`, as if it were a decode state's first."""
        state = self.state
        one = decode_states.make_decode_state(Place(state.rows.device, 80), self.vocab, 1)
        decode_states.request(one, temperature=self.heat, filters=self.filters)
        for name in ("own", "cut", "normaliser"):
            getattr(one, name)[0, 0] = getattr(state, name)[self.level, row][0]
        places = decode_states.positions(state, WINDOW)[row]
        return decided.row_ratios(one, 0, self.logits[row], places, winner)


class Report(_OnBoard):
    """`kernels.decide.readback`. Sizes: vocab, tiers. T tokens are new; the last report may end the buffer."""

    MOST = 20

    def __init__(self, case: Case, place: Place) -> None:
        source, self.tiers = Source(place, case), case.sizes["tiers"]
        self.state = decode_states.make_decode_state(
            place, case.sizes["vocab"], 1, tiers=self.tiers, lists=False
        )
        self.numbers = source.new(3 + (2 + COUNTERS) * self.tiers + self.MOST, dtype=torch.int64)
        self.reported = source.scalar(0)
        self.tokens = source.integers(self.state.tokens.shape[0], high=2**40)

    def launches(self, length: int) -> list[Launch]:
        """One."""
        return [readback.plan(self.state, self.reported, self.numbers, self.MOST)]

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """Distinct numbers everywhere; every other window ends where the buffer does."""
        state, capacity = self.state, self.tokens.shape[0]
        self.begin = capacity - length if length % 2 else BASE
        for tensor, start in ((state.control, 1000), (state.counters, 5000)):
            tensor.copy_(torch.arange(tensor.numel(), device=tensor.device).view_as(tensor) + start)
        state.control[END] = self.begin + length
        state.tokens.copy_(self.tokens)
        state.ended.fill_(length % 3 == 0)
        self.before = decode_states.snapshot(state)

    def poison(self) -> None:
        """The numbers; the last report is where it was."""
        super().poison()
        self.numbers.fill_(decode_states.POISON)
        self.reported.fill_(self.begin)

    def outputs(self, length: int) -> dict[str, Tensor]:
        """The numbers, and where the next report begins."""
        return {"numbers": self.numbers, "reported": self.reported}

    def verdicts(self, length: int) -> dict[str, float]:
        """Every number."""
        wanted = decided.report_numbers(self.state, self.begin, self.MOST)
        return {
            "numbers": 0.0 if self.numbers.tolist() == wanted else math.inf,
            "reported": 0.0 if int(self.reported) == self.begin + length else math.inf,
            **self.differences(decided.Sequel.of(self.before)),
        }
