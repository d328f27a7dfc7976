import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from vla_rl.heads import DiagonalGaussian, StateDependentGaussian

B, A, L = 5, 3, 8


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def diagonal(seed=0):
    g = generator(seed)
    return DiagonalGaussian(torch.randn(B, A, generator=g), 0.2 + torch.rand(B, A, generator=g))


def state_dependent(seed=0):
    g = generator(seed)
    return StateDependentGaussian(
        torch.randn(B, A, generator=g), torch.randn(B, L, generator=g), torch.randn(L, A, generator=g) - 1
    )


def reference(distribution):
    return Independent(Normal(distribution.mode, distribution.std), 1)


@pytest.mark.parametrize("make", [diagonal, state_dependent])
def test_density_entropy_and_kl_are_those_of_torch(make):
    first, second = make(0), make(1)
    actions = torch.randn(B, A, generator=generator(2))
    torch.testing.assert_close(first.log_prob(actions), reference(first).log_prob(actions))
    torch.testing.assert_close(first.entropy(), reference(first).entropy())
    torch.testing.assert_close(first.kl(second), kl_divergence(reference(first), reference(second)))
    torch.testing.assert_close(first.kl(first), torch.zeros(B))


def test_samples_of_a_diagonal_gaussian_have_its_moments():
    torch.manual_seed(0)
    distribution = diagonal()
    samples = torch.stack([distribution.sample() for _ in range(20_000)])
    torch.testing.assert_close(samples.mean(0), distribution.mode, atol=0.03, rtol=0)
    torch.testing.assert_close(samples.std(0), distribution.std, atol=0.03, rtol=0)


def test_one_std_for_the_whole_batch_is_broadcast():
    mean, std = torch.zeros(B, A), torch.tensor([0.1, 0.2, 0.3])
    expected = Independent(Normal(mean, std.expand(B, A)), 1)
    torch.testing.assert_close(DiagonalGaussian(mean, std).entropy(), expected.entropy())


def test_gsde_noise_has_the_stated_variance_over_matrices():
    torch.manual_seed(0)
    distribution = state_dependent()
    deviations = torch.stack([distribution.sample() for _ in range(20_000)]) - distribution.mode
    torch.testing.assert_close(deviations.std(0) / distribution.std, torch.ones(B, A), atol=0.03, rtol=0)
    hand = [
        sum(float(distribution.latent[0, i] * distribution.scale[i, a]) ** 2 for i in range(L)) ** 0.5 for a in range(A)
    ]
    torch.testing.assert_close(distribution.std[0], torch.tensor(hand), rtol=1e-4, atol=0)


def test_a_held_matrix_gives_a_deviation_that_depends_on_the_latent_alone():
    distribution = state_dependent()
    noise = torch.randn(1, L, A, generator=generator(3)).expand(B, -1, -1)
    elsewhere = StateDependentGaussian(distribution.mode + 1, distribution.latent, distribution.scale.log())
    torch.testing.assert_close(distribution.sample(noise), distribution.sample(noise), rtol=0, atol=0)
    torch.testing.assert_close(
        distribution.sample(noise) - distribution.mode, elsewhere.sample(noise) - elsewhere.mode, atol=1e-5, rtol=0
    )
    doubled = StateDependentGaussian(distribution.mode, 2 * distribution.latent, distribution.scale.log())
    torch.testing.assert_close(
        doubled.sample(noise) - doubled.mode, 2 * (distribution.sample(noise) - distribution.mode), atol=1e-5, rtol=0
    )


def test_gradients_reach_log_std_and_mean_but_not_the_latent():
    g = generator()
    mean = torch.randn(B, A, generator=g, requires_grad=True)
    latent = torch.randn(B, L, generator=g, requires_grad=True)
    log_std = torch.full((L, A), -1.0, requires_grad=True)
    actions = torch.randn(B, A, generator=g)
    StateDependentGaussian(mean, latent, log_std).log_prob(actions).sum().backward()
    assert latent.grad is None
    assert mean.grad.abs().min() > 0 and log_std.grad.abs().min() > 0
    step = 1e-3
    shifted = [
        StateDependentGaussian(mean, latent, log_std + sign * step * torch.eye(L, A)).log_prob(actions).sum().item()
        for sign in (1, -1)
    ]
    numeric = (shifted[0] - shifted[1]) / (2 * step)
    assert log_std.grad.diagonal().sum().item() == pytest.approx(numeric, rel=2e-2)
