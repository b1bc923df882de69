"""The LM head as a problem, see `problems.base`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.kernel_check.problems import oracle
from bench.kernel_check.problems.base import EPS, Activations, Case, Judge, Place, Source, choose
from pyramid_rt.kernels.forward import head
from pyramid_rt.kernels.launch import Launch
from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.kernels.reference import forward as reference
from pyramid_rt.kernels.reference import sampling as sampling_reference


class Head:
    """`kernels.head`. Sizes: vocab, padded, width; noise (temperature in tenths), placed, config optional.

    Rows of the window lie scattered in x, so that the gather is exercised too; placed, they are found by numbers
    that the kernel reads on the device.
    """

    rowwise = True
    SEED = 0xFEDC_BA98_7654_3210

    def __init__(self, case: Case, place: Place) -> None:
        source, sizes = Source(place, case), case.sizes
        self.vocab, padded, width = sizes["vocab"], sizes["padded"], sizes["width"]
        self.acts = Activations.make(source, width)
        # Window start, position that row 0 decides, position of the outputs' row 0.
        self.placement: tuple[Tensor, Tensor, Tensor] | None = None
        if sizes.get("placed"):
            self.placement = (source.scalar(0), source.scalar(0), source.scalar(0))
        elif place.device.type != "meta":
            self.acts.order = (torch.arange(WINDOW, device=place.device) * 5 + 3) % WINDOW
        self.rows = source.new(WINDOW, dtype=torch.int64) if self.acts.order is None else self.acts.order
        # The matrix has as many rows as the vocabulary padded, as checkpoints with padded tables do.
        self.weight = source.random(padded, width, scale=width**-0.5)
        self.logits = source.new(WINDOW, padded, dtype=torch.float32)
        self.config = choose("head", source, padded, width, sizes)
        self.stats = head.TileStatistics.allocate(-(-padded // self.config.block_n), place.device)
        self.temperature = sizes.get("noise", 0) / 10
        self.positions = source.new(WINDOW, dtype=torch.int64)
        self.seed = source.new(2, dtype=torch.int64)
        self.heat = source.new(dtype=torch.float32)
        if place.device.type != "meta":
            self.seed.copy_(torch.tensor([self.SEED & 0xFFFFFFFF, self.SEED >> 32]))
            self.heat.fill_(self.temperature)
        self.judge = Judge()

    def launches(self, length: int) -> list[Launch]:
        """One."""
        acts, noise = self.acts, None
        if self.temperature:
            positions = None if self.placement else self.positions[:length]
            noise = head.Noise(self.seed, positions, self.heat)
        rows = self.rows[:length] if self.placement is None else head.Placement(*self.placement, length)
        return [
            head.plan(
                acts.x, acts.sums, EPS, self.weight, rows, self.vocab, self.logits,
                self.stats, noise, self.config,
            )
        ]  # fmt: skip

    def place(self, first: int, length: int, *, hide: bool) -> None:
        """Rows and the positions that they decide."""
        self.acts.place(first, length, hide)
        if self.placement is not None:
            decided = (1 << 20) + first
            for scalar, value in zip(self.placement, (decided - 1, decided, decided), strict=True):
                scalar.fill_(value)
        torch.arange((1 << 20) + first, (1 << 20) + first + WINDOW, out=self.positions)

    def poison(self) -> None:
        """Logits and statistics."""
        for tensor in (self.logits, self.stats.peak, self.stats.total, self.stats.best):
            tensor.fill_(math.nan)
        self.stats.token.fill_(-7)

    def start(self, length: int) -> None:
        """One launch."""
        self.launches(length)[0].run()

    def outputs(self, length: int) -> dict[str, Tensor]:
        """Logits and statistics of the tiles."""
        stats = self.stats
        found = {"peak": stats.peak, "total": stats.total, "best": stats.best, "token": stats.token}
        return {"logits": self.logits[:length]} | {k: v[:length] for k, v in found.items()}

    def untouched(self, length: int) -> dict[str, Tensor]:
        """Later rows."""
        return {
            "logits": self.logits[length:],
            "peak": self.stats.peak[length:],
            "best": self.stats.best[length:],
        }

    def counters(self) -> list[Tensor]:
        """None: the head is not split."""
        return []

    def _apply(self, kind: torch.dtype) -> dict[str, Tensor]:
        normed = self.acts.normed(kind)
        return {"logits": reference.linear(normed, self.weight[: self.vocab].to(kind))}

    def verdicts(self, length: int) -> dict[str, float]:
        """Logits against float64; statistics against the kernel's own logits."""
        dtype = self.weight.dtype
        if not self.judge.exact:
            self.judge = Judge(self._apply(torch.float64), self._apply(dtype))
        logits = self.logits[:length]
        real = logits[:, : self.vocab]
        found = self.judge.near({"logits": real.to(dtype)}, length, self.weight.shape[1])
        found["rounded"] = oracle.equal(real, real.to(dtype).float())
        found["padding"] = 0.0 if bool((logits[:, self.vocab :] == -math.inf).all()) else math.inf
        return found | self._statistics(length, logits)

    def _statistics(self, length: int, logits: Tensor) -> dict[str, float]:
        block, stats = self.config.block_n, self.stats
        tiles = stats.peak.shape[1]
        padding = tiles * block - logits.shape[1]
        tiled = torch.nn.functional.pad(logits, (0, padding), value=-math.inf).view(length, tiles, block)
        peak = tiled.amax(-1)
        shift = torch.where(peak.isinf(), 0.0, peak)
        total = (tiled - shift.unsqueeze(-1)).double().exp().sum(-1)
        score = tiled.double()
        if self.temperature:
            words = sampling_reference.random_words(
                self.seed, self.positions[:length], sampling_reference.PURPOSE_OWN, 0, tiles * block
            )
            noise = -torch.log(-torch.log1p(-sampling_reference.uniform(words).double()))
            score = score / float(self.heat) + noise.view_as(score)
        # Two scores may lie within a rounding of each other, and either is then the best. Of the noise two ulp
        # are allowed, of the quotient and the sum one half each.
        chosen = (stats.token[:length].long() - torch.arange(tiles, device=logits.device) * block).unsqueeze(
            -1
        )
        inside = (chosen >= 0) & (chosen < block)
        at_token = score.gather(-1, chosen.clamp(0, block - 1)).squeeze(-1)
        best = score.amax(-1)
        live = best.isfinite()
        tolerance = 6e-7 * best.abs().clamp(min=8.0)
        loss = torch.where(live, best - at_token, 0.0)
        given = torch.where(live, (stats.best[:length].double() - best).abs(), 0.0)
        return {
            "peak": oracle.equal(stats.peak[:length], peak),
            "total": oracle.relative(stats.total[:length], total, 1e-5),
            "token": float((loss / tolerance).max()) if bool(inside.all()) else math.inf,
            "best": float((given / tolerance).max()),
        }
