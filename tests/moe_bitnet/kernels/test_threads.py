"""The kernels' threads: no more than torch has, right results whoever calls, and a life after fork()."""

import json
import os
import sys
import threading

import pytest
import torch
from kernel_variants import offsets_of, random_experts, random_packed, random_rows, run_python, torch_threads

from moe_bitnet.kernels import select
from moe_bitnet.kernels.backend_reference import expert_ffn as reference
from moe_bitnet.tiles import tile

TIMEOUT_S = 60
"""A call takes about a millisecond; a wait as long as this is a lock that nobody will open."""


def test_several_python_threads_may_call_at_once():
    # the pool serves one of them; the others compute alone
    experts, counts = random_experts(5, 210, 300, "base3"), [0, 1, 14, 0, 6]
    x_q, scale = random_rows(sum(counts), 300)
    offsets = offsets_of(counts)
    expected = reference(x_q, scale, experts, offsets)
    linear_weight = tile(random_packed(210, 300, layout="2bit"))
    expected_linear = select("ternary_linear", "cpu", "reference")(x_q, scale, linear_weight)
    expert_ffn, linear = select("expert_ffn", "cpu", "cpp"), select("ternary_linear", "cpu", "cpp")
    start, wrong, num_right = threading.Barrier(4), [], []

    def call_often():
        start.wait(TIMEOUT_S)
        for _ in range(100):
            for actual, right in (
                (expert_ffn(x_q, scale, experts, offsets), expected),
                (linear(x_q, scale, linear_weight), expected_linear),
            ):
                (num_right if torch.equal(actual, right) else wrong).append(1)

    with torch_threads(2):
        threads = [threading.Thread(target=call_often, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_S)
    assert not any(thread.is_alive() for thread in threads), "a call hangs"
    assert not wrong
    assert len(num_right) == 4 * 100 * 2, "a thread ended with an exception"


# In a process of their own: the scripts count threads, or fork.
PREPARE = """
import json, multiprocessing, os, sys, threading
import torch
torch.set_num_threads(1)
from moe_bitnet.kernels import select
from moe_bitnet.kernels.expert_weights import ExpertWeights
from moe_bitnet.packing import PackedTernary, pack

def portable(out_features, in_features):
    packed = pack(torch.randint(-1, 2, (1, out_features, in_features), dtype=torch.int8), "2bit")
    return PackedTernary(packed, torch.ones(1, 1, 1), in_features, "2bit")

weights = [portable(200, 300), portable(200, 300), portable(300, 200)]
gate, up, down = (select("tile", "cpu", "cpp")(weight) for weight in weights)
experts = ExpertWeights(gate, up, down, torch.ones(1, 200), 1e-5, "swiglu")
x, gain = torch.randn(40, 300), torch.ones(300)
offsets = torch.tensor([0, 40])

def call():
    # every operation that may ask for threads, and nothing that lets torch start some of its own
    x_q, scale = select("quantize_activation", "cpu", "cpp")(x)
    select("rms_norm_quantize", "cpu", "cpp")(x, gain, 1e-5)
    select("untile", "cpu", "cpp")(gate)
    select("tile", "cpu", "cpp")(weights[0])
    select("grouped_ternary_linear", "cpu", "cpp")(x_q, scale, gate, offsets)
    return select("expert_ffn", "cpu", "cpp")(x_q, scale, experts, offsets)

def num_threads():
    return len(os.listdir("/proc/self/task"))
"""

COUNT_THREADS = (
    PREPARE
    + """
counts = [num_threads()]
for threads in (1, 2, 2, 3, 1, 2):
    torch.set_num_threads(threads)
    before = num_threads()
    call()
    counts.append(num_threads() - before)
print(json.dumps(counts))
"""
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="threads are counted in /proc/self/task")
def test_no_thread_is_started_that_torch_would_not_use():
    process = run_python(COUNT_THREADS, TIMEOUT_S, OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    _, *started = json.loads(process.stdout)
    assert started[0] == 0, "one thread is the caller's"
    assert started[1] == 1, "two threads are the caller's and one worker"
    assert started[2] == 0, "the worker is kept"
    assert started[3] == 1
    assert started[4:] == [0, 0]


FORK = (
    PREPARE
    + """
torch.set_num_threads(2)
expected = call()

def is_right():
    return call().numpy().tobytes() == expected.numpy().tobytes()

def child():
    sys.exit(0 if all(is_right() for _ in range(5)) else 3)

def run_child():
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(20)
    if process.is_alive():
        process.kill()
        return "hangs"
    return process.exitcode

exit_codes = [run_child() for _ in range(3)]
stop = threading.Event()

def keep_busy():
    while not stop.is_set():
        call()

busy = threading.Thread(target=keep_busy, daemon=True)
busy.start()
exit_codes += [run_child() for _ in range(3)]
stop.set()
busy.join(20)
print(json.dumps([exit_codes, is_right(), busy.is_alive()]))
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
def test_a_forked_child_computes_and_its_parent_goes_on():
    # the child has none of its parent's workers, and a fork may come while they compute
    process = run_python(FORK, 2 * TIMEOUT_S, OMP_NUM_THREADS="1")
    assert process.returncode == 0, process.stderr
    exit_codes, is_parent_right, is_parent_stuck = json.loads(process.stdout)
    assert exit_codes == [0] * 6
    assert is_parent_right
    assert not is_parent_stuck


def test_calls_of_changing_numbers_of_threads_are_right():
    # workers that sit a call out must not miss the next one
    experts, offsets = random_experts(1, 210, 300, "2bit"), offsets_of([21])
    x_q, scale = random_rows(21, 300)
    expected, expert_ffn = reference(x_q, scale, experts, offsets), select("expert_ffn", "cpu", "cpp")
    for num_threads in [1, 2, 3, 2, 1, 3, 3, 2, 4, 1, 2] * 3:
        with torch_threads(num_threads):
            assert torch.equal(expert_ffn(x_q, scale, experts, offsets), expected)
