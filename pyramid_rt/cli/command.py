"""The commands of the command line: what `generate`, `init`, `demo`, `info`, `tune` and the others do."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn

from pyramid_rt import api
from pyramid_rt.cli import bench_report, counted, explain_report, profile_report, race, report, tune_report
from pyramid_rt.cli.arguments import EXPLAIN_FLAGS, GENERATION_FLAGS, LOADING_FLAGS, PROGRAM, option_name
from pyramid_rt.decoding.methods import LOSSLESS_METHODS
from pyramid_rt.errors import InputError
from pyramid_rt.loading import directory
from pyramid_rt.loading.defaults import check_tunable, write_defaults
from pyramid_rt.params import SamplingParams
from pyramid_rt.text.prompts import FilePrompt, encode, read_prompts
from pyramid_rt.tuning.compare import compare
from pyramid_rt.tuning.explain import explain
from pyramid_rt.tuning.search import TuneOptions, tune
from pyramid_rt.tuning.speeds import default_lengths, measure_speeds

if TYPE_CHECKING:
    from pyramid_rt.pyramid import Pyramid

_LOG = logging.getLogger(__name__)
_NEVER_TUNED = (
    "this pyramid was never tuned: %s with lengths that suit no one in particular may be slower than ar; "
    "pyramid-rt tune %s --prompts FILE finds what is fastest"
)
DEMO_BUDGET_SECONDS = 60.0
DEMO_PREFIX = '''class Stack:
    """A last-in, first-out container."""

    def __init__(self):
        self._items = []

    def push(self, item):
'''
DEMO_PROMPTS = (
    DEMO_PREFIX,
    "def read_config(path):\n    with open(path) as f:\n        for line in f:\n",
    "import os\nimport sys\n\n\ndef main(argv=None):\n    if argv is None:\n        argv = sys.argv[1:]\n",
    "class ParseError(ValueError):\n    def __init__(self, message, lineno):\n",
)


def run(arguments: argparse.Namespace) -> int:
    """Run the command that `arguments.parse` found; returns the exit status."""
    commands: dict[str, Callable[[argparse.Namespace], int]] = {
        "generate": _run_generate,
        "init": _run_init,
        "demo": _run_demo,
        "info": _run_info,
        "tune": _run_tune,
        "explain": _run_explain,
        "bench": _run_bench,
        "profile": _run_profile,
    }
    with _notes():
        return commands[arguments.command](arguments)


def _run_generate(arguments: argparse.Namespace) -> int:
    prompt, given = _prompt(arguments), _call_options(arguments, "streamed text")
    if arguments.trace:
        given["trace"] = True
    with _loaded(arguments) as pyramid:
        if len(pyramid.tiers) > 1 and not {"method"} & (given.keys() | pyramid.defaults.keys()):
            _LOG.warning(_NEVER_TUNED, pyramid.default_method, arguments.weights)
        if arguments.json:
            result = pyramid.generate(prompt, **given)
            print(json.dumps(result.to_dict()))
            return 0
        with contextlib.closing(pyramid.stream(prompt, **given)) as stream:
            _show(stream)
            result = stream.result
        if result.trace is not None:
            print(result.trace.view(colour=_stderr().is_terminal), file=sys.stderr)
        _stderr().print(report.summary(result, pyramid.max_seq), style="dim", highlight=False, soft_wrap=True)
    return 0


def _run_init(arguments: argparse.Namespace) -> int:
    file = directory.init(
        arguments.directory, arguments.target, arguments.qualifier, arguments.draft, force=arguments.force
    )
    print(f"wrote {file}")
    return 0


def _run_demo(arguments: argparse.Namespace) -> int:
    if arguments.repeats < 1:
        raise InputError(f"--repeats must be at least 1, found {arguments.repeats}")
    # Greedy, a model this small soon repeats itself.
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_new_tokens=arguments.max_new_tokens)
    with _loaded(arguments) as pyramid:
        console = _stdout()
        console.print(report.machine(pyramid), style="dim")
        if console.is_terminal and len(race.contenders(pyramid)) > 1 and params.max_new_tokens > 0:
            _side_by_side(console, pyramid, params)
        else:
            console.rule(f"a completion by {pyramid.default_method}, as it is committed")
            sys.stdout.write(DEMO_PREFIX)
            with contextlib.closing(pyramid.stream(DEMO_PREFIX, params)) as stream:
                _show(stream)
                console.print(report.summary(stream.result, pyramid.max_seq), style="dim")
        console.rule("the methods on this machine")
        with _stderr().status("measuring") as status:
            rows = compare(
                pyramid,
                DEMO_PROMPTS,
                pyramid.methods,
                max_new_tokens=arguments.max_new_tokens,
                repeats=arguments.repeats,
                budget=DEMO_BUDGET_SECONDS,
                on_step=lambda method: status.update(f"measuring {method}"),
            )
        report.print_comparison(console, rows, len(DEMO_PROMPTS), arguments.max_new_tokens)
    return 0


def _side_by_side(console: Console, pyramid: Pyramid, params: SamplingParams) -> None:
    """Plain decoding beside the fastest lossless method, both typing the same completion."""
    console.rule("the same completion, slow and fast")
    recordings = []
    with _stderr().status("") as status:
        for method in race.contenders(pyramid):
            status.update(f"running {method}")
            recordings.append(race.record(pyramid, DEMO_PREFIX, method, params))
    race.play(console, DEMO_PREFIX, recordings[0], race.fastest(recordings))


def _run_info(arguments: argparse.Namespace) -> int:
    if arguments.directory is not None:
        if arguments.weights is not None:
            raise InputError(
                f"DIR is {arguments.directory} and --weights is {arguments.weights}: give one of them"
            )
        arguments.weights = arguments.directory
    with _loaded(arguments) as pyramid:
        report.print_info(_stdout(), pyramid)
    return 0


def _run_tune(arguments: argparse.Namespace) -> int:
    common = {name: getattr(arguments, name) for name in ("temperature", "divergence")}
    given = {
        name: getattr(arguments, name) for name in ("max_new_tokens", "repeats", "budget", "max_differs")
    }
    options = TuneOptions(
        common={name: value for name, value in common.items() if value is not None},
        lossy=arguments.lossy,
        **{name: value for name, value in given.items() if value is not None},
    )
    if arguments.max_differs is not None and not arguments.lossy:
        raise InputError("--max-differs needs --lossy: lossless methods do not differ")
    if arguments.json is not None:
        _check_output("--json", arguments.json)
    check_tunable(arguments.weights, writing=not arguments.dry_run)
    prompts = _prompts(arguments, "settings are tuned for")
    with _loaded(arguments) as pyramid:
        assert pyramid.tokenizer is not None  # every directory has one
        ids = [encode(prompt, pyramid.tokenizer, pyramid.max_seq) for prompt in prompts]
        with _stderr().status("measuring") as status:
            tuning = tune(pyramid, ids, options, on_step=lambda step: status.update(f"measuring: {step}"))
        machine = report.machine(pyramid)
    # Before anything is shown or written elsewhere, which may fail: this is what the minutes were spent for.
    file = None if arguments.dry_run else write_defaults(arguments.weights, tuning.defaults())
    if arguments.json is not None:
        _write(arguments.json, json.dumps(tune_report.tuning_object(tuning, machine), indent=1) + "\n")
    console = _stdout()
    console.print(machine, style="dim")
    tune_report.print_tuning(console, tuning)
    chosen = json.dumps(tuning.defaults())
    done = "Not written (--dry-run)" if file is None else f"Written to {file}"
    console.print(f"{done}: {chosen}", markup=False, soft_wrap=True)
    return 0


def _run_explain(arguments: argparse.Namespace) -> int:
    arguments.weights = arguments.weights or api.demo_weights()
    check_tunable(arguments.weights, writing=False)
    prompts = _prompts(arguments, "acceptance is measured on")
    with _loaded(arguments) as pyramid:
        assert pyramid.tokenizer is not None  # every directory has one
        ids = [encode(prompt, pyramid.tokenizer, pyramid.max_seq) for prompt in prompts]
        with _stderr().status("measuring") as status:
            found = explain(
                pyramid,
                ids,
                on_step=lambda step: status.update(f"measuring: {step}"),
                **_given(arguments, EXPLAIN_FLAGS),
            )
        machine = report.machine(pyramid)
    if arguments.json:
        print(json.dumps(explain_report.explanation_object(found, machine)))
        return 0
    console = _stdout()
    console.print(machine, style="dim")
    explain_report.print_explanation(console, found)
    return 0


def _run_bench(arguments: argparse.Namespace) -> int:
    if arguments.json is not None:
        _check_output("--json", arguments.json)
    with _loaded(arguments) as pyramid:
        methods = arguments.methods or [name for name in LOSSLESS_METHODS if name in pyramid.methods]
        prompt_tokens, new_tokens = default_lengths(pyramid.max_seq, arguments.new_tokens)
        with _stderr().status("measuring") as status:
            speeds = measure_speeds(
                pyramid,
                methods,
                arguments.prompt_tokens or prompt_tokens,
                new_tokens,
                repeats=arguments.repeats,
                on_step=lambda step: status.update(f"measuring: {step}"),
            )
        machine = report.machine(pyramid)
        content = bench_report.speeds_object(pyramid, speeds, arguments.repeats)
    if arguments.json is not None:
        _write(arguments.json, json.dumps(content, indent=1) + "\n")
    console = _stdout()
    console.print(machine, style="dim")
    bench_report.print_speeds(console, speeds, arguments.repeats)
    return 0


def _run_profile(arguments: argparse.Namespace) -> int:
    prompt, given = _prompt(arguments), _call_options(arguments, "the table")
    if arguments.rounds < 1:
        raise InputError(f"--rounds must be at least 1, found {arguments.rounds}")
    if arguments.counted:
        for flag in ("out", "nvtx", "json"):
            if getattr(arguments, flag):
                raise InputError(f"--counted takes no --{flag}: it counts, and has no times")
        weights = arguments.weights or api.demo_weights()
        return counted.run(weights, prompt, _given(arguments, LOADING_FLAGS), given)
    if arguments.out is not None:
        profile_report.check_folder("--out", arguments.out)
    with _loaded(arguments) as pyramid, _stderr().status("profiling"):
        profile = pyramid.profile(prompt, nvtx=arguments.nvtx, **given)
    if arguments.json:
        print(json.dumps(profile.to_dict()))
    else:
        print(profile, end="")
    if arguments.out is not None:
        for file in profile_report.write(profile, arguments.out, arguments.rounds):
            if not arguments.json:
                print(f"wrote {file}")
    return 0


def _check_output(flag: str, file: Path) -> None:
    """Refuse before any work a file that cannot be written in the end."""
    if not file.parent.is_dir():
        raise InputError(f"{flag}: {file.parent} is no directory")
    if file.is_dir():
        raise InputError(f"{flag}: {file} is a directory, expected a file")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise InputError(f"{flag}: {file} cannot be written")


def _write(file: Path, content: str) -> None:
    """A whole file, or none: what was there stays where the new content does not fit."""
    part = file
    try:
        if file.exists() and not file.is_file():  # a device or a pipe
            file.write_text(content, encoding="utf-8")
            return
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.parent, prefix=f".{file.name[:50]}.", delete=False
        ) as handle:
            part = Path(handle.name)
            handle.write(content)
        part.chmod(0o666 & ~_umask())
        os.replace(part, file.resolve())
    except OSError as error:
        if part != file:
            part.unlink(missing_ok=True)
        raise InputError(f"{file}: cannot write it: {error.strerror}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _prompts(arguments: argparse.Namespace, why: str) -> list[FilePrompt]:
    """The prompts to measure on; `why` says in an error what they are for."""
    if arguments.prompts is not None:
        return read_prompts(arguments.prompts)
    if arguments.weights.resolve() != api.demo_weights().resolve():
        raise InputError(
            f"--prompts FILE is needed: {why} texts like those that {arguments.weights} will get; "
            "only the demo pyramid has prompts of its own"
        )
    return [FilePrompt("demo prompt", prompt) for prompt in DEMO_PROMPTS]


def _given(
    arguments: argparse.Namespace, flags: Iterable[tuple[str, Callable[[str], Any], str]]
) -> dict[str, Any]:
    """The options that were given, by name."""
    options = {option_name(flag): getattr(arguments, option_name(flag)) for flag, *_ in flags}
    return {name: value for name, value in options.items() if value is not None}


def _call_options(arguments: argparse.Namespace, shown: str) -> dict[str, Any]:
    """Options of a call, by name; `shown` is what is printed without --json."""
    if arguments.logprobs is not None and not arguments.json:
        raise InputError(f"--logprobs needs --json: {shown} has no place for them")
    given = {**_given(arguments, GENERATION_FLAGS), "ignore_eos": arguments.ignore_eos}
    if arguments.stop is not None:
        given["stop"] = arguments.stop
    if arguments.heal:
        given["heal"] = True
    return given


def _prompt(arguments: argparse.Namespace) -> str | list[dict[str, str]]:
    text: str = arguments.prompt
    if text == "-":
        if sys.stdin is None:
            raise InputError("prompt: standard input is closed")
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"prompt: standard input is not UTF-8 (byte {error.start})") from error
        except OSError as error:
            raise InputError(f"prompt: standard input cannot be read: {error.strerror}") from error
    if arguments.chat:
        system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
        return [*system, {"role": "user", "content": text}]
    if arguments.system is not None:
        raise InputError("--system needs --chat")
    return text


@contextlib.contextmanager
def _loaded(arguments: argparse.Namespace) -> Iterator[Pyramid]:
    """The pyramid of the command's flags, closed at the end; on a terminal a bar shows it loading."""
    path = arguments.weights or api.demo_weights()
    options = _given(arguments, LOADING_FLAGS)
    console = _stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[amount]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            titles = {api.KERNELS: "compiling kernels", api.GRAPHS: "capturing graphs"}
            if what not in tasks:
                tasks[what] = bar.add_task(titles.get(what, f"loading {what}"), total=total, amount="")
            amount = f"{done} of {total}" if what in titles else f"{decimal(done)} of {decimal(total)}"
            bar.update(tasks[what], completed=done, amount=amount)

        pyramid = api.load(path, progress=advance, **options)
    with contextlib.closing(pyramid):
        yield pyramid


def _show(stream: Any) -> None:
    """Write the pieces of a stream as they come, and end the last line."""
    last = ""
    for last in filter(None, stream):
        sys.stdout.write(last)
        sys.stdout.flush()
    if not last.endswith("\n"):
        print(flush=True)


def _stdout() -> Console:
    """Words wrap at the edge of a terminal; elsewhere a sentence is a line."""
    terminal = sys.stdout.isatty()
    return Console(highlight=False, soft_wrap=not terminal)


def _stderr() -> Console:
    return Console(stderr=True)


class _Notes(logging.Handler):
    """Warnings of the library, each once, as a line on standard error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        said = " ".join(record.getMessage().split())
        if said not in self._said:
            self._said.add(said)
            print(f"{PROGRAM}: {said}", file=sys.stderr)


@contextlib.contextmanager
def _notes() -> Iterator[None]:
    logger, handler = logging.getLogger("pyramid_rt"), _Notes()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
