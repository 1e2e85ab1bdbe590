"""`norm_linear` and `gated_linear` on a GPU: the contract."""

from tests.kernels.linear_contract import LinearContract


class TestTriton(LinearContract):
    implementation = "triton"
    precisions = [("same", "same")]
    shapes = ((130, 96, (32, 32, 48, 48)), (1000, 512, (512, 512, 512, 512)))


class TestMosaic(LinearContract):
    implementation = "mosaic"
    dtypes = ("bfloat16", "float16")
    shapes = ((1280, 512, (512, 512, 512, 512)), (128, 256, (256, 256, 512, 512)))
