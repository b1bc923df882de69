"""Counted bytes of compiled kernels against the formulas of pyramid_rt/models/traffic.py, and the counters."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from ptx import device, machine
from ptx.counted import SCRATCH, decode, markdown
from ptx.faults import replaced
from ptx.held import FORMULAS, formula_of
from ptx.machine import Counts
from ptx.snippets import execute
from ptx.subjects import LAUNCHES, subject

pytestmark = pytest.mark.skipif(machine.COMPILER is None, reason=machine.MISSING)
compiled = pytest.mark.skipif(not device.architecture(), reason="runs compiled kernels: PYRAMID_PTX=sm_80")
PAGE = Path(__file__).parent.parent.parent / "docs" / "kernels.md"
# Whose terms are the formula's, all of them.
FORWARD = ("embed", "qkv", "attention", "attention, tree", "out", "gate_up", "down", "head", "compact")
# Their lists are read once more, entry by entry, from wherever in a row they stand.
LISTED = {"fuzzy, topk_js", "rejection", "filters"}


def run_counted(name: str) -> Counts:
    with device.counted() as found:
        subject(name).run()
    [(_, counts)] = found
    return counts


@cache
def counts_of(name: str) -> Counts:
    return run_counted(name)


def moved(name: str, buffer: str) -> tuple[int, int]:
    """Bytes read from and written to a buffer."""
    return counts_of(name).traffic[f"{buffer}_ptr"]


@compiled
@pytest.mark.parametrize("name", LAUNCHES)
def test_weights_caches_and_rows_are_read_once(name: str) -> None:
    for buffer, size in FORMULAS[name].streamed.items():
        read, _ = moved(name, buffer)
        if name in LISTED:
            # By no more than a quarter: what is listed lies near the top.
            assert size <= read <= 1.25 * size, buffer
        else:
            assert read == size, buffer


@compiled
@pytest.mark.parametrize("name", LAUNCHES)
def test_results_are_written_once(name: str) -> None:
    for buffer, size in FORMULAS[name].written.items():
        assert moved(name, buffer)[1] == size, buffer


@compiled
@pytest.mark.parametrize("name", LAUNCHES)
def test_small_inputs_are_read_whole_by_each_program(name: str) -> None:
    """As often as there are programs or threads that want them, but each time all of it."""
    for buffer, size in FORMULAS[name].small.items():
        read, _ = moved(name, buffer)
        assert read >= size, buffer
        assert read % size == 0, (buffer, read, size)


@pytest.mark.parametrize("name", FORWARD)
def test_terms_are_those_of_the_formula(name: str) -> None:
    """Every byte of the formula belongs to a buffer."""
    terms, formula = FORMULAS[name], formula_of(name)
    assert formula is not None
    assert sum(terms.streamed.values()) == formula.stationary
    assert formula.stationary + sum(terms.small.values()) == formula.read
    assert sum(terms.written.values()) == formula.written


@compiled
@pytest.mark.parametrize("name", FORWARD)
def test_nothing_is_moved_that_the_formula_does_not_know(name: str) -> None:
    """But for scratch, and for words by which a launch finds its place: positions, lengths, lists of rows."""
    terms, counts = FORMULAS[name], counts_of(name)
    known = {*terms.streamed, *terms.small, *terms.written, *SCRATCH, "counters"}
    places = {
        "active",
        "start",
        "tokens",
        "path",
        "count",
        "ancestors",
        "rows",
        "positions",
        "seed",
        "temperature",
    }
    # What stands for a bias, or for words of a placement, that are not there.
    known |= {"bias"} if counts.traffic.get("bias_ptr") == counts.traffic.get("w_ptr") else set()
    known |= (
        {"decided", "first"} if counts.traffic.get("decided_ptr") == counts.traffic.get("rows_ptr") else set()
    )
    found = {buffer.removesuffix("_ptr") for buffer, both in counts.traffic.items() if any(both)}
    assert found <= known | places


@compiled
def test_a_product_reads_in_the_widest_accesses_there_are() -> None:
    counts = counts_of("out")
    assert counts.loaded[16] >= FORMULAS["out"].streamed["w"]
    assert counts.barriers > 0
    assert counts.thread_instructions <= 32 * counts.instructions


@compiled
@pytest.mark.parametrize("name", ["qkv", "out", "gate_up", "down", "head", "attention"])
def test_weights_that_are_read_twice_are_found(name: str) -> None:
    twice = replaced(
        r"^(.*cp\.async\.c[ag]\.shared\.global.*;)$",
        r"\1 cp.async.commit_group; cp.async.wait_group 0; \1",
    )
    with device.edited(twice):
        counts = run_counted(name)
    for buffer, size in FORMULAS[name].streamed.items():
        assert counts.traffic[f"{buffer}_ptr"][0] == 2 * size


@compiled
@pytest.mark.skipif(device.architecture() != 90, reason="the page has the counts of sm_90")
def test_the_page_for_kernel_readers_has_the_counts() -> None:
    import triton

    if not triton.__version__.startswith("3.9."):
        pytest.skip("the page has the counts of what Triton 3.9 compiles")
    assert markdown() in PAGE.read_text(encoding="utf-8")


@compiled
def test_a_generation_is_counted_by_kernel() -> None:
    import pyramid_rt

    options = {"method": "ar", "max_new_tokens": 2}
    found = decode(Path(pyramid_rt.__file__).parent / "demo", "def fib(n):\n", {}, options)
    assert found.startswith("ar: ")
    # The first token from a prefill of the target's six layers, the second from a pass; each is drawn once.
    assert "| `attention_kernel` | 12 |" in found
    assert "| `sample_kernel` | 2 |" in found


def test_sectors_and_conflicts_of_plain_accesses() -> None:
    """A thread's 64 bytes are two sectors of their own, of which two loads of 16 touch the first."""
    with pytest.MonkeyPatch.context() as patch:
        found: list[Counts] = []
        run = machine.run
        patch.setattr("ptx.snippets.run", lambda *args: found.append(run(*args)))
        place = (
            "mov.b32 %r10, global_smem; mad.lo.s32 %r11, %r9000, {stride}, %r10; st.shared.b32 [%r11], %r0;"
        )
        execute(place.format(stride=4))
        execute(place.format(stride=8))
        execute(place.format(stride=128))
    assert [counts.conflicts for counts in found] == [0, 1, 31]
    assert found[0].load_sectors == 64
    assert found[0].store_sectors == 32
    assert found[0].loaded == {16: 1024}
    assert found[0].traffic["in"] == (1024, 0)
    assert found[0].stored == {16: 512}
    assert found[0].barriers == 0
