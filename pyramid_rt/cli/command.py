"""The command line: ``pyramid-rt generate | init | demo | info | tune``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn

from pyramid_rt import api
from pyramid_rt.cli import report, tune_report
from pyramid_rt.errors import InputError, PyramidError
from pyramid_rt.loading import directory
from pyramid_rt.loading.defaults import check_tunable, write_defaults
from pyramid_rt.params import Options
from pyramid_rt.text.prompts import FilePrompt, encode, read_prompts
from pyramid_rt.tuning.compare import compare
from pyramid_rt.tuning.search import TuneOptions, tune

if TYPE_CHECKING:
    from pyramid_rt.pyramid import Pyramid

PROGRAM = "pyramid-rt"
DESCRIPTION = "Decode one sequence with a pyramid of Llama models: a draft, a qualifier and a target."
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_PIPE_CLOSED = 141  # 128 + SIGPIPE

# Options of `generate` that go to Pyramid.generate under the same name: flag, type, help.
GENERATION_FLAGS: tuple[tuple[str, type, str], ...] = (
    (
        "--method",
        str,
        "ar, sd, fsd, psd, psd_a or psd_f; by default the best lossless one there are tiers for",
    ),
    ("--max-new-tokens", int, "most tokens to generate (256)"),
    ("--temperature", float, "0 is greedy (0)"),
    ("--top-k", int, "sample from the k likeliest tokens; 0 is off (0)"),
    ("--top-p", float, "sample from the likeliest tokens that hold this much probability (1)"),
    ("--min-p", float, "leave out tokens less likely than this share of the likeliest (0)"),
    ("--seed", int, "64-bit seed; drawn and reported by default"),
    ("--draft-length", int, "tokens the draft proposes at a time (4)"),
    ("--qualifier-length", int, "tokens that must stand before the target looks (10)"),
    ("--inner-rounds", int, "a fixed number of inner rounds instead of --qualifier-length"),
    ("--qualifier-threshold", float, "divergence up to which the qualifier lets a token stand (0.3)"),
    ("--target-threshold", float, "divergence up to which a lossy method's target lets a token stand (0.4)"),
    (
        "--divergence",
        str,
        "js (default), js_fsd, kl, kl_reversed, tv, or topk_ before one; a threshold belongs to its kind",
    ),
    ("--divergence-on", str, "raw or processed logits (raw)"),
    ("--lossless-rule", str, "match or rejection (match)"),
    ("--logprobs", int, "with --json: log-probabilities of each token and of the N likeliest"),
)
LOADING_FLAGS: tuple[tuple[str, Callable[[str], Any], str], ...] = (
    ("--device", str, "cuda or cpu; CUDA where there is one"),
    ("--dtype", str, "float32, bfloat16 or float16"),
    ("--max-seq", int, "longest sequence, prompt included"),
    ("--backend", str, "triton (default on CUDA) or torch"),
    ("--control", str, "who ends an inner round: host (default on a CPU) or device"),
    (
        "--graphs",
        lambda text: False if text == "off" else text,
        "on CUDA: round (a graph for a round), step (one for each step, which then is timed) or off",
    ),
)
TUNE_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("--max-new-tokens", int, "length of each output (96)"),
    ("--repeats", int, "how often the finalists are measured (3)"),
    (
        "--budget",
        float,
        "seconds for everything; what must be measured once is, even if it takes longer (120)",
    ),
    ("--temperature", float, "measure at this temperature; by default the pyramid's own, or 0"),
    ("--divergence", str, "the kind that thresholds are for; by default the pyramid's own, or js"),
    ("--max-differs", float, "with --lossy: the largest share of tokens that are not the target's own (0.1)"),
)
PROMPTS_HELP = (
    'what to tune for: .jsonl or .ndjson with {"prompt": ...} or {"messages": [...]} on each line, '
    "or text with a line of just --- between two prompts"
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    A user's mistake ends as one line on standard error and status 2, Ctrl-C as 130. When the reader of
    standard output goes away, the program ends without a word.
    """
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except PyramidError as error:
        return _fail(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes standard output once more when it ends, and would complain.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE_CLOSED
    except OSError as error:
        return _fail(error)
    return status


def _fail(error: Exception) -> int:
    print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return EXIT_USER_ERROR


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as the rest of the program does, in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description=DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_init(commands)
    _add_demo(commands)
    _add_info(commands)
    _add_tune(commands)
    return parser


def _command(commands: Any, run: Any, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        run.__name__.removeprefix("_run_"), help=help_text, description=help_text, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _add_loading_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, metavar="DIR", help="weights directory; the demo pyramid")
    _add_device_flags(parser)


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    for flag, kind, text in LOADING_FLAGS:
        parser.add_argument(flag, type=kind, help=text)


def _add_generate(commands: Any) -> None:
    parser = _command(commands, _run_generate, "complete a prompt, streaming the text")
    _add_loading_flags(parser)
    for flag, kind, text in GENERATION_FLAGS:
        parser.add_argument(flag, type=kind, help=text)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message in a chat")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")


def _add_init(commands: Any) -> None:
    parser = _command(commands, _run_init, "write a pyramid.json that names model directories")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write it")
    for name, required in (("target", True), ("qualifier", False), ("draft", False)):
        parser.add_argument(f"--{name}", type=Path, metavar="MODEL", required=required)
    parser.add_argument("--force", action="store_true", help="replace a pyramid.json that is there")


def _add_demo(commands: Any) -> None:
    parser = _command(commands, _run_demo, "complete some Python code and compare all methods")
    _add_loading_flags(parser)
    parser.add_argument("--max-new-tokens", type=int, default=96, help="length of each output (96)")
    parser.add_argument("--repeats", type=int, default=3, help="how often all is measured (3)")


def _add_info(commands: Any) -> None:
    parser = _command(commands, _run_info, "show the tiers, the memory they need and the methods they allow")
    _add_loading_flags(parser)


def _add_tune(commands: Any) -> None:
    parser = _command(
        commands, _run_tune, "find a pyramid's fastest defaults and write them to its pyramid.json"
    )
    parser.add_argument("weights", type=Path, metavar="DIR", help="weights directory with two tiers or more")
    _add_device_flags(parser)
    for flag, kind, text in TUNE_FLAGS:
        parser.add_argument(flag, type=kind, help=text)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=PROMPTS_HELP)
    parser.add_argument("--lossy", action="store_true", help="consider fsd, psd_a and psd_f too")
    parser.add_argument("--dry-run", action="store_true", help="print only; pyramid.json stays as it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all measurements to this file")


def _run_generate(arguments: argparse.Namespace) -> int:
    prompt = _prompt(arguments)
    options = {flag: getattr(arguments, flag) for flag in map(_option_name, GENERATION_FLAGS)}
    options["stop"] = arguments.stop
    given = {name: value for name, value in options.items() if value is not None}
    with _loaded(arguments) as pyramid:
        if arguments.json:
            result = pyramid.generate(prompt, ignore_eos=arguments.ignore_eos, **given)
            print(json.dumps(report.result_object(result)))
            return 0
        with contextlib.closing(pyramid.stream(prompt, ignore_eos=arguments.ignore_eos, **given)) as stream:
            _show(stream)
            result = stream.result
        _stderr().print(report.summary(result), style="dim", highlight=False, soft_wrap=True)
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
    with _loaded(arguments) as pyramid:
        console = Console(highlight=False, soft_wrap=True)
        console.print(report.machine(pyramid), style="dim")
        console.rule(f"a completion by {pyramid.default_method}, as it is committed")
        sys.stdout.write(DEMO_PREFIX)
        # Greedy, a model this small soon repeats itself.
        sampling = Options(temperature=0.7, top_p=0.9, seed=1, max_new_tokens=arguments.max_new_tokens)
        with contextlib.closing(pyramid.stream(DEMO_PREFIX, **sampling)) as stream:
            _show(stream)
            console.print(report.summary(stream.result), style="dim")
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


def _run_info(arguments: argparse.Namespace) -> int:
    with _loaded(arguments) as pyramid:
        report.print_info(Console(highlight=False), pyramid)
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
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise InputError(f"--json: {arguments.json.parent} is no directory")
    check_tunable(arguments.weights, writing=not arguments.dry_run)
    prompts = _tune_prompts(arguments)
    with _loaded(arguments) as pyramid:
        assert pyramid.tokenizer is not None  # every directory has one
        ids = [encode(prompt, pyramid.tokenizer, pyramid.max_seq) for prompt in prompts]
        with _stderr().status("measuring") as status:
            tuning = tune(pyramid, ids, options, on_step=lambda step: status.update(f"measuring: {step}"))
        machine = report.machine(pyramid)
    console = Console(highlight=False, soft_wrap=True)
    console.print(machine, style="dim")
    tune_report.print_tuning(console, tuning)
    if arguments.json is not None:
        content = json.dumps(tune_report.tuning_object(tuning, machine), indent=1)
        arguments.json.write_text(content + "\n", encoding="utf-8")
    chosen = json.dumps(tuning.defaults())
    if arguments.dry_run:
        console.print(f"Not written (--dry-run): {chosen}", markup=False)
    else:
        file = write_defaults(arguments.weights, tuning.defaults())
        console.print(f"Written to {file}: {chosen}", markup=False)
    return 0


def _tune_prompts(arguments: argparse.Namespace) -> list[FilePrompt]:
    if arguments.prompts is not None:
        return read_prompts(arguments.prompts)
    if arguments.weights.resolve() != api.demo_weights().resolve():
        raise InputError(
            f"--prompts FILE is needed: settings are tuned for texts like those that {arguments.weights} will get; "
            "only the demo pyramid has prompts of its own"
        )
    return [FilePrompt("demo prompt", prompt) for prompt in DEMO_PROMPTS]


def _option_name(flag: tuple[str, Callable[[str], Any], str]) -> str:
    return flag[0].removeprefix("--").replace("-", "_")


def _prompt(arguments: argparse.Namespace) -> str | list[dict[str, str]]:
    text: str = arguments.prompt
    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"prompt: standard input is not UTF-8 (byte {error.start})") from error
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
    options = {name: getattr(arguments, name) for name in map(_option_name, LOADING_FLAGS)}
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


def _stderr() -> Console:
    return Console(stderr=True)
