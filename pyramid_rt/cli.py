"""The command line: ``pyramid-rt generate | init | demo | info``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from pyramid_rt import api, directory, report
from pyramid_rt.compare import compare
from pyramid_rt.errors import InputError, PyramidError
from pyramid_rt.params import Options

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
LOADING_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("--device", str, "cuda or cpu; CUDA where there is one"),
    ("--dtype", str, "float32, bfloat16 or float16"),
    ("--max-seq", int, "longest sequence, prompt included"),
    ("--backend", str, "triton (default on CUDA) or torch"),
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
    return parser


def _command(commands: Any, run: Any, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        run.__name__.removeprefix("_run_"), help=help_text, description=help_text, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _add_loading_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, metavar="DIR", help="weights directory; the demo pyramid")
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
        sampling = Options(temperature=0.5, top_p=0.95, seed=2, max_new_tokens=arguments.max_new_tokens)
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


def _option_name(flag: tuple[str, type, str]) -> str:
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
    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def advance(tier: str, done: int, total: int) -> None:
            if tier not in tasks:
                tasks[tier] = bar.add_task(tier, total=total)
            bar.update(tasks[tier], completed=done)

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
