"""The `triton` backend: every op of a forward pass is one kernel launch on buffers allocated at load.

A pass over L layers that wants logits is 5 L + 2 launches (embedding, five a layer, head); one that only fills
the cache ends with the last layer's QKV launch, 5 L - 3. The residual stream lives in one buffer, with the sums
of squares of its rows and its product with the next norm's weight beside it: whoever writes the stream writes
both, whoever normalises reads them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from pyramid_rt.errors import UnsupportedModelError
from pyramid_rt.kernels.configs import ProjectionConfig, architecture, projection_config
from pyramid_rt.kernels.forward import attention, embed, gate_up, head, project, qkv
from pyramid_rt.kernels.forward.attention_configs import AttentionConfig, config_for
from pyramid_rt.kernels.forward.head import Noise, Placement, TileStatistics
from pyramid_rt.kernels.forward.product import Workspace, counter_elements, partial_elements
from pyramid_rt.kernels.launch import CHANNELS, Launch, always, tiles
from pyramid_rt.kernels.limits import WINDOW
from pyramid_rt.models.config import LlamaConfig
from pyramid_rt.models.llama import SLACK_ROWS, KVCache, Llama, run_layers
from pyramid_rt.models.matrix import Matrix
from pyramid_rt.models.trees import Tree, refuse_tree

_MOST_GROUP = 8


@dataclass(frozen=True, slots=True)
class TritonWindow:
    """The positions of one pass's rows.

    Attributes:
        start: 0-d int64, absolute position of the first row.
        length: T, 1 to 64.
        kv_bound: cache rows that attention's grid covers.
        rotary: the whole table.
        active: 0-d int64: where it is 0, every launch of the pass returns at once. None: it always runs.
    """

    start: Tensor
    length: int
    kv_bound: int
    rotary: Tensor
    active: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Configs:
    """The frozen configuration of every launch of one tier."""

    qkv: ProjectionConfig
    attention: AttentionConfig
    out: ProjectionConfig
    gate_up: ProjectionConfig
    down: ProjectionConfig
    head: ProjectionConfig

    @classmethod
    def choose(cls, config: LlamaConfig, dtype: torch.dtype, device: torch.device) -> Configs:
        """Those shipped for a shape, dtype and device."""
        arch = architecture(device)
        hidden, inner, queries = config.hidden_size, config.intermediate_size, _queries(config)
        capability = 0
        if device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(device)
            capability = 10 * major + minor
        return cls(
            qkv=projection_config("qkv", arch, _joint(config), hidden, dtype),
            attention=config_for(dtype, config.head_dim, capability),
            out=projection_config("project", arch, hidden, queries, dtype),
            gate_up=projection_config("gate_up", arch, 2 * inner, hidden, dtype),
            down=projection_config("project", arch, hidden, inner, dtype),
            head=projection_config("head", arch, config.vocab_size, hidden, dtype),
        )


@dataclass(frozen=True, slots=True)
class Buffers:
    """Buffers that a tier's passes write besides its cache. C hidden size, I intermediate size, H heads of size D.

    Attributes:
        stream: [64, C] dtype, the residual stream.
        scaled: [64, C] dtype, the stream times the weight of the RMSNorm that reads it next.
        squares: [ceil(C / 64), 64] float32, the stream's sums of squares per 64-channel tile.
        q: [64, H, D] dtype. attended: [64, H D] dtype. inner: [64, I] dtype.
        logits: [64, V rounded up to 4] float32. statistics: of their tiles.
        products, splits: scratch of products split along K, and of attention split along the sequence.
    """

    stream: Tensor
    scaled: Tensor
    squares: Tensor
    q: Tensor
    attended: Tensor
    inner: Tensor
    logits: Tensor
    statistics: TileStatistics
    products: Workspace
    splits: attention.Workspace

    @classmethod
    def allocate(
        cls, config: LlamaConfig, configs: Configs, max_rows: int, dtype: torch.dtype, device: torch.device
    ) -> Buffers:
        """Take all of them; `max_rows` counts the cache's rows."""
        hidden, queries = config.hidden_size, _queries(config)

        def new(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        cuts = (
            (_joint(config), configs.qkv),
            (hidden, configs.out),
            (2 * config.intermediate_size, configs.gate_up),
            (hidden, configs.down),
        )
        return cls(
            stream=new(WINDOW, hidden),
            scaled=new(WINDOW, hidden),
            squares=new(tiles(hidden, CHANNELS), WINDOW, kind=torch.float32),
            q=new(WINDOW, config.num_heads, config.head_dim),
            attended=new(WINDOW, queries),
            inner=new(WINDOW, config.intermediate_size),
            logits=new(WINDOW, padded_vocabulary(config.vocab_size), kind=torch.float32),
            statistics=TileStatistics.allocate(tiles(config.vocab_size, configs.head.block_n), device),
            products=Workspace.allocate(
                max(partial_elements(rows, cut.block_n, cut.splits) for rows, cut in cuts),
                max(counter_elements(rows, cut.block_n, cut.splits) for rows, cut in cuts),
                device,
            ),
            splits=attention.workspace(
                length=WINDOW,
                heads=config.num_heads,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                kv_bound=max_rows,
                splits=configs.attention.splits,
                device=device,
            ),
        )

    def nbytes(self) -> int:
        """Bytes of all of them."""
        singles = (self.stream, self.scaled, self.squares, self.q, self.attended, self.inner, self.logits)
        groups = (self.statistics, self.products, self.splits)
        grouped = (getattr(group, name) for group in groups for name in group.__slots__)
        return sum(tensor.nbytes for tensor in chain(singles, grouped))


@dataclass(frozen=True, slots=True)
class TritonBackend:
    """One tier's launches. Passes of one tier must not overlap: they share the buffers.

    Attributes:
        configs, buffers: of this tier.
        emit: what happens to each launch; by default it runs.
    """

    configs: Configs
    buffers: Buffers
    emit: Callable[[Launch], None] = Launch.run

    @classmethod
    def allocate(
        cls, config: LlamaConfig, *, max_seq: int, dtype: torch.dtype, device: torch.device
    ) -> TritonBackend:
        """The backend of a tier whose cache has `max_seq` positions and the slack.

        Raises:
            UnsupportedModelError: a head size or group of query heads that the attention kernel does not take.
        """
        check_shape(config)
        configs = Configs.choose(config, dtype, device)
        # Here and not in a first pass, which may be one that a graph captures.
        always(device)
        return cls(configs, Buffers.allocate(config, configs, max_seq + SLACK_ROWS, dtype, device))

    @property
    def name(self) -> str:
        """`triton`."""
        return "triton"

    @property
    def longest_window(self) -> int | None:
        """See `Backend`."""
        return WINDOW

    def recorded(self, into: list[Launch]) -> TritonBackend:
        """The same backend, whose launches are put into a list and not run."""
        return replace(self, emit=into.append)

    def window(
        self,
        rotary: Tensor,
        start: Tensor,
        length: int,
        kv_bound: int,
        group: int,
        tree: Tree | None = None,
    ) -> TritonWindow:
        """See `Backend`."""
        refuse_tree(tree, self.name)
        return TritonWindow(start, length, kv_bound, rotary)

    def embed(self, table: Tensor, tokens: Tensor, norm: Tensor, window: TritonWindow) -> Tensor:
        """See `Backend`."""
        b = self.buffers
        launch = embed.plan(
            table, tokens, norm, window.length, b.stream, b.scaled, b.squares, active=window.active
        )
        self.emit(launch)
        return b.stream

    def embed_placed(self, table: Tensor, tokens: Tensor, norm: Tensor, window: TritonWindow) -> None:
        """`embed` of the window's part of the token buffer [max_seq + 64]."""
        b = self.buffers
        launch = embed.plan(
            table,
            tokens,
            norm,
            window.length,
            b.stream,
            b.scaled,
            b.squares,
            window.start,
            active=window.active,
        )
        self.emit(launch)

    def qkv(
        self,
        x: Tensor,
        norm: Tensor,
        eps: float,
        weight: Matrix,
        bias: Tensor | None,
        k_cache: Tensor,
        v_cache: Tensor,
        window: TritonWindow,
    ) -> Tensor:
        """See `Backend`."""
        b, rotary, start, length = self.buffers, window.rotary, window.start, window.length
        launch = qkv.plan(
            b.scaled, b.squares, eps, weight.operand, bias, rotary, start, length, b.q, k_cache, v_cache, b.products,
            self.configs.qkv, active=window.active,
        )  # fmt: skip
        self.emit(launch)
        return b.q

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, window: TritonWindow) -> Tensor:
        """See `Backend`."""
        b = self.buffers
        self.emit(
            attention.plan(
                q,
                k_cache,
                v_cache,
                window.start,
                b.attended,
                b.splits,
                length=window.length,
                kv_bound=window.kv_bound,
                config=self.configs.attention,
                active=window.active,
            )
        )
        return b.attended

    def project(
        self,
        x: Tensor,
        weight: Matrix,
        bias: Tensor | None,
        residual: Tensor,
        norm: Tensor,
        window: TritonWindow,
    ) -> Tensor:
        """See `Backend`. The result takes the place of the residual."""
        b = self.buffers
        cut = self.configs.down if x is b.inner else self.configs.out
        launch = project.plan(
            x, weight.operand, bias, residual, norm, window.length, residual, b.scaled, b.squares, b.products, cut,
            active=window.active,
        )  # fmt: skip
        self.emit(launch)
        return residual

    def gate_up(
        self, x: Tensor, norm: Tensor, eps: float, weight: Matrix, bias: Tensor | None, window: TritonWindow
    ) -> Tensor:
        """See `Backend`."""
        b = self.buffers
        self.emit(
            gate_up.plan(
                b.scaled,
                b.squares,
                eps,
                weight.operand,
                bias,
                window.length,
                b.inner,
                b.products,
                self.configs.gate_up,
                active=window.active,
            )
        )
        return b.inner

    def head(self, x: Tensor, rows: Tensor, norm: Tensor, eps: float, weight: Matrix) -> Tensor:
        """See `Backend`. The logits hold until the next pass."""
        b, vocab = self.buffers, weight.rows
        self.emit(
            head.plan(
                b.scaled,
                b.squares,
                eps,
                weight.operand,
                rows,
                vocab,
                b.logits,
                b.statistics,
                None,
                self.configs.head,
            )
        )
        return b.logits[: rows.shape[0], :vocab]

    def head_placed(
        self,
        placement: Placement,
        eps: float,
        weight: Matrix,
        out: HeadOutputs,
        active: Tensor | None,
    ) -> None:
        """`head` of rows that the device places, with the statistics that sampling needs."""
        b, cut = self.buffers, self.configs.head
        launch = head.plan(
            b.scaled, b.squares, eps, weight.operand, placement, out.vocab_size, out.rows, out.statistics,
            out.noise, cut, active=active,
        )  # fmt: skip
        self.emit(launch)


@dataclass(frozen=True, slots=True)
class HeadOutputs:
    """The tensors that take what a recorded pass's LM head computes; M rows, of which the placement says which.

    Attributes:
        vocab_size: entries that count; later ones of a row are -inf.
        rows: [M, P] float32, raw logits. statistics: [M, tiles of 64], as the head kernel leaves them.
        noise: of the own tokens, its positions None.
    """

    vocab_size: int
    rows: Tensor
    statistics: TileStatistics
    noise: Noise


def plan_pass(
    model: Llama,
    cache: KVCache,
    tokens: Tensor,
    start: Tensor,
    *,
    width: int,
    kv_bound: int,
    placement: Placement | None,
    outputs: HeadOutputs,
    active: Tensor | None = None,
) -> list[Launch]:
    """The launches of a pass over tokens[start : start + width] of the token buffer, none of them run.

    Everything that may change between two runs is read on the device, so the list can be run again and again,
    and be captured.

    Args:
        model: of the `triton` backend. cache: of the same shape and dtype.
        tokens: int64 [max_seq + 64].
        start: 0-d int64.
        width: T, up to 64. kv_bound: as in `llama.forward`.
        placement: which rows get logits, and where they go; its `start` is `start`. None: only the cache is
            written.
        outputs: the buffers.
        active: 0-d int64. Where it is 0 when the list is run, its launches return at once and write nothing. None:
            they always run.
    """
    backend = model.backend
    assert isinstance(backend, TritonBackend)
    launches: list[Launch] = []
    recorder = backend.recorded(launches)
    group = model.config.num_heads // model.config.num_kv_heads
    window = replace(recorder.window(model.rotary, start, width, kv_bound, group), active=active)
    recorder.embed_placed(model.embedding, tokens, model.layers[0].attn_norm, window)
    run_layers(model, cache, recorder, backend.buffers.stream, window, placement is None)
    if placement is not None:
        recorder.head_placed(placement, model.config.rms_norm_eps, model.head, outputs, active)
    return launches


def check_shape(config: LlamaConfig) -> None:
    """Refuse a shape that the kernels do not take. Raises UnsupportedModelError."""
    group = config.num_heads // config.num_kv_heads
    if config.head_dim not in attention.HEAD_DIMS:
        allowed = ", ".join(map(str, attention.HEAD_DIMS))
        raise UnsupportedModelError(
            f"head_dim is {config.head_dim}; backend 'triton' takes {allowed}, backend 'torch' any"
        )
    if group > _MOST_GROUP:
        raise UnsupportedModelError(
            f"{config.num_heads} heads share {config.num_kv_heads} KV heads, {group} to one; "
            f"backend 'triton' takes up to {_MOST_GROUP}, backend 'torch' any"
        )


def buffer_bytes(config: LlamaConfig, max_seq: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of the `Buffers` that `TritonBackend.allocate` would take; takes none. Errors as it."""
    check_shape(config)
    configs = Configs.choose(config, dtype, device)
    return Buffers.allocate(config, configs, max_seq + SLACK_ROWS, dtype, torch.device("meta")).nbytes()


def padded_vocabulary(vocab_size: int) -> int:
    """Entries of a logits row, so that every row starts at 16 bytes."""
    return tiles(vocab_size, head.PADDING) * head.PADDING


def _queries(config: LlamaConfig) -> int:
    return config.num_heads * config.head_dim


def _joint(config: LlamaConfig) -> int:
    return (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
