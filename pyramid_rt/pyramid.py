"""`Pyramid`: tiers with rules between them, ready to decode."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal, Unpack

from pyramid_rt import checks
from pyramid_rt.decoding.chains import build_plan, checked_chain
from pyramid_rt.decoding.engine import Engine, by_kernels
from pyramid_rt.decoding.graphs import CudaRecorder, Recorder
from pyramid_rt.decoding.methods import best_method, methods_for, rules_of, tiers_of
from pyramid_rt.decoding.place import CudaPlace, Place, place_for
from pyramid_rt.decoding.place.threads import check_threads
from pyramid_rt.decoding.proposers import Proposer, check_proposer, with_proposer
from pyramid_rt.decoding.rules import Rule
from pyramid_rt.decoding.state import RoundPlan
from pyramid_rt.decoding.tiers import Tier
from pyramid_rt.errors import BusyError, InputError
from pyramid_rt.gate import CLOSED, Caller, Gate, Visit
from pyramid_rt.loading.memory import MemoryPlan
from pyramid_rt.loading.model_tier import ModelTier
from pyramid_rt.params import Defaults, Options, SamplingParams, merged_options
from pyramid_rt.result import GenerationResult
from pyramid_rt.running import Request, work
from pyramid_rt.streaming import AsyncStream, Ending, Stream, Work, run_in_thread
from pyramid_rt.text.encoding import encode_prompt, split_stops, token_ids
from pyramid_rt.text.healing import Pieces, Prefix, pieces_of, take_back
from pyramid_rt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pyramid_rt.profiling.profile import Profile
    from pyramid_rt.profiling.session import Session

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
GraphKind = Literal["round", "step"]
CHAIN = "chain"
# Buffers and captured graphs of so many plans are kept; one more makes room by the least lately used.
ENGINES_KEPT = 8


class Pyramid:
    """Tiers, small to large, and the rules between them. Safe to call from several threads: calls queue.

    Usually made by `pyramid_rt.load`. Made directly, it takes any number of tiers with a rule between each
    pair (lowest stage first); without rules the named methods apply.

    Args:
        tiers: one or more, the target last. Below others the first may be a `Proposer`.
        rules: len(tiers) - 1 rules, or None.
        tokenizer: needed for string prompts, chats, text and stop strings.
        eos_token_ids: ids that end a sequence.
        vocab_size: columns decoded over; by default the fewest that any tier has.
        defaults: options that calls do not give; under "methods" those of single methods, by their names.
        control: "host" (default on a CPU) or "device" (default elsewhere): who ends an inner round.
        plan: the memory plan it was loaded by.
        prefix_reuse: keep what the caches hold, so that a prompt that begins as the last call's text did (a chat
            that grows) is not processed again from its start.
        graphs: run outer rounds as CUDA graphs, captured at first use or by `prepare`; by default wherever the
            device is CUDA and controls itself. True or "round": a round is one graph. "step": the burst and each
            tier's verify are graphs, so that `stats` has the seconds of every tier; slower by a launch for each.
        recorder: what captures; by default CUDA's. For tests.
        place: of the tiers' device; by default one made for it.
        threads: of an operation on a CPU, at least 1; by default torch's own number. Not with `place`.

    Raises:
        InputError: the tiers, rules or options do not fit each other.
    """

    def __init__(
        self,
        tiers: Sequence[Tier | Proposer],
        rules: Sequence[Rule] | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: Sequence[int] = (),
        vocab_size: int | None = None,
        defaults: Mapping[str, Any] | None = None,
        control: str | None = None,
        plan: MemoryPlan | None = None,
        prefix_reuse: bool = True,
        graphs: bool | GraphKind | None = None,
        recorder: Recorder | None = None,
        place: Place | None = None,
        threads: int | None = None,
    ) -> None:
        tiers, rules = checked_chain(tiers, rules)
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            raise InputError(f"tokenizer must be a Tokenizer, found {checks.shown(tokenizer)}")
        if control is not None:
            control = checks.choice("control", control, ("host", "device"))
        self.tiers: tuple[Tier, ...] = with_proposer(tiers)
        self.rules = rules
        self.tokenizer, self.memory_plan = tokenizer, plan
        self.device = self.tiers[-1].device
        self.place = place or place_for(self.device, check_threads(threads))
        self.control = control or ("host" if self.device.type == "cpu" else "device")
        most = min(tier.vocab_size for tier in self.tiers)
        self.vocab_size = most if vocab_size is None else checks.whole("vocab_size", vocab_size, 1, most)
        ids = checks.sequence("eos_token_ids", eos_token_ids, "token ids")
        self.eos_token_ids = tuple(token_ids("eos_token_ids", ids, self.vocab_size))
        self._defaults = Defaults.of(defaults)
        self._gate = Gate()
        self.prefix_reuse = checks.flag("prefix_reuse", prefix_reuse)
        self._recorder = self._choose_recorder(graphs, recorder)
        self._stepwise = graphs == "step"
        self._kept: OrderedDict[tuple[Any, ...], Engine] = OrderedDict()

    def __repr__(self) -> str:
        if self._gate.closed:
            return "<Pyramid, closed>"
        names = " < ".join(tier.name for tier in self.tiers)
        return f"<Pyramid {names}, {self.default_method} on {self.device}, {self.max_seq} positions>"

    @property
    def max_seq(self) -> int:
        """Positions a sequence may have, prompt included. Raises BusyError after `close`."""
        if self._gate.closed:
            raise BusyError(CLOSED)
        return min(tier.max_seq for tier in self.tiers)

    @property
    def graphs(self) -> bool:
        """True where outer rounds run as CUDA graphs."""
        return self._recorder is not None

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """Work that reads nothing back as rounds would run it: a CUDA graph of it, or itself without graphs."""
        return work if self._recorder is None else self._recorder.capture(work)

    @property
    def methods(self) -> tuple[str, ...]:
        """The named methods these tiers can run."""
        return methods_for(len(self.tiers))

    @property
    def defaults(self) -> dict[str, Any]:
        """Options that calls do not give, of every method."""
        return dict(self._defaults.common)

    @property
    def method_defaults(self) -> dict[str, dict[str, Any]]:
        """By method, what it has in their place."""
        return {method: dict(options) for method, options in self._defaults.methods.items()}

    def defaults_of(self, method: str) -> dict[str, Any]:
        """Options of calls that this method decodes and that give none."""
        return self._defaults.of_method(method)

    @property
    def default_method(self) -> str:
        """The method of a call that names none; "chain" where the pyramid was given rules of its own."""
        if self.rules is not None:
            return CHAIN
        named = self._defaults.common.get("method")
        return named if named in self.methods else best_method(len(self.tiers))

    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[Options]
    ) -> GenerationResult:
        """Decode `prompt` and return the whole result.

        Args:
            prompt: a string, a list of token ids, or a list of chat messages ({"role": ..., "content": ...}).
            params: options kept in one object; what it was not given is the pyramid's default.
            options: see `SamplingParams`; they come before those of `params`.

        Raises:
            InputError: the prompt or an option is wrong; nothing has run.
            BusyError: the pyramid is closed, or this thread has a stream of it open that it alone can end.
            NonFiniteLogitsError: a tier failed; `partial` holds what was committed before.
        """
        stream = self._stream(prompt, merged_options(params, options), runs_alone=True)
        self._run(stream)
        return stream.result

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[Options]
    ) -> Stream:
        """The same, as an iterator of text pieces. Options are checked at once, work starts with iteration."""
        return self._stream(prompt, merged_options(params, options))

    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[Options]
    ) -> AsyncStream:
        """`stream` for asyncio: `async for piece in rt.astream(...)`. Close it with `aclose` or `async with`."""
        return AsyncStream(self._stream(prompt, merged_options(params, options)), self._gate)

    async def agenerate(
        self, prompt: Prompt, params: SamplingParams | None = None, **options: Unpack[Options]
    ) -> GenerationResult:
        """`generate` for asyncio. Cancelling the task stops the work after the round it is in."""
        stream = self._stream(prompt, merged_options(params, options), runs_alone=True)
        run = partial(self._run, stream, blocking=False)
        return await run_in_thread(stream, self._gate, run)

    def profile(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        nvtx: bool = False,
        **options: Unpack[Options],
    ) -> Profile:
        """Decode `prompt` again and again and say where the time goes: round, tier, layer, op.

        The first run warms up and tells who proposed what; the second, with the same seed, is timed op by op, its
        prompt processed from the start. Where kernels run on a GPU two more follow, rounds as graphs as in other
        calls, and the last one's times are the device's own records. Tokens are those of `generate`. Each run takes
        buffers.

        Args:
            prompt, params, options: as of `generate`.
            nvtx: name ranges for Nsight Systems too; needs a CUDA device.

        Returns: a `Profile`: `str` of it is a table, `save` writes a trace or a picture.

        Raises:
            InputError, BusyError, NonFiniteLogitsError: as `generate`.
            MatchError: the device's records are not those of the call's launches.
        """
        # Here and not above: no other call has anything to do with profiles.
        from pyramid_rt.profiling.session import Session

        session = Session(
            self.place, nvtx=checks.flag("nvtx", nvtx), graphs=self._recorder, stepwise=self._stepwise
        )
        given = merged_options(params, options)
        first = self._stream(prompt, {**given, "trace": True}, runs_alone=True)
        self._run(first)
        traced = first.result
        request = self._request(prompt, {**given, "trace": False, "seed": traced.seed})
        while session.runs_again:
            ending = Ending(request.params.max_time)
            begin = partial(self._profiled_work, session, request, ending)
            timed = Stream(begin, request.unstarted, self._gate, ending, runs_alone=True)
            self._run(timed)
            session.ran(timed.result)
        return session.profile(traced.trace if traced.tokens == session.result.tokens else None)

    def close(self) -> None:
        """Wait for the calls before this one, then free weights, caches and buffers, and give the memory back.

        Streams that were not begun cannot be any more. Closing twice is no error.

        Raises:
            BusyError: this thread has a stream open that it alone can end.
        """
        visit = Visit()
        try:
            self._gate.enter(visit, Caller.current())
        except BusyError:
            if self._gate.closed:
                return
            raise
        self._free(visit)

    def _free(self, visit: Visit) -> None:
        """The work of `close`, once its turn has come."""
        self._gate.shut()
        try:
            with self.place.work():
                self.tiers = ()
                self._kept.clear()
                self._recorder = None
            self.place.trim()
        finally:
            self._gate.leave(visit)

    def __enter__(self) -> Pyramid:
        return self

    def __exit__(self, *_: object) -> None:
        """End the stream that is open, in whatever thread, and close; calls that wait get BusyError."""
        visit = Visit()
        if not self._gate.shut(visit):
            return
        holder = self._gate.holder()
        stream = None if holder is None else holder.stream()
        if isinstance(stream, Stream | AsyncStream):
            stream.end()
        self._gate.wait(visit, Caller.current())
        self._free(visit)

    def prepare(
        self,
        params: SamplingParams | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
        compiling: Callable[[int, int], None] | None = None,
        **options: Unpack[Options],
    ) -> int:
        """Take the buffers and capture the graphs that calls with these options will use, ahead of the first.

        A combination of method, lengths, kinds of rules and divergences, filters on or off and logprobs is
        captured once; temperature, filter values, seed, thresholds and lengths of requests are not part of it.
        Without graphs only the buffers are taken.

        Args:
            params, options: as of `generate`; those that play no part are ignored.
            progress: called with (works captured, works in all), before the first and after each.
            compiling: called likewise with launches, while kernels are compiled, which comes first.

        Returns: how many graphs were captured; 0 where all were there.

        Raises:
            InputError: an option is wrong. BusyError: as `generate`. GraphCaptureError: a capture failed.
        """
        chosen, _, tiers, rules = self._chosen(merged_options(params, options))
        plan = self.make_plan(chosen, rules)
        visit = Visit()
        self._gate.enter(visit, Caller.current())
        try:
            visit.reader = Caller.current()
            engine = self._engine(tiers, plan)
            engine.compile(compiling)
            return engine.prepare(progress)
        finally:
            self._gate.leave(visit)

    # From the call to checked work

    def _choose_recorder(self, graphs: bool | GraphKind | None, recorder: Recorder | None) -> Recorder | None:
        if not isinstance(graphs, bool | str | None) or graphs not in (None, False, True, "round", "step"):
            raise InputError(f"graphs must be True, False, 'round' or 'step', found {checks.shown(graphs)}")
        if graphs is None:
            graphs = recorder is not None or (self.device.type == "cuda" and self.control == "device")
        if not graphs:
            return None
        if self.control == "host":
            raise InputError(
                f"graphs={graphs!r} needs control='device': under host control rounds have no fixed shape"
            )
        if recorder is None and self.device.type != "cuda":
            raise InputError(f"graphs={graphs!r} needs a CUDA device, found {str(self.device)!r}")
        if recorder is None:
            assert isinstance(self.place, CudaPlace)
            recorder = CudaRecorder(self.place)
        return recorder

    def _chosen(
        self, options: Mapping[str, Any]
    ) -> tuple[SamplingParams, str, tuple[Tier, ...], tuple[Rule, ...]]:
        """Checked options, and the method, tiers and rules they mean."""
        if self._gate.closed:
            raise BusyError(CLOSED)
        params = SamplingParams.build(options, {**self._defaults.common, "method": None})
        method = params.method or self.default_method
        if method in self._defaults.methods:
            params = SamplingParams.build(options, {**self.defaults_of(method), "method": None})
        if method == CHAIN:
            assert self.rules is not None
            tiers, rules = self.tiers, self.rules
        else:
            tiers = tuple(self.tiers[index] for index in tiers_of(method, len(self.tiers)))
            rules = rules_of(method, params.rule_options)
        check_proposer(tiers, rules)
        return params, method, tiers, rules

    def _request(self, prompt: Prompt, options: Mapping[str, Any]) -> Request:
        params, method, tiers, rules = self._chosen(options)
        given = token_ids("stop_token_ids", params.stop_token_ids, self.vocab_size)
        stops, special = split_stops(params.stop, self.tokenizer)
        ended_by = () if params.ignore_eos else self.eos_token_ids
        # A special token past the vocabulary is one that no model gives.
        stop_ids = {*given, *ended_by, *(index for index in special if index < self.vocab_size)}
        ids, prefix = self._encode(prompt, params)
        return Request(
            params=params,
            method=method,
            levels=tuple(self.tiers.index(tier) for tier in tiers),
            names=tuple(tier.name for tier in tiers),
            plan=self.make_plan(params, rules),
            prompt=ids,
            seed=params.with_seed(),
            stops=tuple(stops),
            stop_ids=tuple(sorted(stop_ids)),
            prefix=prefix,
        )

    def make_plan(self, params: SamplingParams, rules: Sequence[Rule]) -> RoundPlan:
        """The static shape of a round for these options. Raises InputError, as for a window over 64."""
        return build_plan(params, tuple(rules), host_control=self.control == "host")

    def _encode(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], Prefix | None]:
        """Prompt to checked token ids, and what the new text must begin with where its last token is taken back."""
        encoded = encode_prompt(
            prompt,
            self.tokenizer,
            self.vocab_size,
            add_special_tokens=params.add_special_tokens,
            continue_final_message=params.continue_final_message,
        )
        ids, prefix = encoded.ids, None
        if not ids:
            raise InputError("the prompt is empty: it has no tokens")
        if params.heal and encoded.open_end:
            ids, prefix = take_back(ids, self.tokenizer, self._pieces)
        if len(ids) >= self.max_seq:
            raise InputError(
                f"the prompt has {len(ids)} tokens and the context {self.max_seq} (max_seq); "
                "at least one position must be left"
            )
        return ids, prefix

    @cached_property
    def _pieces(self) -> Pieces:
        """The pieces that healing searches; made at its first use."""
        return pieces_of(self.tokenizer, self.vocab_size, self.eos_token_ids)

    # Decoding

    def _engine(self, tiers: tuple[Tier, ...], plan: RoundPlan) -> Engine:
        """Buffers and graphs for a plan; thresholds are device values, so plans that differ only there share."""
        names = tuple(tier.name for tier in tiers)
        plan = self._engine_plan(tiers, plan)
        shape = (plan.lengths, plan.inner_rounds, plan.sampled, plan.filters, plan.logprobs, plan.trace)
        key = (names, plan.rules, shape)
        if key not in self._kept:
            for tier in tiers:
                if isinstance(tier, ModelTier):
                    tier.ready()
            while len(self._kept) >= ENGINES_KEPT:
                self._kept.popitem(last=False)
            self._kept[key] = Engine(
                tiers,
                plan,
                self.vocab_size,
                self.max_seq,
                self.place,
                None if plan.trace else self._recorder,  # what a graph did cannot be watched
                stepwise=self._stepwise,
            )
        self._kept.move_to_end(key)
        return self._kept[key]

    @staticmethod
    def _engine_plan(tiers: tuple[Tier, ...], plan: RoundPlan) -> RoundPlan:
        """The plan as an engine knows it: without what may differ from call to call."""
        rules = tuple(rule.captured() for rule in plan.rules)
        # Kernels read the temperature, 0 too, on the device.
        return replace(plan, rules=rules, sampled=plan.sampled or by_kernels(tiers, plan))

    def _stream(self, prompt: Prompt, options: Mapping[str, Any], *, runs_alone: bool = False) -> Stream:
        request = self._request(prompt, options)
        ending = Ending(request.params.max_time)
        begin = partial(self._work, request, ending)
        return Stream(begin, request.unstarted, self._gate, ending, runs_alone=runs_alone)

    def _work(self, request: Request, ending: Ending) -> Work:
        tiers = tuple(self.tiers[level] for level in request.levels)
        engine = self._engine(tiers, request.plan)
        return work(engine, self.tokenizer, request, ending, reuse=self.prefix_reuse)

    def _profiled_work(self, session: Session, request: Request, ending: Ending) -> Work:
        tiers = tuple(self.tiers[level] for level in request.levels)
        engine = session.engine(tiers, self._engine_plan(tiers, request.plan), self.vocab_size, self.max_seq)
        made = work(engine, self.tokenizer, request, ending, reuse=False)
        return session.over(engine, made)

    def _run(self, stream: Stream, caller: Caller | None = None, *, blocking: bool = True) -> None:
        """Wait for a stream's turn and read it to its end, inside the place as a whole."""
        with stream:
            if stream.begin(caller, blocking=blocking):
                with self.place.work():
                    for _ in stream:
                        pass
