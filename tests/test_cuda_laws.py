"""The CUDA kernels, run on the CPU, break no law of `npllm.testing`: features that a rule says."""

import pytest
from guard import moved
from kernel_shim import needs_gxx
from seeds import run_seed

from npllm import testing
from npllm.kernels import cuda

pytestmark = pytest.mark.usefixtures("on_the_stand_in")

FEATURES = {
    "attention": {"gqa", "window", "cache", "scale"},
    "apply_rope": None,
    "rms_norm": None,
    "linear": set(),
    "swiglu": None,
    "embed": None,
}


def on_device(op):
    """An operation of the CUDA set as a function of NumPy arrays."""
    kernel = getattr(cuda.CUDA, op)

    def called(*arrays, **options):
        there = [moved(x) if hasattr(x, "shape") else x for x in arrays]
        return kernel(*there, **options).get()

    def attention(q, k, v, *, mask, scale=None):
        return called(q, k, v, mask=mask, scale=scale)

    return attention if op == "attention" else called


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize("op", FEATURES)
def test_the_cuda_kernels_break_no_law(op):
    """Compiled with -ftz=true, as CuPy does: subnormal numbers count as zero."""
    report = testing.check(
        op, on_device(op), FEATURES[op], max_examples=30, seed=run_seed(), flush_to_zero=True
    )
    assert report.used <= 1
    assert report.n_undecided == 0


@needs_gxx
@pytest.mark.slow
def test_a_mask_that_is_wrong_is_named():
    right = on_device("attention")

    def late(q, k, v, *, mask, scale=None):
        return right(q, k, v, mask=mask, scale=scale)[..., ::-1, :].copy()

    with pytest.raises(testing.LawBroken):
        testing.check_attention(late, {"gqa", "cache"}, seed=1, flush_to_zero=True)
