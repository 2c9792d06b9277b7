"""Every response of up to three tokens over a small vocabulary, with its probability, under random policies
that look at the whole prefix."""

import itertools
from dataclasses import dataclass

import torch

from asyncrl.objective.advantages import Outcomes
from asyncrl.objective.make import make_advantage, make_policy_objective
from asyncrl.objective.policy import PolicyTokens

TOKENS, LONGEST, END = 4, 3, 0
SEEDS = range(8)


def responses():
    """All of them: a response goes on until `END`, or is cut off."""
    for length in range(1, LONGEST + 1):
        for head in itertools.product(range(1, TOKENS), repeat=length - 1):
            yield from ((*head, last) for last in range(TOKENS) if last == END or length == LONGEST)


RESPONSES = list(responses())
PREFIXES = {prefix: i for i, prefix in enumerate(sorted({r[:t] for r in RESPONSES for t in range(len(r))}))}
FLAT = [(s, PREFIXES[r[:t]], r[t]) for s, r in enumerate(RESPONSES) for t in range(len(r))]
SEQUENCE, PREFIX, TOKEN = (torch.tensor(column) for column in zip(*FLAT, strict=True))
LENGTHS = torch.tensor([len(r) for r in RESPONSES])
EVERYTHING = torch.ones(len(FLAT), dtype=torch.bool)


@dataclass
class World:
    """Policies as tables of log-probabilities: float64[prefixes, tokens]; pi is softmax(theta)."""

    theta: torch.Tensor
    mu: torch.Tensor
    ref: torch.Tensor
    rewards: torch.Tensor

    @property
    def pi(self):
        return self.theta.log_softmax(-1)


def world(seed, distance=0.0):
    """`distance`: what is added to the logits of mu, in standard deviations of a normal distribution."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731
    shape = (len(PREFIXES), TOKENS)
    theta = normal(*shape)
    mu = (theta + distance * normal(*shape)).log_softmax(-1)
    return World(
        theta.requires_grad_(), mu, (theta.detach() + normal(*shape)).log_softmax(-1), normal(len(RESPONSES))
    )


def of_tokens(table):
    return table[PREFIX, TOKEN]


def of_responses(values):
    """Sums over each response's tokens."""
    return torch.zeros(len(RESPONSES), dtype=torch.float64).index_add(0, SEQUENCE, values)


def probabilities(table):
    return of_responses(of_tokens(table)).exp()


def gradient(w, value):
    return torch.autograd.grad(value, w.theta, retain_graph=True)[0]


def expected_return(w):
    return (probabilities(w.pi) * w.rewards).sum()


def tokens_of(w, advantages):
    logprobs = of_tokens(w.pi)
    return PolicyTokens(
        logprobs,
        logprobs.detach(),
        of_tokens(w.mu),
        advantages,
        EVERYTHING,
        SEQUENCE,
        torch.zeros_like(SEQUENCE),
        kept=EVERYTHING,
    )


def gradients(w, name, advantages=None, **settings):
    """float64[responses, parameters]: of -loss, summed over each response's tokens, at the first update."""
    tokens = tokens_of(w, w.rewards[SEQUENCE] if advantages is None else advantages)
    losses = of_responses(make_policy_objective(name, settings).loss(tokens).loss)
    each = [torch.autograd.grad(-loss, w.theta, retain_graph=True)[0] for loss in losses]
    return torch.stack(each).flatten(1)


def bias_and_variance(w, name, **settings):
    """Of one response's gradient under mu: |mean - exact| / |exact|, and E|g - mean|² / |exact|²."""
    exact = gradient(w, expected_return(w)).flatten()
    each, p = gradients(w, name, **settings), probabilities(w.mu)[:, None]
    mean = (p * each).sum(0)
    variance = (p * (each - mean).square()).sum()
    return float((mean - exact).norm() / exact.norm()), float(variance / exact.norm() ** 2)


def nats_a_token(w):
    """KL(mu ‖ pi) of responses, over their mean length."""
    p = probabilities(w.mu)
    return float((p * of_responses(of_tokens(w.mu - w.pi.detach()))).sum() / (p * LENGTHS).sum())


def scores(w):
    """float64[responses, parameters]: of log pi."""
    return gradients(w, "reinforce", torch.ones(len(FLAT), dtype=torch.float64))


def expected_over_groups(w, name, size=2, **settings):
    """The mean gradient per response of all groups of `size`, drawn under pi."""
    p = probabilities(w.pi.detach())
    groups = torch.cartesian_prod(*[torch.arange(len(RESPONSES))] * size).view(-1, size)
    at = groups.flatten()
    ids = torch.arange(len(groups)).repeat_interleave(size)
    fresh = torch.zeros(len(at), dtype=torch.float64)
    advantages = make_advantage(name, settings)(Outcomes(w.rewards[at], ids, LENGTHS[at], fresh))
    weights = p[groups].prod(1).repeat_interleave(size) * advantages / size
    return torch.zeros_like(p).index_add(0, at, weights) @ scores(w)


def right_or_wrong(seed):
    """A world of rewards 0 and 1, its success rate, and the gradient of that."""
    w = world(seed)
    w.rewards = (w.rewards > 0.3).double()
    rate = expected_return(w)
    return w, rate.item(), gradient(w, rate).flatten()


def starts_with():
    return [
        torch.tensor([r[: len(prefix)] == prefix and len(r) > len(prefix) for r in RESPONSES])
        for prefix in PREFIXES
    ]


def sequence_kl(w):
    return (probabilities(w.pi) * of_responses(of_tokens(w.pi - w.ref))).sum()


def kl_at_fixed_prefixes(w):
    """Sum over the prefixes of the KL there, times how often pi comes by, which is held fixed."""
    p = probabilities(w.pi.detach())
    visits = torch.zeros(len(PREFIXES), dtype=torch.float64).index_add(0, PREFIX, p[SEQUENCE])
    # Every response that passes a prefix counts there once.
    return (visits * (w.pi.exp() * (w.pi - w.ref)).sum(-1)).sum()
