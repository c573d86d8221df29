"""Kernels, by what they compute and move; torch-free."""

from dataclasses import dataclass
from enum import Enum

from k25_train.config.basics import DType

FLOAT32_BYTES = 4


class Precision(Enum):
    """Number format of the factors of a product."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    fp8 = "fp8"

    @property
    def factor_bytes(self) -> int:
        """Bytes of an element of a product's factors."""
        return {Precision.float32: 4, Precision.bfloat16: 2, Precision.fp8: 1}[self]

    @property
    def result_bytes(self) -> int:
        """Bytes of an element of its result, which no kernel leaves in FP8."""
        return max(2, self.factor_bytes)

    @staticmethod
    def of(dtype: DType) -> "Precision":
        """The precision in which a model of this number format computes."""
        return Precision(dtype.value)


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product, or several of equal size that run as one: [m, k] times [k, n]."""

    name: str
    """What it computes."""
    m: float
    """Rows of the first factor; those of each group if there are several. Means need not be whole."""
    n: int
    """Columns of the second factor."""
    k: float
    """What is summed over."""
    count: int = 1
    """How many there are: groups, as of the experts of a rank."""
    accumulates: bool = False
    """Whether the result is added to a float32 sum in memory, as weights' gradients are."""

    @property
    def flops(self) -> float:
        """Operations, two for a multiply-add."""
        return 2.0 * self.count * self.m * self.n * self.k

    def num_bytes(self, precision: Precision) -> float:
        """Bytes read and written, each factor once."""
        result = 2 * FLOAT32_BYTES if self.accumulates else precision.result_bytes
        factors = (self.m + self.n) * self.k * precision.factor_bytes
        return self.count * (factors + self.m * self.n * result)

    @property
    def num_launches(self) -> int:
        """Kernels that the host launches: one for each group, as Transformer Engine does with cuBLAS."""
        return self.count


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention of one micro-batch in one layer, in one kernel that keeps no scores."""

    name: str
    """What it computes."""
    pairs: float
    """Pairs of a query and a key, as the mask leaves them."""
    tokens: float
    """Queries; with causal documents of one length L, pairs are L / 2 times as many."""
    heads: int
    """Heads of a rank."""
    qk_width: int
    """Width of a head's queries and keys."""
    v_width: int
    """Width of a head's values."""
    is_backward: bool = False
    """Whether it computes gradients."""
    rate_share: float = 1.0
    """Share of the device's rate of attention that this kernel reaches."""

    @property
    def flops(self) -> float:
        """Operations as MFU counts them: twice as many backward as forward."""
        forward = 2.0 * self.pairs * self.heads * (self.qk_width + self.v_width)
        return 2 * forward if self.is_backward else forward

    @property
    def computed_flops(self) -> float:
        """Operations of the kernel, which computes scores again backward: five products to forward's two."""
        if not self.is_backward:
            return self.flops
        return 2.0 * self.pairs * self.heads * (3 * self.qk_width + 2 * self.v_width)

    def num_bytes(self, precision: Precision) -> float:
        """Bytes read and written: queries, keys, values and result; gradients of each as well."""
        passes = 2 if self.is_backward else 1
        widths = 2 * self.qk_width + 2 * self.v_width
        return passes * self.tokens * self.heads * widths * precision.result_bytes

    @property
    def num_launches(self) -> int:
        """Kernels that the host launches; backward, products of result and gradient come first, and
        the sum of queries' gradients is converted last."""
        return 3 if self.is_backward else 1


@dataclass(frozen=True, slots=True)
class Moved:
    """A kernel, or several, that reads and writes memory and computes next to nothing."""

    name: str
    """What it does."""
    total_bytes: float
    """Bytes read and written."""
    num_launches: int = 1
    """How many kernels it is."""

    @property
    def flops(self) -> float:
        """None that count."""
        return 0.0

    def num_bytes(self, precision: Precision) -> float:
        """Bytes read and written, whatever products compute in."""
        return self.total_bytes


Kernel = Product | Attention | Moved
"""What a device computes."""
