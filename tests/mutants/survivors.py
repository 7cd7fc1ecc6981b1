"""Mutants that live, and why. An entry whose mutant is killed is outdated and fails the test."""

#: They change nothing that an operator returns: why -> which
EQUIVALENT: dict[str, tuple[str, ...]] = {
    "Another way to share out a row or a sample, just as right; how fast it is, is not measured here.": (
        "launch.cuh kMaxSharedBytes: * becomes /",
        "launch.cuh kMaxSharedBytes: a factor is dropped",
        "rows.cuh RowShape: * becomes /",
        "rows.cuh RowShape: < becomes <=",
        "rows.cuh RowShape: > becomes >=",
        "rows.cuh RowShape: a factor is dropped #2",
        "rows.cuh with_row_shape: <= becomes < #1",
        "rows.cuh with_row_shape: <= becomes < #2",
        "rows.cuh with_row_shape: <= becomes < #3",
        "rows.cuh with_row_shape: in no case #1",
        "rows.cuh with_row_shape: in no case #2",
        "rows.cuh with_row_shape: in no case #3",
        "rows.cuh with_row_lanes: <= becomes < #1",
        "rows.cuh with_row_lanes: <= becomes < #2",
        "rows.cuh with_row_lanes: in any case #1",
        "rows.cuh with_row_lanes: in any case #2",
        "rows.cuh with_row_lanes: in no case #1",
        "rows.cuh with_row_lanes: in no case #2",
        "reduce.cuh reduce: < becomes <= #1",
        "elements.cuh Pack.load: in no case",
        "elements.cuh Pack.store: in no case",
        "elements.cuh aligned: 0 becomes 1",
        "elements.cuh with_sample_block: <= becomes <",
        "elements.cuh with_sample_block: in any case",
        "elements.cuh with_sample_block: in no case",
        "pgd_step.cuh step_fits: <= becomes <",
        "pgd_step.cuh pgd_step_l2: == becomes !=",
        "random_start.cuh transform: <= becomes <",
        "random_start.cuh transform: in no case #1",
    ),
    "Another number of blocks: the kernels stride over what is left, or have nothing to do.": (
        "launch.cuh ceil_div: + becomes -",
        "launch.cuh ceil_div: - becomes +",
        "launch.cuh ceil_div: a term is dropped #1",
        "launch.cuh ceil_div: a term is dropped #2",
        "launch.cuh ceil_div: a factor is dropped",
        "launch.cuh grid_for: < becomes <= #1",
        "launch.cuh grid_for: < becomes <= #2",
        "launch.cuh grid_for: < becomes > #1",
        "pgd_step.cuh enqueue: * becomes / #1",
        "random_start.cuh enqueue: * becomes /",
        "random_start.cuh enqueue: a factor is dropped",
    ),
    "What lies beyond the last class or element counts nothing and is not written: skipping it saves time.": (
        "rows.cuh for_classes: * becomes / #1",
        "rows.cuh for_classes: < becomes <= #2",
        "rows.cuh for_classes: a factor is dropped #1",
        "rows.cuh for_classes: in any case",
        "rows.cuh Row: > becomes >=",
        "rows.cuh Row.Row: > becomes >=",
        "random_start.cuh transform: - becomes +",
        "random_start.cuh transform: < becomes <= #3",
        "random_start.cuh transform: a term is dropped #7",
        "random_start.cuh random_start: < becomes <= #2",
        "random_start.cuh random_start_l2: < becomes <= #1",
        "random_start.cuh random_start_l2: < becomes <= #4",
        "random_start.cuh random_start_l2: 0 becomes 1 #2",
    ),
    "A gradient that is not wanted is not added, or is 0 times a finite number.": (
        "math.h EntropyKLGradTerms.operator(): in any case #2",
        "entropy_kl.cuh entropy_kl_backward: 0 becomes 1 #1",
        "entropy_kl.cuh entropy_kl_backward: 0 becomes 1 #2",
    ),
    "The same number by another way: 0 * norm is 0 or NaN with either sign, exp(-inf) is 0 on any scale, 4 is 4.": (
        "math.h l2_shrink: + becomes -",
        "random_start.cuh kDraw: < becomes <=",
    ),
    "Of equal values either may be taken: only the sign of a zero tells them apart, and no upper bound is one.": (
        "math.h min: < becomes <=",
    ),
}

#: They change results or memory, but no case shows it.
UNNOTICED: dict[str, tuple[str, ...]] = {
    "An index one beyond an array in registers: undefined, and g++ takes it for impossible.": (
        "rows.cuh for_classes: < becomes <= #1",
        "elements.cuh Pack.store: < becomes <= #1",
    ),
}
