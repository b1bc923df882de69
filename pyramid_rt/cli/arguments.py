"""Arguments of the command line: commands, flags and their help. Light: no torch."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pyramid_rt import __version__, checks
from pyramid_rt.errors import InputError

PROGRAM = "pyramid-rt"
DESCRIPTION = "Decode one sequence with a pyramid of Llama models: a draft, a qualifier and a target."
EPILOG = """exit status:
  0    done
  2    a mistake in the arguments, a prompt or a file; one line on standard error says which
  130  ended by Ctrl-C
  141  the reader of standard output went away
"""

# Options of `generate` that go to Pyramid.generate under the same name: flag, type, help.
GENERATION_FLAGS: tuple[tuple[str, type, str], ...] = (
    (
        "--method",
        str,
        "ar, sd, fsd, psd, psd_a or psd_f; by default the best lossless one there are tiers for",
    ),
    ("--max-new-tokens", int, "most tokens to generate (256)"),
    ("--max-time", float, "seconds after which the text ends with what it has"),
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
    ("--threads", int, "of an operation on a CPU; fewer beside other busy programs"),
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
EXPLAIN_FLAGS: tuple[tuple[str, type, str], ...] = (
    ("--method", str, "what to explain; by default the pyramid's own method"),
    ("--max-new-tokens", int, "length of each output (64)"),
    ("--repeats", int, "how often the settings are run (3)"),
    (
        "--budget",
        float,
        "seconds for everything; what must be measured once is, even if it takes longer (60)",
    ),
)
PROMPTS_HELP = (
    'texts like those that it is for: .jsonl or .ndjson with {"prompt": ...} or {"messages": [...]} on each line, '
    "or text with a line of just --- between two prompts"
)
INIT_FLAGS: tuple[tuple[str, bool, str], ...] = (
    ("--target", True, "directory of the model that has the last word, as Hugging Face saves it"),
    ("--qualifier", False, "directory of a smaller model of the family, which sifts what the draft proposes"),
    ("--draft", False, "directory of the smallest model of the family, which proposes"),
)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments, with the command's name as `command`.

    Raises InputError: one is wrong or missing. SystemExit: help or the version was asked for, and printed.
    """
    parser = _parser()
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown(unknown, parser, arguments.command))
    return arguments


def _unknown(words: Sequence[str], parser: argparse.ArgumentParser, command: str) -> str:
    """The message for words that no argument takes, with the flag of the command that a misspelt one may mean."""
    message = f"unrecognized arguments: {' '.join(words)}"
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    flags = [flag for flag in actions[0].choices[command]._option_string_actions if flag.startswith("--")]
    for word in words:
        close = difflib.get_close_matches(word.split("=", 1)[0], flags, n=1)
        if close:
            return f"{message}; did you mean {close[0]}?"
    return message


def option_name(flag: str) -> str:
    """The option of `generate` or `load` that a flag is for: --top-k gives top_k."""
    return flag.removeprefix("--").replace("-", "_")


def _path(text: str) -> Path:
    try:
        return checks.path("it", text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


class _Parser(argparse.ArgumentParser):
    """Reports a mistake as the rest of the program does, in one line."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Up to Python 3.12 argparse takes the value in --stop=-- for the mark that ends the flags, and drops it.
        if action.option_strings and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_init(commands)
    _add_demo(commands)
    _add_info(commands)
    _add_tune(commands)
    _add_explain(commands)
    _add_bench(commands)
    _add_profile(commands)
    return parser


def _command(commands: Any, name: str, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_text, description=help_text, allow_abbrev=False
    )
    return parser


def _add_loading_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=_path, metavar="DIR", help="weights directory; the demo pyramid")
    _add_device_flags(parser)


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    for flag, kind, text in LOADING_FLAGS:
        parser.add_argument(flag, type=kind, help=text)


def _add_generate(commands: Any) -> None:
    parser = _command(commands, "generate", "complete a prompt, streaming the text")
    _add_call(parser)
    parser.add_argument(
        "--trace",
        action="store_true",
        help="show which tier proposed each token, and what the rules said of it",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming")


def _add_call(parser: argparse.ArgumentParser) -> None:
    """Flags of a call, as `generate` takes them: of loading, its options and the prompt."""
    _add_loading_flags(parser)
    for flag, kind, text in GENERATION_FLAGS:
        parser.add_argument(flag, type=kind, help=text)
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-sequence token")
    parser.add_argument("--heal", action="store_true", help="go on within the prompt's last word or blank")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message in a chat")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("prompt", metavar="PROMPT", help="the prompt; - reads it from standard input")


def _add_init(commands: Any) -> None:
    parser = _command(commands, "init", "write a pyramid.json that names model directories")
    parser.add_argument("directory", type=_path, metavar="DIR", help="where to write it")
    for flag, required, text in INIT_FLAGS:
        parser.add_argument(flag, type=_path, metavar="MODEL", required=required, help=text)
    parser.add_argument("--force", action="store_true", help="replace a pyramid.json that is there")


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands, "demo", "complete some Python code, fast beside slow, and compare all methods"
    )
    _add_loading_flags(parser)
    parser.add_argument("--max-new-tokens", type=int, default=96, help="length of each output (96)")
    parser.add_argument("--repeats", type=int, default=3, help="how often all is measured (3)")


def _add_info(commands: Any) -> None:
    parser = _command(commands, "info", "show the tiers, the memory they need and the methods they allow")
    parser.add_argument("directory", type=_path, metavar="DIR", nargs="?", help="the same as --weights DIR")
    _add_loading_flags(parser)


def _add_tune(commands: Any) -> None:
    parser = _command(
        commands, "tune", "find a pyramid's fastest defaults and write them to its pyramid.json"
    )
    parser.add_argument("weights", type=_path, metavar="DIR", help="weights directory with two tiers or more")
    _add_device_flags(parser)
    for flag, kind, text in TUNE_FLAGS:
        parser.add_argument(flag, type=kind, help=text)
    parser.add_argument("--prompts", type=_path, metavar="FILE", help=PROMPTS_HELP)
    parser.add_argument("--lossy", action="store_true", help="consider fsd, psd_a and psd_f too")
    parser.add_argument("--dry-run", action="store_true", help="print only; pyramid.json stays as it is")
    parser.add_argument("--json", type=_path, metavar="FILE", help="write all measurements to this file")


def _add_explain(commands: Any) -> None:
    parser = _command(commands, "explain", "measure a pyramid and say what limits its speed")
    parser.add_argument(
        "weights",
        type=_path,
        nargs="?",
        metavar="DIR",
        help="weights directory with two tiers or more; the demo pyramid",
    )
    _add_device_flags(parser)
    for flag, kind, text in EXPLAIN_FLAGS:
        parser.add_argument(flag, type=kind, help=text)
    parser.add_argument("--prompts", type=_path, metavar="FILE", help=PROMPTS_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def _add_bench(commands: Any) -> None:
    parser = _command(commands, "bench", "measure prefill and decode speed of the methods")
    parser.add_argument(
        "weights", type=_path, nargs="?", metavar="DIR", help="weights directory; the demo pyramid"
    )
    _add_device_flags(parser)
    parser.add_argument(
        "--prompt-tokens", type=_lengths, metavar="N,...", help="lengths of the prompts (128,512)"
    )
    parser.add_argument(
        "--new-tokens", type=_lengths, metavar="N,...", help="lengths of the outputs, 2 or more (128)"
    )
    parser.add_argument(
        "--methods",
        type=_names,
        metavar="NAME,...",
        help="by default ar, sd and psd, as far as there are tiers",
    )
    parser.add_argument("--repeats", type=int, default=3, help="how often everything is measured (3)")
    parser.add_argument("--json", type=_path, metavar="FILE", help="write everything measured to this file")


def _add_profile(commands: Any) -> None:
    parser = _command(commands, "profile", "show where the time of a call goes: round, tier, layer, op")
    _add_call(parser)
    parser.add_argument(
        "--out",
        type=_path,
        metavar="FOLDER",
        help="write a trace for Perfetto and pictures of the rounds here",
    )
    parser.add_argument("--rounds", type=int, default=4, help="rounds in the picture (4)")
    parser.add_argument("--nvtx", action="store_true", help="on CUDA: name ranges for Nsight Systems too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument(
        "--counted",
        action="store_true",
        help="without a GPU, in a copy of the repository: count what compiled kernels execute and move",
    )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _lengths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers by commas, found {text!r}") from None
