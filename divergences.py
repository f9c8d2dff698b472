"""How far is a policy from a demonstrator, and which reward brings it closer?

Every alignment-from-demonstrations method minimises a divergence between beta, the demonstrator,
and pi, the policy, both distributions over whole responses y. Everything here is a function of

    h = log beta(y) - log pi(y)        the log-ratio, in nats per sequence;  u = e^h

Two KLs, two behaviours (kl(log_p, log_q) is always KL(p || q); F.kl_div reverses its arguments):

    forward KL(beta || pi)   supervised fine-tuning; the policy must cover everything
    reverse KL(pi || beta)   adversarial imitation; the policy must write nothing foreign

**Why the discriminator's logit is the reward**, in ten lines:
 1. Train D = sigmoid(h) to tell demonstrations (label 1) from the policy's samples (label 0).
 2. At one y the gain is  beta log D + pi log(1 - D);  its slope in h is  beta (1 - D) - pi D.
 3. It vanishes at  D* = beta / (beta + pi),  so  h* = log D* - log(1 - D*) = log beta - log pi.
    (arXiv:2405.15624 prints log pi - log beta in the reverse KL's reward; this sign is right.)
 4. Any f-divergence is  D_f(beta || pi) = sum_y pi f(u)  for a convex f with f(1) = 0.
 5. A little more pi at y changes it by  d/dpi [pi f(beta / pi)] = f(u) - u f'(u) = -r.
 6. So  r = u f'(u) - f(u) = f*(f'(u)),  with f* the convex conjugate and T* = f'(u).
 7. Through the parameters:  grad D_f = -sum_y r grad pi = -E_pi[r grad log pi]:
    the policy gradient of r, *held constant*, is exactly -grad D_f.
 8. Reverse KL has f = -log u, hence r = h - 1: the logit itself; constants drop out of line 7,
    since E_pi[grad log pi] = 0.
 9. Forward KL has f = u log u, hence r = u, and E_pi[u grad log pi] = E_beta[grad log pi]: SFT.
10. For the other five only r(h) changes: the table below.

**Why r is held constant.** Line 5 has counted how r depends on pi. The code maximises r log pi: a
missing detach adds E_pi[log pi grad r]. In reverse KL that is the gradient of the entropy, and the
optimum moves from beta to beta^(1/2), in forward KL to beta (1 - log pi), both normalised.

**Why r is not kept fixed.** It is the slope at today's pi. Kept for many steps, E_pi[r] is linear
in pi: the best pi writes argmax r alone. So either refresh the discriminator as pi moves, or hold
pi back: max E_pi[r] - KL(pi || pi_0) with r = log beta - log pi_0 has its optimum at beta.

**Where pi is zero.** A mean of f(u) over samples of pi is an unbiased estimate of D_f, and E_pi[u]
is 1, only where pi > 0 wherever beta > 0: no sample shows what pi misses. With beta = (1/2, 0,
1/2), pi = (1/2, 1/2, 0) the Hellinger row has E_pi[f(u)] = 1/2 and D_f = 1: see f_divergence.

**A caution: FAIRL.** Its published reward -h e^h (arXiv:1911.02256) is -f(u) of the forward KL, not
e^h. Near pi = beta that is 1 - u where u is right: it points exactly the wrong way.

Shapes: N samples or sequences, always last; batch dimensions come first. Logarithms are natural;
-inf is probability zero. An exponent is cut at log(largest float) - 8, 80.7 in float32. Beyond it
e^x stays at that ceiling with gradient zero, so that no |h| up to 2,000 gives inf or nan.
"""

import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F


# ---- the table ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Divergence:
    """One f-divergence D_f(beta || pi) = E_pi[f(u)]; its functions take h = log u, elementwise."""
    name: str                    # as in DIVERGENCES and in the figures' colours
    label: str                   # for people
    f: Callable                  # h -> f(u), with f(1) = 0
    f_prime: Callable            # h -> f'(u) = T*, the best witness in the variational bound
    conjugate: Callable          # t -> f*(t) = sup over u >= 0 of u t - f(u); inf where it is
    reward: Callable             # h -> r = f*(f'(u)), up to a constant
    f_at_zero: float             # f(0): the price of policy mass where beta has none
    dual: str                    # f(u)/u is the dual's f at 1/u: D_f(beta||pi) = D_dual(pi||beta)


def _cut(x, share=1.0):
    """x, at most `share` of the largest exponent whose e^x is finite with room for a sum."""
    return x.clamp(max=share * (math.log(torch.finfo(x.dtype).max) - 8))


def _exp(x):
    return torch.exp(_cut(x))


def _expm1(x):
    """e^x - 1, exact also near x = 0, where e^x - 1 would lose every digit."""
    return torch.expm1(_cut(x))


def _square_expm1(x):
    return torch.expm1(_cut(x, share=0.5)).square()


def _xtanh_logcosh(x):
    """x tanh x - log cosh x: at x = h/2 Jensen-Shannon's f(u) / (u + 1), exact also near 0."""
    return x * torch.tanh(x) - torch.log1p(2 * torch.sinh(x / 2).square())


def _conjugate_below(t, bound, formula):
    """formula(t) for t < bound and +inf beyond, without a nan in value or gradient."""
    inside = t < bound
    return torch.where(inside, formula(torch.where(inside, t, bound - 1)), torch.inf)


LOG2 = math.log(2)
REVERSE_KL = Divergence(                       # AIRL, AfD. f(u) = -log u
    name="reverse_kl", label="reverse KL",
    f=lambda h: -h,
    f_prime=lambda h: -_exp(-h),
    conjugate=lambda t: _conjugate_below(t, 0.0, lambda t: -1 - torch.log(-t)),
    reward=lambda h: h,
    f_at_zero=math.inf, dual="forward_kl")

FORWARD_KL = Divergence(                       # SFT. f(u) = u log u
    name="forward_kl", label="forward KL",
    # -inf (a sample that beta never writes) becomes the lowest float, so that 0 * h is 0
    f=lambda h: h.clamp(min=torch.finfo(h.dtype).min) * _exp(h),
    f_prime=lambda h: h + 1,
    conjugate=lambda t: _exp(t - 1),
    reward=lambda h: _exp(h),
    f_at_zero=0.0, dual="reverse_kl")

# GAIL. f(u) = u log u - (u + 1) log((u + 1)/2): *twice* the Jensen-Shannon divergence, from 0 to
# 2 log 2. As written f cancels near u = 1. The factor that is used is log 2 from |h| = 20 on.
JENSEN_SHANNON = Divergence(
    name="jensen_shannon", label="Jensen-Shannon",
    f=lambda h: (1 + _exp(h)) * _xtanh_logcosh(_cut(h.abs(), share=0.25) / 2),
    f_prime=lambda h: -torch.log1p(_expm1(-h) / 2),
    conjugate=lambda t: _conjugate_below(t, LOG2, lambda t: -torch.log1p(-torch.expm1(t))),
    reward=lambda h: -F.logsigmoid(-h),                 # -log(1 - D) = softplus(h)
    f_at_zero=LOG2, dual="jensen_shannon")

# f(u) = |u - 1| / 2. Not differentiable at u = 1: there f' and r take the middle value, 0.
TOTAL_VARIATION = Divergence(
    name="total_variation", label="total variation",
    f=lambda h: _expm1(h).abs() / 2,
    f_prime=lambda h: h.sign() / 2,
    conjugate=lambda t: torch.where(t <= 0.5, t.clamp(min=-0.5), torch.inf),
    reward=lambda h: h.sign() / 2,
    f_at_zero=0.5, dual="total_variation")

PEARSON_CHI2 = Divergence(                     # f(u) = (u - 1)^2
    name="pearson_chi2", label="Pearson chi2",
    f=_square_expm1,
    f_prime=lambda h: 2 * _expm1(h),
    conjugate=lambda t: t.clamp(min=-2) + t.clamp(min=-2).square() / 4,
    reward=lambda h: _expm1(2 * h),
    f_at_zero=1.0, dual="neyman_chi2")

NEYMAN_CHI2 = Divergence(                      # f(u) = (1 - u)^2 / u = 4 sinh(h/2)^2
    name="neyman_chi2", label="Neyman chi2",
    f=lambda h: 4 * torch.sinh(_cut(h.abs()) / 2).square(),
    f_prime=lambda h: -_expm1(-2 * h),
    # f* is 2 - 2 sqrt(1 - t), whose digits cancel near 0; the clamp keeps nan from its gradient
    conjugate=lambda t: torch.where(
        t <= 1, 2 * t / (1 + torch.sqrt((1 - t).clamp(min=torch.finfo(t.dtype).tiny))), torch.inf),
    reward=lambda h: -2 * _expm1(-h),
    f_at_zero=math.inf, dual="pearson_chi2")

SQUARED_HELLINGER = Divergence(                # f(u) = (sqrt(u) - 1)^2
    name="squared_hellinger", label="squared Hellinger",
    f=lambda h: _square_expm1(h / 2),
    f_prime=lambda h: -_expm1(-h / 2),
    conjugate=lambda t: _conjugate_below(t, 1.0, lambda t: t / (1 - t)),
    reward=lambda h: _expm1(h / 2),
    f_at_zero=1.0, dual="squared_hellinger")

DIVERGENCES = {d.name: d for d in (REVERSE_KL, FORWARD_KL, JENSEN_SHANNON, TOTAL_VARIATION,
                                   PEARSON_CHI2, NEYMAN_CHI2, SQUARED_HELLINGER)}


def fairl_reward(h):
    """-h e^h, FAIRL's published reward (arXiv:1911.02256), to be looked at and not to be used."""
    return -h * _exp(h)


# ---- exact, where every sequence can be listed --------------------------------------------------

def kl(log_p, log_q):
    """KL(p || q) = sum_y p(y) [log p(y) - log q(y)], in nats.

    log_p, log_q: (..., N) log-probabilities of the same N outcomes. Returns (...). Outcomes with
    p = 0 count nothing, whatever q is; p > 0 where q = 0 gives inf.
    """
    support = log_p > -torch.inf
    # masked before the subtraction: -inf - -inf is nan, and nan * 0 would stay in the gradient
    log_ratio = torch.where(support, log_p, 0.0) - torch.where(support, log_q, 0.0)
    return (log_p.exp() * log_ratio).sum(-1)


def forward_kl(log_beta, log_pi):
    """KL(beta || pi): the policy must cover the demonstrator. Shapes as in kl."""
    return kl(log_beta, log_pi)


def reverse_kl(log_beta, log_pi):
    """KL(pi || beta): the policy must stay within the demonstrator. Shapes as in kl."""
    return kl(log_pi, log_beta)


def f_divergence(divergence, log_beta, log_pi):
    """D_f(beta || pi) = sum_y pi(y) f(beta(y) / pi(y)), in the divergence's own unit.

    log_beta, log_pi: (..., N) log-probabilities of the same N outcomes. Returns (...). Where only
    pi has mass, it costs f(0) per unit; where only beta has, lim f(u)/u = f_dual(0); 0 * inf is 0.
    """
    dual = DIVERGENCES[divergence.dual]
    foreign, missed = log_beta == -torch.inf, log_pi == -torch.inf
    one_sided = foreign | missed
    h = torch.where(one_sided, 0.0, log_beta) - torch.where(one_sided, 0.0, log_pi)
    pi, beta = log_pi.exp(), log_beta.exp()
    # where u > 1 write pi f(u) = beta f_dual(1/u): a pi that underflows then keeps its right price
    terms = torch.where(h <= 0, pi * divergence.f(h.clamp(max=0)), beta * dual.f(-h.clamp(min=0)))
    return (terms.sum(-1) + _price(torch.where(foreign, pi, 0.0).sum(-1), divergence.f_at_zero)
            + _price(torch.where(missed, beta, 0.0).sum(-1), dual.f_at_zero))


def _price(mass, price):
    """mass * price with 0 * inf = 0, also in the gradient, where a product would leave a nan."""
    if math.isinf(price):
        return torch.where(mass > 0, torch.inf, 0.0)
    return mass * price


# ---- the objectives -----------------------------------------------------------------------------

def _expectation(x, weights):
    """Mean over the last dimension, or the sum under `weights`, probabilities of all outcomes."""
    return x.mean(-1) if weights is None else (weights * x).sum(-1)


def sft_loss(logp):
    """-mean_t log pi(y_t|s_t), nats per token: supervised fine-tuning, and pretraining.

    logp: (n,) log-probabilities of the demonstrations' response tokens. Summed over a response this
    is -log pi(y|x), whose mean over demonstrations is KL(beta || pi) plus a constant. A scalar.
    """
    return -logp.mean()


def discriminator_loss(h_demo, h_policy, weights_demo=None, weights_policy=None):
    """-E_beta[log D] - E_pi[log(1 - D)] with D = sigmoid(h): high logits for demonstrations.

    Least at h* = log beta - log pi, where it is 2 log 2 (chance) less the Jensen-Shannon row's
    D_f. h_demo, h_policy: (..., N) logits of positives and of negatives. Returns (...), nats
    per pair of samples. Source: Goodfellow et al., arXiv:1406.2661, section 4.1.
    """
    return (_expectation(-F.logsigmoid(h_demo), weights_demo)
            + _expectation(-F.logsigmoid(-h_policy), weights_policy))


def bradley_terry_loss(reward_preferred, reward_other):
    """-E[log sigmoid(r+ - r-)], nats per pair: the preferred response shall earn more.

    Both (N,), rewards of two responses to one prompt; log 2 is chance, and a constant added to both
    changes nothing. Source: Bradley and Terry 1952. Returns a scalar.
    """
    return F.softplus(reward_other - reward_preferred).mean()


def dpo_loss(log_ratio_preferred, log_ratio_other, dpo_beta):
    """Bradley-Terry on the implicit reward r = dpo_beta (log pi - log pi_ref)(y|x), nats per pair.

    r is the reward of which pi is the optimum under a KL penalty to pi_ref: the policy is its own
    reward model. log_ratio: (N,) log pi(y|x) - log pi_ref(y|x). On labelled pairs it is DPO
    (arXiv:2305.18290, Eq. 7); on demonstrations against pi_ref's samples SPIN (arXiv:2401.01335).
    """
    return bradley_terry_loss(dpo_beta * log_ratio_preferred, dpo_beta * log_ratio_other)


def policy_surrogate(divergence, h, logp_seq, weights=None, baseline=0.0):
    """Maximise E_pi[(r(h) - baseline) log pi(y)], r held constant: its gradient is -grad D_f.

    h: (..., N) log-ratios, or a discriminator's logits, at y ~ pi; logp_seq: (..., N) log pi(y);
    weights: (..., N) pi(y) of an enumeration. A baseline, which must not depend on y,
    reduces the variance and keeps the mean. Returns (...).
    """
    # r is detached: how it depends on pi is already counted in r = u f' - f (line 5 above). So are
    # the weights: the score function grad log pi accounts for the sampling distribution.
    advantage = (divergence.reward(h) - baseline).detach()
    return _expectation(advantage * logp_seq, None if weights is None else weights.detach())


def leave_one_out(returns):
    """(P, K, ...) returns of K samples of each of P prompts: each minus the mean of the other K-1.

    The mean of others does not depend on the sample's own actions, so it takes variance and adds no
    bias. Source: Kool et al. 2019; Ahmadian et al., arXiv:2402.14740.
    """
    return returns - (returns.sum(1, keepdim=True) - returns) / (returns.shape[1] - 1)


def policy_gradient_loss(logp, logp_ref, rewards, mask, kl_coef, k):
    """-mean_y sum_t A_t log pi(a_t|s_t), with the gradient of kl_coef KL(pi || pi_ref) - E_pi[r].

    logp, logp_ref: (B, T) nats per token of samples y ~ pi, zero outside the response; rewards:
    (B, T); mask: (B, T), true at response tokens. A prompt's k samples stand together. The return
    from t on is G_t = sum_{t'>=t} r_t' - kl_coef (log pi - log pi_ref)_t', and A_t is G_t less its
    leave-one-out baseline. Returns a scalar. Source: REINFORCE, Williams 1992.
    """
    # log pi within the return is part of the reward, which is held constant: hence the detach.
    per_token = rewards - kl_coef * (logp.detach() - logp_ref)
    returns = per_token.flip(1).cumsum(1).flip(1)       # an action earns only what comes after it
    advantage = leave_one_out(returns.unflatten(0, (-1, k))).flatten(0, 1)
    return -(advantage * logp * mask).sum() / len(mask)
