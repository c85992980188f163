"""The mathematics of the objectives as pure functions. Time runs from t = 0 (noise x0) to t = 1 (data x1)."""

import torch
from accelerate.utils import reduce
from torch import Tensor

from common.config import ConfigError
from common.noise import Noise


def sample_time(u: Tensor) -> Tensor:
    """Uniform u -> t ~ Beta(1, 1.5), clamped to 0.999: density proportional to (1 - t)^0.5, more weight near the noise.

    The mirror image of pi0's schedule (Black et al. 2024, arXiv:2410.24164, appendix B), which runs from data to noise.
    """
    return (1 - u.pow(2 / 3)).clamp(max=0.999)


def ramp(progress: float, share: float) -> float:
    """0 to 1 over the first `share` of the run; progress is the share of its steps that are done."""
    return min(progress / share, 1.0) if share else 1.0


def camera_drop(noise: Noise, batch: int, cameras: int, probability: float) -> Tensor:
    """(B, cameras) bool: with `probability` one camera of a sample is hidden, never its only one."""
    u = noise.uniform(batch, 2)
    chosen = (u[:, 1] * cameras).long()[:, None] == torch.arange(cameras, device=u.device)
    return chosen & (u[:, :1] < (probability if cameras > 1 else 0.0))


def linear_path(x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x0, x1 (..., T, A), t (...) -> xt, velocity (..., T, A). Lipman et al. 2023 (arXiv:2210.02747) eq. 22."""
    t = t[..., None, None]
    return (1 - t) * x0 + t * x1, x1 - x0


def given_prefix(u: Tensor, horizon: int, longest: int) -> Tensor:
    """Uniform u (B, R) -> (B, R, T): true for the first d actions, d uniform in 0 .. longest.

    Chunks that continue given actions (Black et al. 2025, arXiv:2512.05964: training-time real-time chunking).
    """
    if longest >= horizon:
        raise ConfigError(
            f"loss.prefix {longest} may leave nothing of a chunk of {horizon} actions"
        )
    return torch.arange(horizon, device=u.device) < (u * (longest + 1)).floor()[..., None]


def masked_mse(prediction: Tensor, target: Tensor, ignored: Tensor) -> Tensor:
    """prediction, target (B, R, T, A), ignored (B, T) or (B, R, T) -> squared error of the others, divided by B R T A.

    The denominator is constant, so micro-steps and processes of equal size add up to the loss of the whole batch.
    """
    ignored = ignored[:, None] if ignored.ndim == 2 else ignored
    return (prediction - target).square().masked_fill(ignored[..., None], 0).mean()


def mixture_mse(
    prediction: Tensor, target: Tensor, ignored: Tensor, weights: Tensor, sigma: float | None = None
):
    """masked_mse of k experts: prediction (B, k R, T, A) for target (B, R, T, A), weights (B, k) that sum to 1.

    The mean of each chunk's errors under the weights; with sigma the negative log-likelihood of their mixture,
    -2 sigma^2 log sum_k w_k exp(-error_k / (2 sigma^2)): the fewer experts explain a chunk, the more of it they get
    (Jacobs et al. 1991, DOI 10.1162/neco.1991.3.1.79, eq. 1.3).
    """
    ignored = ignored[:, None] if ignored.ndim == 2 else ignored
    error = (prediction.unflatten(1, (weights.shape[1], -1)) - target[:, None]).square()
    error = error.masked_fill(ignored[:, None, ..., None], 0).mean((-2, -1))
    if sigma is None:
        return (weights[..., None] * error).sum(1).mean()
    scale = 2 * sigma**2
    return -scale * torch.logsumexp(weights.log()[..., None] - error / scale, 1).mean()


def load_balance(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Gate probabilities (B, E) -> E sum_e share_e mean p_e, which is 1 where experts are used alike, and the shares.

    A share is that of the samples, of all processes, whose first choice the expert is (Fedus et al. 2022,
    arXiv:2101.03961, eq. 4 to 6, per sample here). Second choices, if counted, let the first ones collapse.
    """
    count = probabilities.shape[1]
    first = torch.nn.functional.one_hot(probabilities.argmax(-1), count).sum(0).float()
    shares = reduce(first, "sum")
    shares = shares / shares.sum()
    return count * (shares * probabilities.mean(0)).sum(), shares


def router_z(logits: Tensor) -> Tensor:
    """Logits (B, E) -> mean squared log of their partition sums (Zoph et al. 2022, arXiv:2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().mean()


def nsvq(z_e: Tensor, zq: Tensor, eps: Tensor) -> Tensor:
    """z_e and its codes zq (B, n, D), Gaussian eps -> z_e plus noise as long as z_e - zq.

    The gradient reaches z_e directly, and the code through the length alone (Vali & Backstrom 2022, DOI
    10.1109/ACCESS.2022.3147670, eq. 3).
    """
    return z_e + (z_e - zq).norm(dim=-1, keepdim=True) * eps / eps.norm(dim=-1, keepdim=True)


def gaussian_kl(q, p, balance=0.8, free_nats=0.25) -> tuple[Tensor, Tensor]:
    """KL(q || p) of diagonal Gaussians (mu, logvar), each (B, n, D) -> (loss, KL), means over B in nats, float32.

    `balance` is the share of the gradient that moves the prior (Hafner et al. 2021, arXiv:2010.02193, section 2.2);
    below `free_nats` per token the loss is flat (Kingma et al. 2016, arXiv:1606.04934, eq. 15, per token here).
    """
    with torch.autocast(q[0].device.type, enabled=False):
        (mq, vq), (mp, vp) = ((mu.float(), logvar.float()) for mu, logvar in (q, p))

        def per_token(mq, vq, mp, vp):
            return 0.5 * (vp - vq + (vq.exp() + (mq - mp).square()) / vp.exp() - 1).sum(-1)

        to_prior = per_token(mq.detach(), vq.detach(), mp, vp)
        to_posterior = per_token(mq, vq, mp.detach(), vp.detach())
        loss = balance * to_prior.clamp(min=free_nats) + (1 - balance) * to_posterior.clamp(
            min=free_nats
        )
        return loss.sum(-1).mean(), to_prior.detach().sum(-1).mean()


def unit_kl(q) -> Tensor:
    """KL(q || N(0, I)) of a diagonal Gaussian q (mu, logvar), each (B, n, D) -> (), mean over B in nats, float32."""
    with torch.autocast(q[0].device.type, enabled=False):
        mu, logvar = (x.float() for x in q)
        return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def transport_plan(cost: Tensor, eps: Tensor, iterations=100, anneal=0.7) -> Tensor:
    """cost (..., n, m), eps () -> entropic transport plan between uniform weights, no gradient.

    Log-domain Sinkhorn (Peyre & Cuturi 2019, arXiv:1803.00567, section 4.4) with eps annealed from the largest cost
    by `anneal` per iteration; ends on a row update, so rows sum to 1/n exactly and columns to 1/m at convergence.
    """
    cost = cost.detach().float()
    n, m = cost.shape[-2:]
    log_n, log_m = -torch.tensor(n).log(), -torch.tensor(m).log()
    f, g = cost.new_zeros(*cost.shape[:-1], 1), cost.new_zeros(*cost.shape[:-2], 1, m)
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
    lam_state=2.0,
    blur=0.05,
    iterations=100,
    solver="sinkhorn",
    weight=1.0,
    ignored: Tensor | None = None,
):
    """K-OT: weighted transport cost between predicted and demonstrated (state, chunk) pairs of a batch -> (), scalars.

    predicted, expert (B, ..., T, A), state (B, S), ignored (B, T): steps that count as equal; cost
    C_ij = mean |a_hat_i - a_j|^2 + lam_state * mean |s_i - s_j|^2.
    `sinkhorn`: the debiased divergence OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 (Feydy et al. 2019, arXiv:1810.08278)
    with eps = blur * median(C); `exact`: the optimal assignment. Plans are detached (envelope theorem), so gradients
    reach `predicted` through C only. float32 throughout.
    """
    with torch.autocast(predicted.device.type, enabled=False):
        if ignored is not None:
            ignored = ignored.view(len(state), *[1] * (predicted.ndim - 3), -1, 1)
            predicted, expert = (chunk.masked_fill(ignored, 0) for chunk in (predicted, expert))
        x, y, s = (tensor.float().flatten(1) for tensor in (predicted, expert, state))

        labels = lam_state * mean_squares(s, s)
        across = mean_squares(x, y) + labels
        if solver == "exact":
            plan = _assignment(across.detach())
            loss = (plan * across).sum()
        else:
            costs = torch.stack([across, mean_squares(x, x) + labels, mean_squares(y, y) + labels])
            eps = blur * across.detach().median() + torch.finfo(torch.float32).tiny
            plans = transport_plan(costs, eps, iterations)
            entropy = torch.xlogy(plans, plans * plans.shape[-1] ** 2).sum((-2, -1))
            ot = (plans * costs).sum((-2, -1)) + eps * entropy
            loss, plan = ot[0] - 0.5 * (ot[1] + ot[2]), plans[0]
        identity = plan.diagonal().sum()
        return weight * loss, {"kot": loss.detach(), "kot_identity": identity.detach()}


def mean_squares(a: Tensor, b: Tensor) -> Tensor:
    """a (n, D), b (m, D) -> (n, m): squared distances divided by D."""
    squares = a.square().sum(-1)[:, None] + b.square().sum(-1)[None] - 2 * a @ b.T
    return squares.clamp(min=0) / a.shape[1]


def _assignment(cost):
    from scipy.optimize import linear_sum_assignment  # not paid for by runs without it

    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    plan = torch.zeros_like(cost)
    plan[rows, columns] = 1 / len(cost)
    return plan
