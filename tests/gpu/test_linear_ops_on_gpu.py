"""`norm_linear` and `gated_linear` on a GPU: the contract."""

from tests.kernels.linear_contract import LinearContract


class TestTriton(LinearContract):
    implementation = "triton"
    precisions = [("same", "same")]
    shapes = ((130, 96, (32, 32, 48, 48)), (1000, 512, (512, 512, 512, 512)))


class TestMosaic(LinearContract):
    implementation = "mosaic"
    dtypes = ("bfloat16", "float16")
    precisions = [("fp8", "same"), ("fp8", "fp8")]
    shapes = ((1280, 512, (512, 512, 512, 512)), (128, 256, (256, 256, 512, 512)))


class TestMosaicInThePrecisionOfX(LinearContract):
    """The product behind the gate is then cuBLAS's, which `triton` calls."""

    implementation = ("mosaic", "triton")
    dtypes = ("bfloat16", "float16")
    shapes = ((1280, 512, (512, 512, 512, 512)), (256, 256, (256, 256, 512, 512)))
    calls = [("same", "same")]

    def taken(self):
        return {("norm_linear", "mosaic"), ("gated_linear", "triton")}
