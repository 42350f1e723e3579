"""How a block's branch joins the residual stream.

A block never writes ``x + f(norm(x))`` itself: it reads the branch input from the stream and writes the branch output
back. Today the stream is one hidden state; a wider stream (hyper-connections) replaces `read` and `write`.
"""

from collections.abc import Callable

from torch import Tensor


def read(x_BSD: Tensor) -> Tensor:
    """Input of a branch: the stream itself."""
    return x_BSD


def write(x_BSD: Tensor, y_BSD: Tensor) -> Tensor:
    """Stream after a branch has answered y."""
    return x_BSD + y_BSD


def residual(x_BSD: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """One whole branch, x ↦ write(x, f(read(x)))."""
    return write(x_BSD, f(read(x_BSD)))
