"""From noise to an action chunk: integrating the flow, and executing the chunks it gives."""

from torch import Tensor


def velocity(decode, target: str, x: Tensor, t: float) -> Tensor:
    """What a decoder bound to its observations says of chunks x (B, T, A) at time t, as a velocity.

    target: what it was trained to predict, `velocity` or the data `x1` (then the velocity is (x1 - x) / (1 - t)).
    """
    predicted = decode(x_t=x[:, None], t=x.new_full((len(x), 1), t))[:, 0]
    return predicted if target == "velocity" else (predicted - x) / (1 - t)


def euler(velocity, x0: Tensor, steps: int) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 0 to 1 in equal steps; `steps` evaluations (NFE)."""
    x = x0
    for k in range(steps):
        x = x + velocity(x, k / steps) / steps
    return x


def heun(velocity, x0: Tensor, steps: int) -> Tensor:
    """As `euler`, second order: two evaluations a step, but one in the last, where a field built from x1 is 0/0."""
    x = x0
    for k in range(steps):
        v = velocity(x, k / steps)
        guess = x + v / steps
        x = guess if k == steps - 1 else x + (v + velocity(guess, (k + 1) / steps)) / (2 * steps)
    return x
