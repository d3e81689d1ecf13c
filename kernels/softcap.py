"""How does a Triton kernel cap a logit, and how steep is the cap there?

    z = softcap * tanh(x / softcap)        dz/dx = 1 - tanh(x / softcap)**2

Both come from `e = exp(-2 |x / softcap|)`, which cannot overflow: `tanh = +-(1 - e) / (1 + e)` and `dz/dx = 4 e / (1 +
e)**2`, without the cancellation of `1 - tanh**2` where tanh saturates. Near zero it is `1 - e` that cancels, and the
error is multiplied by the softcap, so there tanh is the odd polynomial of Cephes' `tanhf` (1 ulp). Never an approximate
tanh.
"""

import triton
import triton.language as tl


@triton.jit
def softcap_and_slope(x, softcap):
    """`(z, dz/dx)` in float32 for float32 `x` of any shape; infinities give `(+-softcap, 0)`.

    Source: the polynomial is S. L. Moshier, Cephes `single/tanhf.c`, for |y| < 0.625.
    """
    y = x * (1.0 / softcap)
    e = tl.exp(-2.0 * tl.abs(y))
    far = (1.0 - e) / (1.0 + e)
    square = y * y
    tail = ((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square
    tail = (tail + 1.33314422036e-1) * square - 3.33332819422e-1
    near = tail * square * y + y
    tanh = tl.where(tl.abs(y) < 0.625, near, tl.where(y < 0, -far, far))
    return softcap * tanh, 4.0 * e / ((1.0 + e) * (1.0 + e))
