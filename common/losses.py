"""The terms of the objectives, as pure functions."""

from collections.abc import Sequence

import torch
from accelerate.utils import reduce
from torch import Tensor

from common.noise import Noise


def warmup(progress: float, share: float) -> float:
    """0 to 1 over the first `share` of the run; progress is the share of its steps that are done."""
    return min(progress / share, 1.0) if share else 1.0


def draw_camera_mask(noise: Noise, batch: int, cameras: int, probability: float) -> Tensor:
    """(B, cameras) bool: with `probability` one camera of a sample is hidden, never its only one."""
    u = noise.uniform(batch, 2)
    camera = (u[:, 1:] * cameras).long()
    hidden = u[:, :1] < (probability if cameras > 1 else 0.0)
    return hidden & (camera == torch.arange(cameras, device=u.device))


def masked_mse(prediction: Tensor, target: Tensor, ignored: Tensor) -> Tensor:
    """prediction, target (..., T, A), ignored (..., T) -> mean squared error, ignored ones as 0.

    The denominator is constant, so that micro-steps and processes of equal size add up to the loss
    of the whole batch.
    """
    error = (prediction - target).square()
    return error.masked_fill(ignored[..., None], 0).mean()


def mixture_mse(
    prediction: Tensor,
    target: Tensor,
    ignored: Tensor,
    weights: Tensor,
    sigma: float | None = None,
) -> Tensor:
    """masked_mse of k experts: prediction (B, k R, T, A) for target (B, R, T, A), weights (B, k).

    The mean of each chunk's errors under the weights, which sum to 1. With sigma it is the negative
    log-likelihood of their mixture, -2 sigma^2 log sum_k w_k exp(-error_k / (2 sigma^2)): the fewer
    experts explain a chunk, the more of it they get (Jacobs et al. 1991, DOI
    10.1162/neco.1991.3.1.79, eq. 1.3).
    """
    experts = weights.shape[1]
    error = (prediction.unflatten(1, (experts, -1)) - target[:, None]).square()
    error = error.masked_fill(ignored[:, None, ..., None], 0).mean((-2, -1))
    if sigma is None:
        return (weights[..., None] * error).sum(1).mean()
    scale = 2 * sigma**2
    return -scale * torch.logsumexp(weights.log()[..., None] - error / scale, 1).mean()


def load_balance(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Gate probabilities (B, E) -> E sum_e share_e mean p_e, 1 where all are used alike; the shares.

    A share is the part of the samples, of all processes, whose first choice the expert is (Fedus et
    al. 2022, arXiv:2101.03961, eq. 4 to 6, per sample here). Second choices, if counted, let the
    first ones collapse.
    """
    count = probabilities.shape[1]
    first = torch.nn.functional.one_hot(probabilities.argmax(-1), count)
    chosen = reduce(first.sum(0).float(), "sum")
    shares = chosen / chosen.sum()
    balance = count * (shares * probabilities.mean(0)).sum()
    return balance, shares


def router_z(logits: Tensor) -> Tensor:
    """Logits (B, E) -> mean squared log of their partition sums.

    Zoph et al. 2022 (arXiv:2202.08906) eq. 5.
    """
    return logits.logsumexp(-1).square().mean()


def nsvq(z_e: Tensor, zq: Tensor, eps: Tensor) -> Tensor:
    """z_e and its codes zq (B, n, D), Gaussian eps -> z_e plus noise as long as z_e - zq.

    The gradient reaches z_e directly, and the code through the length alone (Vali & Backstrom 2022,
    DOI 10.1109/ACCESS.2022.3147670, eq. 3).
    """
    length = (z_e - zq).norm(dim=-1, keepdim=True)
    return z_e + length * eps / eps.norm(dim=-1, keepdim=True)


def gaussian_kl(
    q: Sequence[Tensor], p: Sequence[Tensor], balance: float = 0.8, free_nats: float = 0.25
) -> tuple[Tensor, Tensor]:
    """KL(q || p) of diagonal Gaussians (mu, logvar), each (B, n, D) -> (loss, KL), nats, float32.

    Both are means over B. `balance` is the share of the gradient that moves p (Hafner et al. 2021,
    arXiv:2010.02193, section 2.2). Below `free_nats` per token the loss is flat (Kingma et al. 2016,
    arXiv:1606.04934, eq. 15, per token here).
    """

    def per_token(mu_q, logvar_q, mu_p, logvar_p):
        distance = (mu_q - mu_p).square()
        return 0.5 * (logvar_p - logvar_q + (logvar_q.exp() + distance) / logvar_p.exp() - 1).sum(
            -1
        )

    with torch.autocast(q[0].device.type, enabled=False):
        q = [x.float() for x in q]
        p = [x.float() for x in p]
        moves_p = per_token(*(x.detach() for x in q), *p)
        moves_q = per_token(*q, *(x.detach() for x in p))
        loss = balance * moves_p.clamp(min=free_nats)
        loss = loss + (1 - balance) * moves_q.clamp(min=free_nats)
        kl = moves_p.detach().sum(-1).mean()
        return loss.sum(-1).mean(), kl


def unit_kl(q: Sequence[Tensor]) -> Tensor:
    """KL(q || N(0, I)) of a diagonal Gaussian q (mu, logvar), each (B, n, D) -> mean over B, nats."""
    with torch.autocast(q[0].device.type, enabled=False):
        mu, logvar = (x.float() for x in q)
        nats = 0.5 * (mu.square() + logvar.exp() - 1 - logvar)
        return nats.flatten(1).sum(1).mean()


def transport_plan(cost: Tensor, eps: Tensor, iterations: int = 100, anneal: float = 0.7) -> Tensor:
    """cost (..., n, m), eps () -> entropic transport plan between uniform weights, no gradient.

    Log-domain Sinkhorn (Peyre & Cuturi 2019, arXiv:1803.00567, section 4.4) with eps annealed from
    the largest cost by `anneal` per iteration. It ends on a row update, so that rows sum to 1/n
    exactly, and columns to 1/m at convergence.
    """
    cost = cost.detach().float()
    n, m = cost.shape[-2:]
    log_n = -torch.tensor(n).log()
    log_m = -torch.tensor(m).log()
    f = cost.new_zeros(*cost.shape[:-1], 1)
    start = cost.amax()
    for k in range(iterations):
        now = torch.maximum(start * anneal**k, eps)
        g = -now * torch.logsumexp((f - cost) / now + log_n, -2, keepdim=True)
        f = -now * torch.logsumexp((g - cost) / now + log_m, -1, keepdim=True)
    return ((f + g - cost) / now + log_n + log_m).exp()


def kot(
    predicted: Tensor,
    expert: Tensor,
    state: Tensor,
    lam_state: float = 2.0,
    blur: float = 0.05,
    iterations: int = 100,
    solver: str = "sinkhorn",
    weight: float = 1.0,
    ignored: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """K-OT: weighted transport cost between predicted and demonstrated (state, chunk) pairs, scalars.

    predicted, expert (B, ..., T, A), state (B, S), ignored (B, T): steps that count as equal. The
    cost is C_ij = mean |a_hat_i - a_j|^2 + lam_state mean |s_i - s_j|^2. `sinkhorn` is the debiased
    divergence OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 (Feydy et al. 2019, arXiv:1810.08278) with
    eps = blur median(C); `exact` the optimal assignment. Plans are detached (envelope theorem), so
    that gradients reach `predicted` through C only. float32 throughout.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        if ignored is not None:
            ignored = ignored.view(len(state), *[1] * (predicted.ndim - 3), -1, 1)
            predicted = predicted.masked_fill(ignored, 0)
            expert = expert.masked_fill(ignored, 0)
        x = predicted.float().flatten(1)
        y = expert.float().flatten(1)
        s = state.float().flatten(1)

        state_cost = lam_state * mean_squares(s, s)
        cost = mean_squares(x, y) + state_cost
        if solver == "exact":
            plan = assignment(cost.detach())
            loss = (plan * cost).sum()
        else:
            within_x = mean_squares(x, x) + state_cost
            within_y = mean_squares(y, y) + state_cost
            costs = torch.stack([cost, within_x, within_y])
            eps = blur * cost.detach().median() + torch.finfo(torch.float32).tiny
            plans = transport_plan(costs, eps, iterations)
            entropy = torch.xlogy(plans, plans * plans.shape[-1] ** 2).sum((-2, -1))
            ot = (plans * costs).sum((-2, -1)) + eps * entropy
            loss = ot[0] - 0.5 * (ot[1] + ot[2])
            plan = plans[0]
        scalars = {"kot": loss.detach(), "kot_identity": plan.diagonal().sum().detach()}
        return weight * loss, scalars


def mean_squares(a: Tensor, b: Tensor) -> Tensor:
    """a (n, D), b (m, D) -> (n, m): squared distances divided by D."""
    of_a = a.square().sum(-1)
    of_b = b.square().sum(-1)
    squares = of_a[:, None] + of_b[None] - 2 * a @ b.T
    return squares.clamp(min=0) / a.shape[1]


def assignment(cost: Tensor) -> Tensor:
    """cost (n, n) -> the plan (n, n) of the cheapest one-to-one assignment, computed on the host."""
    from scipy.optimize import linear_sum_assignment  # a slow import that few runs need

    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    plan = torch.zeros_like(cost)
    plan[rows, columns] = 1 / len(cost)
    return plan
