"""A compiled program read from its text, and how long it takes at given rates."""

import dataclasses
from pathlib import Path

import pytest
from compilers import needs_gpu_compiler
from load_script import load_script

from jlora.planning import speed
from jlora.planning.program import Operation, Program
from jlora.planning.speed import Rates, estimate, rates_of, seconds
from jlora.planning.topology import Target

# As XLA writes for an H100: cuBLAS, a Triton product, cuDNN's attention, copies within a stack, a collective.
HLO = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(bf16[64,32]{1,0})->bf16[64,32]{1,0}}

%nested (p.0: bf16[64,32]) -> bf16[64,32] {
  ROOT %p.0 = bf16[64,32]{1,0} parameter(0)
}

%gemm_fusion_dot (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %left = bf16[64,32]{1,0} fusion(%a), kind=kCustom, calls=%nested
  ROOT %dot.1 = bf16[64,16]{1,0} dot(%left, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%slice (stack: bf16[8,32,16], i: s32[]) -> bf16[32,16] {
  %stack = bf16[8,32,16]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,32,16]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,32,16}
  ROOT %flat = bf16[32,16]{1,0} bitcast(%one)
}

%update (kept: f32[8,64], i.1: s32[], new: bf16[1,64]) -> f32[8,64] {
  %kept = f32[8,64]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %new = bf16[1,64]{1,0} parameter(2)
  %zero.1 = s32[] constant(0)
  %wide = f32[1,64]{1,0} convert(%new)
  ROOT %dus = f32[8,64]{1,0} dynamic-update-slice(%kept, %wide, %i.1, %zero.1)
}

%body (state: (s32[], bf16[64,32], bf16[8,32,16], f32[8,64])) -> (s32[], bf16[64,32], bf16[8,32,16], f32[8,64]) {
  %state = (s32[], bf16[64,32]{1,0}, bf16[8,32,16]{2,1,0}, /*index=3*/f32[8,64]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%state), index=0
  %x = bf16[64,32]{1,0} get-tuple-element(%state), index=1
  %w = bf16[8,32,16]{2,1,0} get-tuple-element(%state), index=2
  %rows = f32[8,64]{1,0} get-tuple-element(%state), index=3
  %cut = bf16[32,16]{1,0} fusion(%w, %n), kind=kLoop, calls=%slice
  %gather = (bf16[32,16]{1,0}, bf16[64,16]{1,0}) all-gather-start(%cut), channel_id=1, \
replica_groups={{0,1}}, dimensions={0}
  %triton = bf16[64,16]{1,0} fusion(%x, %cut), kind=kCustom, calls=%gemm_fusion_dot
  %gathered = bf16[64,16]{1,0} all-gather-done(%gather)
  %line = bf16[1,64]{1,0} slice(%triton), slice={[0:1], [0:64]}
  %put = f32[8,64]{1,0} fusion(%rows, %n, %line), kind=kLoop, calls=%update
  ROOT %again = (s32[], bf16[64,32]{1,0}, bf16[8,32,16]{2,1,0}, f32[8,64]{1,0}) tuple(%n, %x, %w, %put)
}

%condition (p: (s32[])) -> pred[] {
  ROOT %never = pred[] constant(false)
}

ENTRY %main (q: bf16[1,128,2,64], x.1: bf16[64,32]) -> bf16[64,32] {
  %q = bf16[1,128,2,64]{3,1,2,0} parameter(0)
  %x.1 = bf16[64,32]{1,0} parameter(1)
  %loop = (s32[], bf16[64,32]{1,0}, bf16[8,32,16]{2,1,0}, f32[8,64]{1,0}) while(%x.1), \
condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"8"}}
  %attended = (bf16[1,128,2,64]{3,1,2,0}, f32[1,2,128]{2,1,0}, u8[4096]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape": \
{"element_type":"BF16","dimensions":["1","2","128","128"],"layout":{"minor_to_major":["3"]}},"mask_type":"CAUSAL","sliding_window_length":"0"}}
  %back = (bf16[1,128,2,64]{3,1,2,0}, u8[4096]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": \
{"intermediate_tensor_shape": {"element_type":"BF16","dimensions":["1","2","128","128"]},"mask_type":"NO_MASK"}}
  ROOT %cublas = (bf16[64,64]{1,0}, s8[33554432]{0}) custom-call(%x.1, %x.1), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{ \
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":[]}}}
}
"""
# A TPU's: a kernel that says something of itself in lines of its own, and the compiler's cycles.
TPU = """HloModule jit_step

%fused (p: bf16[8,8]) -> bf16[8,8] {
  ROOT %p = bf16[8,8]{1,0} parameter(0)
}

ENTRY %main (q.1: bf16[2,16,8], w: bf16[8,8]) -> bf16[8,8] {
  %q.1 = bf16[2,16,8]{2,1,0} parameter(0)
  %w = bf16[8,8]{1,0} parameter(1)
  %splash_mha_fwd.1 = bf16[2,16,8]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%q.1, %q.1), \
custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="splash"}
  %copy-start = (bf16[8,8]{1,0:T(8,128)S(1)}, bf16[8,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  %copy-done = bf16[8,8]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %fusion = bf16[8,8]{1,0} fusion(%copy-done), kind=kOutput, calls=%fused, \
backend_config={"window_config":{"estimated_cycles":"3528"}}
  ROOT %sum = bf16[8,8]{1,0} all-reduce(%fusion), channel_id=1, replica_groups={{0,1}}, to_apply=%add
}
"""
KINDS = ("coded_product", "product")
RATES = Rates(1e6, 2e6, 1e6, 1e6, 1e5, 1e4, None, None, 0.0)
TARGET = Target("gpu:a:2", "gpu", [None] * 2, 80, 1e12, 1e11, 1e10, product_flops=1e12)


@pytest.fixture(scope="module")
def operations() -> dict[str, Operation]:
    return {operation.name: operation for operation in Program(HLO).operations()}


def test_products_of_codes_are_told_apart():
    """By what is multiplied, not by what comes out."""
    for type_, kind in (("f8e4m3fn", "coded_product"), ("s8", "coded_product"), ("bf16", "product")):
        text = f"""ENTRY %main (a: {type_}[4,8], b: {type_}[8,2]) -> bf16[4,2] {{
  %a = {type_}[4,8]{{1,0}} parameter(0)
  %b = {type_}[8,2]{{1,0}} parameter(1)
  ROOT %dot.1 = bf16[4,2]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}
"""
        (operation,) = Program(text).operations()
        assert operation.kind == kind and operation.flops == 2 * 4 * 8 * 2
    fast, slow = (sum(speed.seconds([Operation("a", kind, 1, flops=1e6)], RATES).values()) for kind in KINDS)
    assert slow == 2 * fast


def test_products_and_attention_by_hand(operations):
    assert operations["triton"].kind == "product" and operations["triton"].flops == 2 * 64 * 32 * 16
    assert operations["cublas"].kind == "product" and operations["cublas"].flops == 2 * 64 * 32 * 64
    square = 2 * 128 * 128 * 64
    assert operations["attended"].kind == "attention" and operations["attended"].flops == 2 * 2 * square / 2
    assert operations["back"].kind == "attention_backward" and operations["back"].flops == 5 * 2 * square


def test_bytes_by_hand(operations):
    # A slice of a stack costs the slice, read and written; so does an update in place. A workspace is no result.
    assert operations["cut"].moved == 2 * 32 * 16 * 2 + 4
    assert operations["put"].moved == 64 * 2 + 64 * 4 + 4
    assert operations["triton"].moved == 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert operations["cublas"].moved == 2 * (64 * 64 + 2 * 64 * 32)
    assert operations["line"].moved == 2 * 64 * 2


def test_loops_and_what_moves_nothing(operations):
    assert {name for name, each in operations.items() if each.times == 8} == {
        *("cut", "gather", "triton", "gathered", "line", "put"),
    }
    assert operations.keys() >= {"attended", "back", "cublas"}
    assert not operations.keys() & {
        "loop",
        "x",
        "again",
        "never",
    }


def test_a_tpu_program_by_hand():
    operations = {operation.name: operation for operation in Program(TPU).operations()}
    attended, loaded = operations["splash_mha_fwd.1"], operations["copy-start"]
    assert attended.kind == "attention" and attended.flops == 2 * 2 * (2 * 16 * 8) * 16 / 2
    assert attended.moved == 2 * 2 * 2 * 16 * 8  # its result stays in the core's own memory
    assert loaded.starts and loaded.moved == 2 * 8 * 8 and operations["copy-done"].waits == "copy-start"
    assert operations["fusion"].cycles == 3528 and operations["sum"].sent == 2 * 2 * 8 * 8 / 2


def test_a_collective_hides_behind_the_work_beside_it():
    start = Operation("start", "collective", 2, sent=1e4, starts=True)
    done = Operation("done", "other", 2, waits="start")
    beside = Operation("product", "product", 2, flops=6e5)
    assert seconds([start, beside, done], RATES) == pytest.approx({"compute": 1.2, "memory": 0.0, "link": 0.8})
    assert seconds([start, done, beside], RATES) == pytest.approx({"compute": 1.2, "memory": 0.0, "link": 2.0})
    # Two share the link; a third, without an end of its own, stands in the way of all.
    second = start._replace(name="second")
    both = [start, second, beside, done, done._replace(name="end", waits="second")]
    assert sum(seconds(both, RATES).values()) == pytest.approx(4.0)
    assert seconds([start._replace(starts=False), beside], RATES)["link"] == pytest.approx(2.0)


def test_the_slowest_of_what_an_operation_does_counts():
    one = Operation("one", "product", 3, flops=1e6, moved=2e5)
    assert seconds([one], RATES) == pytest.approx({"compute": 0.0, "memory": 6.0, "link": 0.0})
    assert seconds([one._replace(moved=1e4)], RATES)["compute"] == pytest.approx(3.0)
    launched = dataclasses.replace(RATES, launch=0.5)
    assert seconds([one], launched)["memory"] == pytest.approx(3 * 2.5)
    # On a TPU the compiler's own cycles stand for both.
    tpu = dataclasses.replace(RATES, clock=1e9)
    assert sum(seconds([one._replace(cycles=4e9)], tpu).values()) == pytest.approx(12.0)


def test_an_estimate_is_a_range_for_all_devices():
    work = [Operation("one", "product", 1, flops=1e12)]
    found = estimate(work, TARGET, 1000)
    assert found["mid"] == found["seconds_per_step"] == pytest.approx(1 / speed.PRODUCTS, rel=1e-3)
    assert found["low"] < found["mid"] < found["high"] == pytest.approx(found["mid"] * (1 + speed.SPREAD_ELSEWHERE))
    assert found["compute_seconds"] + found["memory_seconds"] + found["link_seconds"] == pytest.approx(found["mid"])
    assert found["tokens_per_second_per_device"] == pytest.approx(500 / found["mid"])
    measured = estimate(work, dataclasses.replace(TARGET, spec=speed.FITTED, devices=[None]), 1000)
    assert measured["high"] / measured["mid"] < found["high"] / found["mid"]
    assert estimate(work, dataclasses.replace(TARGET, peak_flops=None), 1000) is None
    unmeasured = rates_of(dataclasses.replace(TARGET, product_flops=None))
    assert unmeasured.products == pytest.approx(speed.UNMEASURED * speed.PRODUCTS * 1e12)


def test_every_step_measured_on_the_h200_lies_in_its_range(capsys, monkeypatch):
    """The table of docs/planner.md, made anew: each step by the fit, and by a fit that knows nothing of it."""
    script = load_script("plan_speed")
    monkeypatch.setattr("sys.argv", ["plan_speed"])
    assert script.main() == 0
    said = capsys.readouterr().out
    assert f"fitted: PRODUCTS {speed.PRODUCTS}" in said
    rows = [line for line in said.splitlines() if line.startswith("| llama2-")]
    errors = [float(cell.strip("% ")) / 100 for line in rows for cell in line.split("|") if cell.strip().endswith("%")]
    assert len(rows) == 8 and len(errors) == 16 and max(map(abs, errors)) <= speed.SPREAD
    documented = (Path(__file__).parents[2] / "docs" / "planner.md").read_text(encoding="utf-8")
    for line in rows:
        assert line in documented, line


@needs_gpu_compiler
@pytest.mark.slow
def test_published_speeds_lie_in_the_range_of_other_hardware(capsys, monkeypatch):
    """Of one card: those of eight take minutes of compilation (`scripts/plan_speed --published`)."""
    script = load_script("plan_speed")
    steps = [step for step in script.PUBLISHED if step.topology.endswith(":1")]
    monkeypatch.setattr(script, "PUBLISHED", steps)
    monkeypatch.setattr("sys.argv", ["plan_speed", "--published"])
    assert script.main() == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `gpu:")]
    errors = [float(line.split("|")[7].strip(" %")) / 100 for line in rows]
    assert len(errors) == len(steps) >= 3 and max(map(abs, errors)) <= speed.SPREAD_ELSEWHERE
