"""The emulator itself: plans, its other fibers, what it answers to mistakes of its caller."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from builds import build
from cases import entropy_kl, pgd_step
from emulator import EmulatorError, plan, run
from helpers import F32, assert_same_bits
from kernels import Kernels

POINTERS = {"adv": 0x1000, "grad": 0x2000, "clean": 0x3000}
SETTINGS = {"size": 3072, "step_size": 0.5, "epsilon": 0.25, "lower": -np.inf, "upper": 1.0}


def test_plan_is_what_the_driver_of_a_gpu_gets():
    (launch,) = plan("PGDStepL2", "float16", POINTERS, SETTINGS, 100, max_blocks=7)
    assert launch.symbol == "_ZN3dtf11pgd_step_l2INS_4HalfENS_11SampleBlockILi256EEEEEvNS_9PGDStepL2IT_EEl"
    assert (launch.grid, launch.block, launch.shared) == ((7, 1), 256, 4 * 3072)
    assert launch.params == (
        struct.pack("<4q4d", 0x1000, 0x2000, 0x3000, 3072, 0.5, 0.25, -np.inf, 1.0),
        struct.pack("<q", 100),
    )


def test_plan_of_nothing_has_no_launch():
    assert plan("PGDStepL2", "float32", POINTERS, SETTINGS, 0) == []


def test_portable_fibers_give_the_same_bits():
    """ucontext, for processors other than x86-64."""
    portable = Kernels(build=build("portable", ["entropy_kl", "pgd_step"], ["float32"]))
    for check, size in ((entropy_kl, 10), (entropy_kl, 1025), (pgd_step, 3075)):
        assert_same_bits(check(portable, 3, size, F32), check(Kernels(), 3, size, F32))


def test_results_that_no_thread_writes_stay_as_they_were():
    adv = np.arange(8, dtype=np.float32)
    settings = SETTINGS | {"size": 4}
    given = {"adv": adv, "grad": np.ones_like(adv), "clean": adv}
    after = run("PGDStepLinf", "float32", given, settings | {"lower": -100.0, "upper": 100.0}, 5)["adv"]
    assert after.tolist() == [0.25, 1.25, 2.25, 3.25, 4.25, 5, 6, 7]


@pytest.mark.parametrize(
    ("op", "settings", "message"),
    [
        ("PGDStep", SETTINGS, "no operator PGDStep for float32"),
        ("PGDStepL2", {"size": 3072, "step_size": 0.5}, "the fields are adv, grad, clean, size, step_size"),
        ("PGDStepL2", SETTINGS | {"norm": 1}, "the fields are adv, grad, clean, size, step_size"),
    ],
)
def test_mistakes_are_reported(op, settings, message):
    with pytest.raises(EmulatorError, match=message):
        plan(op, "float32", POINTERS, settings, 1)


def test_goes_on_after_an_error():
    with pytest.raises(EmulatorError):
        plan("none", "float32", {}, {}, 1)
    assert len(plan("PGDStepL2", "float32", POINTERS, SETTINGS, 1)) == 1
