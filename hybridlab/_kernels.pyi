"""Types of the compiled extension; see cython_kernels/_kernels.pyx."""

from typing import Any

MatrixParts = tuple[int, int, int, int, int]

def supported() -> tuple[str, ...]: ...
def native_seconds() -> float: ...
def address(array: Any) -> int: ...
def packed_bytes(n: int, k: int, element: int) -> int: ...
def pack(tier: str, parts: MatrixParts, out: int, threads: int) -> None: ...
def read_words(tier: str, address: int, words: int, loop: int, threads: int) -> int: ...
def multiply_rate(tier: str, seconds: float, threads: int) -> float: ...
def rms_norm(x: int, w: int, eps: float, tokens: int, h: int, out: int) -> None: ...
def norm_rope(
    x: int, w: int, eps: float, cosines: int, sines: int, tokens: int, heads: int, d: int, out: int
) -> None: ...
def route(logits: int, tokens: int, experts: int, k: int, normalise: bool, ids: int, weights: int) -> None: ...
def attend(
    tier: str,
    q: int,
    keys: int,
    values: int,
    contexts: int,
    count: int,
    n: int,
    g: int,
    d: int,
    out: int,
    threads: int,
) -> None: ...

class Linear:
    def __init__(self, tier: str, parts: MatrixParts) -> None: ...
    def run(self, x: int, tokens: int, out: int, threads: int) -> None: ...

class MoeLayer:
    def __init__(
        self, tier: str, experts: list[tuple[MatrixParts, MatrixParts, MatrixParts] | None], h: int, i: int
    ) -> None: ...
    def run(self, x: int, tokens: int, slots: int, ids: int, weights: int, out: int, threads: int) -> None: ...

class HostLane:
    def __init__(self, ops: list[tuple[int, int, MoeLayer | None, int, int, int, int, int, int]]) -> None: ...
    def run(self, threads: int, stop: int, times: int) -> bool: ...

class AttentionStep:
    def __init__(
        self,
        tier: str,
        matrices: tuple[MatrixParts, MatrixParts, MatrixParts, MatrixParts],
        norms: tuple[int, int, int],
        eps: float,
        n: int,
        g: int,
        d: int,
    ) -> None: ...
    def run(
        self,
        x: int,
        cosines: int,
        sines: int,
        tokens: int,
        keys: int,
        values: int,
        slots: int,
        contexts: int,
        out: int,
        threads: int,
    ) -> None: ...

class RouterStep:
    def __init__(self, tier: str, gate: MatrixParts, norm: int, eps: float, k: int, normalise: bool) -> None: ...
    def run(self, x: int, tokens: int, normed: int, ids: int, weights: int, threads: int) -> None: ...
