"""Log-probs, entropies and KLs against torch.distributions, numerical integration and sampling."""

import itertools
import math

import pytest
import torch
from torch.distributions import (
    AffineTransform,
    Categorical,
    Independent,
    MultivariateNormal,
    Normal,
    TanhTransform,
    TransformedDistribution,
    kl_divergence,
)

from vla_rl.heads import (
    BinnedCategorical,
    ChunkGaussian,
    DiagonalGaussian,
    FlowChain,
    SquashedGaussian,
)

B, A = 4, 3
LOW, HIGH = torch.tensor([-1.0, -2.0, 0.0]), torch.tensor([1.0, 3.0, 0.5])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(seed=0, *, size=A, scale=1.0):
    g = generator(seed)
    return DiagonalGaussian(torch.randn(B, size, generator=g), scale * (0.3 + torch.rand(B, size, generator=g)))


def squashed(seed=0, **kwargs):
    return SquashedGaussian(gaussian(seed, **kwargs), LOW, HIGH)


def squashed_by_torch(distribution):
    base = Normal(distribution.base.mean, distribution.base.std)
    transforms = [TanhTransform(), AffineTransform(distribution.centre, distribution.half)]
    return Independent(TransformedDistribution(base, transforms), 1)


def chunk_gaussian(seed=0, *, smoothness=0.7):
    base = gaussian(seed, size=4 * A)
    return ChunkGaussian(base.mean, base.std, chunk=4, smoothness=smoothness)


def chunk_by_torch(distribution, smoothness):
    steps, size = distribution.chunk, distribution.mean.shape[-1]
    covariance = torch.zeros(B, size, size)
    for i, j in itertools.product(range(size), repeat=2):
        if i % A == j % A:  # the same action dimension
            correlation = smoothness ** abs(i // A - j // A)
            covariance[:, i, j] = correlation * distribution.std[:, i] * distribution.std[:, j]
    assert size == steps * A
    return MultivariateNormal(distribution.mean, covariance)


def binned(seed=0, *, bins=5):
    return BinnedCategorical(torch.randn(B, A, bins, generator=generator(seed)), LOW, HIGH)


def field(seed=0, *, size=A):
    """A smooth velocity that depends on x and t: what a network would be."""
    g = generator(seed)
    first, second = torch.randn(size, size, generator=g), torch.randn(size, generator=g)
    return lambda x, time: torch.tanh(x @ first + second * time) - 0.5 * x


def flow_chain(seed=0, *, steps=3, size=A, batch=B):
    std = 0.2 + torch.rand(steps, size, generator=generator(seed + 50))
    return FlowChain(field(seed, size=size), std, batch=batch)


def repeated(distribution, times):
    """The same distribution `times` times over, as one batch."""
    if isinstance(distribution, FlowChain):
        return FlowChain(distribution.velocity, distribution.std, batch=times)
    if isinstance(distribution, SquashedGaussian):
        return SquashedGaussian(repeated(distribution.base, times), LOW, HIGH)
    if isinstance(distribution, BinnedCategorical):
        return BinnedCategorical(distribution.log_probs[:1].expand(times, -1, -1), LOW, HIGH)
    mean, std = distribution.mean[:1].expand(times, -1), distribution.std[:1].expand(times, -1)
    if isinstance(distribution, ChunkGaussian):
        return ChunkGaussian(mean, std, chunk=4, smoothness=0.7)
    return DiagonalGaussian(mean, std)


@pytest.mark.parametrize(
    "make", [squashed, chunk_gaussian, binned, flow_chain, lambda seed=0: squashed(seed, scale=1.2)]
)
def test_entropy_and_kl_are_those_of_the_samples(make):
    """Monte Carlo over 100,000 samples of the first row, to five standard errors (and 2e-3 for the quadrature)."""
    torch.manual_seed(0)
    first, second = repeated(make(0), 100_000), repeated(make(1), 100_000)
    samples = first.sample()
    log_probs, others = first.log_prob(samples), second.log_prob(samples)
    error = 5 * float(log_probs.std()) / math.sqrt(100_000) + 2e-3
    assert float(first.entropy()[0]) == pytest.approx(-float(log_probs.mean()), abs=error)
    ratio = log_probs - others
    error = 5 * float(ratio.std()) / math.sqrt(100_000)
    assert float(first.kl(second).mean()) == pytest.approx(float(ratio.mean()), abs=max(error, 1e-6))
    torch.testing.assert_close(first.kl(first), torch.zeros_like(first.kl(first)), atol=1e-5, rtol=0)
    assert first.entropy().shape == first.kl(second).shape == (100_000,)


def test_a_squashed_gaussian_is_that_of_torch():
    distribution = squashed()
    torch.manual_seed(0)
    samples = distribution.sample()
    assert ((samples > LOW) & (samples < HIGH)).all()
    torch.testing.assert_close(distribution.log_prob(samples), squashed_by_torch(distribution).log_prob(samples))
    torch.testing.assert_close(distribution.kl(squashed(1)), distribution.base.kl(squashed(1).base))


def test_a_squashed_density_integrates_to_one():
    """In two dimensions, on a grid that is even before squashing, so that the density's rise at the bounds is seen."""
    base = DiagonalGaussian(torch.tensor([[0.4, -1.0]]), torch.tensor([[0.7, 1.5]]))
    distribution = SquashedGaussian(base, LOW[:2], HIGH[:2])
    edges = torch.tanh(torch.linspace(-7, 7, 801).double())
    middles, widths = (edges[1:] + edges[:-1]) / 2, edges.diff()
    points = torch.cartesian_prod(middles, middles) * distribution.half + distribution.centre
    areas = torch.cartesian_prod(widths, widths).prod(-1) * distribution.half.prod()
    assert float((distribution.log_prob(points.float()).exp() * areas).sum()) == pytest.approx(1, abs=2e-3)


def test_the_squashing_keeps_its_digits_far_out():
    """At u = 6 the slope is 2.5e-5: float32's 1 - tanh(u)^2 has lost half of its digits there."""
    u = torch.tensor([[6.0]])
    narrow = SquashedGaussian(DiagonalGaussian(u, torch.ones(1, 1)), -torch.ones(1), torch.ones(1))
    slope = 1 / math.cosh(6.0) ** 2
    assert float(narrow._log_slope(u)) == pytest.approx(math.log(slope), rel=1e-6)
    assert torch.isfinite(narrow.log_prob(torch.tensor([[1.0]]))).all()  # a sample that tanh has rounded to the bound


def test_a_chunk_is_a_gaussian_with_the_stated_covariance():
    first, second = chunk_gaussian(0), chunk_gaussian(1, smoothness=0.2)
    ours, theirs = chunk_by_torch(first, 0.7), chunk_by_torch(second, 0.2)
    actions = torch.randn(B, 4 * A, generator=generator(5))
    torch.testing.assert_close(first.log_prob(actions), ours.log_prob(actions), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.entropy(), ours.entropy(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.kl(second), kl_divergence(ours, theirs), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    samples = repeated(first, 100_000).sample()
    torch.testing.assert_close(samples.T.cov(), ours.covariance_matrix[0], atol=0.03, rtol=0)


@pytest.mark.parametrize(("smoothness", "variance"), [(0.0, 2.0), (0.5, 3.0)])
def test_smooth_noise_adds_up_over_a_chunk(smoothness, variance):
    """Two steps of standard deviation 1 that correlate by s: the variance of their sum is 2 + 2 s."""
    torch.manual_seed(0)
    zeros, ones = torch.zeros(50_000, 2), torch.ones(50_000, 2)
    samples = ChunkGaussian(zeros, ones, chunk=2, smoothness=smoothness).sample()
    assert float(samples.sum(-1).var()) == pytest.approx(variance, rel=0.03)


def test_bins_are_a_categorical_and_their_probabilities_sum_to_one():
    distribution = binned()
    width = (HIGH - LOW) / 5
    everything = torch.tensor(list(itertools.product(range(5), repeat=A)))
    log_probs = torch.stack([distribution.log_prob((LOW + (bins + 0.5) * width).expand(B, -1)) for bins in everything])
    torch.testing.assert_close(log_probs.exp().sum(0), torch.ones(B))
    reference = Independent(Categorical(logits=distribution.log_probs), 1)
    torch.testing.assert_close(log_probs[7], reference.log_prob(everything[7].expand(B, -1)))
    torch.testing.assert_close(distribution.entropy(), reference.entropy())
    other = Independent(Categorical(logits=binned(1).log_probs), 1)
    torch.testing.assert_close(distribution.kl(binned(1)), kl_divergence(reference, other))


def test_bins_by_hand():
    """Four bins of width .5 over [-1, 1]; the mode is the centre of the likeliest, what lies beyond is outermost."""
    logits = torch.zeros(1, 1, 4)
    logits[0, 0, 2] = 1.0
    distribution = BinnedCategorical(logits, torch.tensor([-1.0]), torch.tensor([1.0]))
    assert distribution.mode.tolist() == [[0.25]]
    actions = torch.tensor([[-3.0], [-0.51], [-0.49], [0.2], [1.0], [9.0]])
    assert distribution.bins(actions).squeeze(-1).tolist() == [0, 0, 1, 2, 3, 3]
    torch.manual_seed(0)
    drawn = torch.cat([distribution.sample() for _ in range(4000)]).flatten()
    shares = [float((drawn == centre).float().mean()) for centre in (-0.75, -0.25, 0.25, 0.75)]
    assert shares == pytest.approx(logits.softmax(-1).flatten().tolist(), abs=0.03)


def test_a_chain_is_a_product_of_gaussians():
    distribution = flow_chain()
    torch.manual_seed(0)
    flat = distribution.sample()
    chain = flat.unflatten(-1, (4, A))
    expected = Independent(Normal(0, torch.ones(A)), 1).log_prob(chain[:, 0])
    velocity = field()
    for k in range(3):
        mean = chain[:, k] + velocity(chain[:, k], torch.tensor(k / 3)) / 3
        expected = expected + Independent(Normal(mean, distribution.std[k].expand(B, -1)), 1).log_prob(chain[:, k + 1])
    torch.testing.assert_close(distribution.log_prob(flat), expected)


def test_a_chain_density_integrates_to_one():
    """One Euler step in one dimension: over the plane of (x_0, x_1)."""
    grid = torch.linspace(-6, 6, 401)
    points = torch.cartesian_prod(grid, grid)
    distribution = flow_chain(steps=1, size=1, batch=len(points))
    assert float(distribution.log_prob(points).exp().sum()) * (12 / 400) ** 2 == pytest.approx(1, abs=1e-4)


def test_the_mode_of_a_chain_is_the_flow_from_zero_and_has_the_highest_density():
    distribution, velocity = flow_chain(), field()
    x = torch.zeros(B, A)
    for k in range(3):
        x = x + velocity(x, torch.tensor(k / 3)) / 3
    torch.testing.assert_close(distribution.mode[:, -A:], x)
    peak = distribution.log_prob(distribution.mode)
    for seed in range(20):
        near = distribution.mode + 0.05 * torch.randn(B, 4 * A, generator=generator(seed))
        assert (distribution.log_prob(near) < peak).all()


def test_a_chain_follows_the_noise_that_it_is_given():
    distribution, noise = flow_chain(), torch.randn(B, 4, A, generator=generator(9))
    chain = distribution.sample(noise).unflatten(-1, (4, A))
    torch.testing.assert_close(chain[:, 0], noise[:, 0])
    step = chain[:, 1] + field()(chain[:, 1], torch.tensor(1 / 3)) / 3 + distribution.std[1] * noise[:, 2]
    torch.testing.assert_close(chain[:, 2], step)


@pytest.mark.parametrize("kind", ["squashed", "chunk"])
def test_the_gradient_of_a_sample_reaches_mean_and_std(kind):
    """SAC needs it. With noise n the sample is squash(mean + std n), so the slopes are squash' and squash' n."""
    mean = torch.randn(B, 4, generator=generator(), requires_grad=True)
    std = torch.full((4,), 0.5, requires_grad=True)
    noise = torch.randn(B, 4, generator=generator(1))
    if kind == "squashed":
        sample = SquashedGaussian(DiagonalGaussian(mean, std), torch.full((4,), -2.0), torch.ones(4)).sample(noise)
        slope = 1.5 / torch.cosh(mean + std * noise) ** 2
    else:
        sample = ChunkGaussian(mean, std, chunk=2, smoothness=0.0).sample(noise)
        slope = torch.ones_like(mean)
    of_mean, of_std = torch.autograd.grad(sample.sum(), [mean, std])
    torch.testing.assert_close(of_mean, slope)
    torch.testing.assert_close(of_std, (slope * noise).sum(0))


def test_samples_without_a_gradient_have_none_and_their_log_probs_do():
    """SAC refuses such heads by this; PPO needs only the log-probs."""
    logits = torch.zeros(B, A, 5, requires_grad=True)
    std = torch.full((2, A), 0.5, requires_grad=True)
    weight = torch.ones(A, requires_grad=True)
    chain = FlowChain(lambda x, time: x * weight, std, batch=B)
    for distribution, leaves in ((BinnedCategorical(logits, LOW, HIGH), [logits]), (chain, [std, weight])):
        torch.manual_seed(0)
        sample = distribution.sample()
        assert not sample.requires_grad
        gradients = torch.autograd.grad(distribution.log_prob(sample).sum(), leaves)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
