"""The machine that runs compiled kernels on a CPU (tests/ptx): it computes, and it finds the faults it is meant to."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

from ptx import counts
from ptx import machine as running
from ptx.machine import Machine, Unknown, prepared
from ptx.memory import GlobalMemory, MemoryFault, Race

HEAD = """
.version 8.0
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0,
    .param .u64 .ptr .global .align 1 kernel_param_1
)
.reqntid 64
{
    .reg .pred %p<4>;
    .reg .b16 %rs<8>;
    .reg .b32 %r<32>;
    .reg .b64 %rd<8>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b64 %rd2, [kernel_param_1];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mul.wide.u32 %rd3, %r1, 4;
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    shl.b32 %r3, %r1, 2;
    mov.b32 %r4, global_smem;
    add.s32 %r5, %r4, %r3;
"""


def run(body: str, source: np.ndarray, target: np.ndarray, blocks: int = 1) -> None:
    """Run 64 threads a block; %rd4 and %rd5 point to each thread's word of source and target, %r5 to shared memory."""
    kernel, steps = prepared(f"{HEAD}{body}\n    ret;\n}}\n")
    memory = GlobalMemory()
    addresses = [
        memory.place(array.ctypes.data, array.nbytes, name) for array, name in ((source, "source"), (target, "target"))
    ]
    Machine(kernel, steps, (blocks, 1, 1), addresses, memory, 1024).run()


@pytest.fixture
def words() -> tuple[np.ndarray, np.ndarray]:
    """0..63 and 64 zeros."""
    return np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)


def test_arithmetic_and_predicates(words) -> None:
    source, target = words
    run(
        """ld.global.b32 { %r6 }, [ %rd4 + 0 ];
        setp.lt.s32 %p1, %r6, 10;
        mad.lo.s32 %r7, %r6, %r6, 3;
        shr.s32 %r8, %r6, 1;
        selp.b32 %r9, %r7, %r8, %p1;
        @!%p1 add.s32 %r9, %r9, 1000;
        st.global.b32 [ %rd5 + 0 ], { %r9 };""",
        source,
        target,
    )
    n = np.arange(64)
    assert np.array_equal(target, np.where(n < 10, n * n + 3, n // 2 + 1000))


def test_threads_that_diverge_converge_again(words) -> None:
    """Odd threads take another branch, a loop of as many rounds as their number; then neighbours exchange."""
    source, target = words
    run(
        """ld.global.b32 { %r6 }, [ %rd4 + 0 ];
        and.b32 %r7, %r6, 1;
        mov.b32 %r8, 0;
        setp.eq.b32 %p1, %r7, 0;
        @%p1 bra $EVEN;
        $LOOP:
        add.s32 %r8, %r8, 2;
        setp.lt.s32 %p2, %r8, %r6;
        @%p2 bra $LOOP;
        bra.uni $JOINED;
        $EVEN:
        mov.b32 %r8, 7;
        $JOINED:
        shfl.sync.bfly.b32 %r9, %r8, 1, 31, -1;
        st.global.b32 [ %rd5 + 0 ], { %r9 };""",
        source,
        target,
    )
    n = np.arange(64)
    assert np.array_equal(target, np.where(n % 2, 7, n + 2))


@pytest.mark.parametrize("offset, what", [(4, "byte 256 of 256"), (-4, "byte -4 of 256"), (2, "byte 2 is not aligned")])
def test_accesses_outside_and_misaligned(words, offset: int, what: str) -> None:
    with pytest.raises(MemoryFault, match=what) as caught:
        run(f"setp.lt.u32 %p1, %r1, {64 - offset % 4}; @%p1 ld.global.b32 {{ %r6 }}, [ %rd4 + {offset} ];", *words)
    assert "source" in str(caught.value)
    assert any("ld.global.b32" in note for note in caught.value.__notes__)


def test_nothing_is_read_or_written_where_the_predicate_says_no(words) -> None:
    source, target = words
    run(
        """setp.lt.u32 %p1, %r1, 5;
        mov.b32 %r6, 77;
        @%p1 ld.global.b32 { %r6 }, [ %rd4 + 236 ];
        st.global.b32 [ %rd5 + 0 ], { %r6 };""",
        source,
        target,
    )
    assert np.array_equal(target, np.where(np.arange(64) < 5, np.arange(64) + 59, 77))


EXCHANGE = """ld.global.b32 {{ %r6 }}, [ %rd4 + 0 ];
    st.shared.b32 [%r5], %r6;
    {barrier}
    xor.b32 %r7, %r3, 128;
    add.s32 %r8, %r4, %r7;
    ld.shared.b32 %r9, [%r8];
    st.global.b32 [ %rd5 + 0 ], {{ %r9 }};"""


def test_an_exchange_between_warps_needs_a_barrier(words) -> None:
    source, target = words
    run(EXCHANGE.format(barrier="bar.sync 0;"), source, target)
    assert np.array_equal(target, np.arange(64) ^ 32)
    with pytest.raises(Race, match="shared memory: byte .* by warp .* no barrier between"):
        run(EXCHANGE.format(barrier="bar.warp.sync -1;"), source, target)


def test_what_one_warp_overwrites_the_others_must_have_read(words) -> None:
    body = """ld.global.b32 {{ %r6 }}, [ %rd1 + 0 ];
    {barrier}
    add.s32 %r7, %r6, 1;
    setp.eq.b32 %p1, %r1, 0;
    @%p1 st.global.b32 [ %rd1 + 0 ], {{ %r7 }};"""
    run(body.format(barrier="bar.sync 0;"), *words)
    with pytest.raises(Race, match="source: byte 0 is written by warp 0 and was read by several warps"):
        run(body.format(barrier=""), *words)


def test_no_block_may_touch_what_another_writes(words) -> None:
    with pytest.raises(Race, match="target: byte 0"):
        run("st.global.b32 [ %rd5 + 0 ], { %r2 };", *words, blocks=2)


def test_a_copy_arrives_when_it_is_waited_for_and_not_before(words) -> None:
    source, target = words
    body = """cp.async.ca.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x4, 4;
    cp.async.commit_group;
    {first}
    bar.sync 0;
    {second}
    xor.b32 %r7, %r3, 128;
    add.s32 %r8, %r4, %r7;
    ld.shared.b32 %r9, [%r8];
    st.global.b32 [ %rd5 + 0 ], {{ %r9 }};"""
    run(body.format(first="cp.async.wait_group 0;", second=""), source, target)
    assert np.array_equal(target, np.arange(64) ^ 32)
    run(body.format(first="", second=""), source, target)
    assert (target == 0xFFFFFFFF).all()  # what was in shared memory before
    with pytest.raises(Race):
        run(body.format(first="", second="cp.async.wait_group 0;"), source, target)


def test_a_product_of_two_warps(words) -> None:
    """m16n8k16 of ones and of each lane's number, against the sums by hand."""
    source, target = words
    run(
        """mov.b32 %r6, 0x3C003C00;
        cvt.rn.f32.u32 %r7, %r1;
        cvt.rn.f16x2.f32 %r8, %r7, %r7;
        mov.b32 %r10, 0;
        mov.b32 %r11, 0;
        mov.b32 %r12, 0;
        mov.b32 %r13, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 { %r10, %r11, %r12, %r13 }, { %r6, %r6, %r6, %r6 },"""
        """ { %r8, %r8 }, { %r10, %r11, %r12, %r13 };
        st.global.b32 [ %rd5 + 0 ], { %r11 };""",
        source,
        target,
    )
    lane = np.arange(64)
    column = 2 * (lane % 4) + 1  # of the second element a lane gets
    right = np.arange(64).reshape(2, 8, 4)  # lanes of a warp by column of B
    assert np.array_equal(target.view(np.float32), 4.0 * right.sum(2)[lane // 32, column])


def test_endless_loops_and_unknown_instructions_are_refused(words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "PATIENCE", 1000)
    with pytest.raises(Unknown, match="does not end"):
        run("$AGAIN: bra.uni $AGAIN;", *words)
    with pytest.raises(Unknown, match="vabsdiff4"):
        run("vabsdiff4.u32 %r6, %r1, %r2, %r3;", *words)


def test_what_is_counted(words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two warps read 128 bytes each, then every eighth word, so that eight lanes use one bank; half of one writes."""
    found = counts.Counts()
    monkeypatch.setattr(counts, "_all", {"kernel": found})
    with counts.counting():
        run(
            """ld.global.b32 { %r6 }, [ %rd4 + 0 ];
            st.shared.b32 [%r5], %r6;
            bar.sync 0;
            shl.b32 %r7, %r3, 3;
            and.b32 %r7, %r7, 1023;
            add.s32 %r8, %r4, %r7;
            ld.shared.b32 %r9, [%r8];
            setp.lt.u32 %p1, %r1, 16;
            @%p1 st.global.b32 [ %rd5 + 0 ], { %r9 };""",
            *words,
        )
    assert found.blocks == 1 and (found.issued["memory"], found.issued["control"]) == (2 + 4 + 2 + 2 + 1, 2 + 2)
    assert (found.sectors, found.bytes) == (2 * 4 + 2, 2 * 128 + 64)
    assert (found.banks, found.banks_ideal) == (2 + 2 * 8, 2 + 2)
