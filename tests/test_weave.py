"""Phases of a transposed convolution: every output and every tap of it belongs to exactly one, wherever phases weave at all."""

import pytest

from torch_conv_triton.weave import Weave

GEOMETRIES = [(K, stride, dilation) for K in (1, 2, 3, 4, 7, 16) for stride in (1, 2, 3, 4, 6, 8) for dilation in (1, 2, 3, 4, 8)]


@pytest.mark.parametrize(("K", "stride", "dilation"), GEOMETRIES)
def test_every_tap_reads_where_its_phase_says(K, stride, dilation):
    weave = Weave.of(K, stride, dilation)
    assert (weave is not None) == (stride % dilation == 0 or dilation % stride == 0)
    if weave is None:
        return
    assert weave.phases * weave.spacing == stride
    read = {}
    for phase in range(weave.phases):
        for j in range(weave.taps):
            k = phase + j * weave.phases
            if k < K:
                # the output of position 0 and this phase is fed through tap k by x at minus j steps
                assert phase * weave.spacing - k * dilation == -j * weave.step * stride
                read[k] = j * weave.step
    assert sorted(read) == list(range(K))
    assert weave.reach == max(read.values())


@pytest.mark.parametrize(
    ("K", "stride", "dilation", "C_in", "rows"),
    [
        (16, 8, 1, 512, 8),
        (10, 5, 1, 256, 8),
        (10, 5, 1, 512, 5),
        (1024, 256, 1, 16, 256),
        (400, 100, 1, 64, 128),
        (3, 6, 2, 4096, 4),
    ],
)
def test_rows_are_padded_where_lines_are_worth_more_than_products(K, stride, dilation, C_in, rows):
    assert Weave.of(K, stride, dilation).rows(C_in) == rows
