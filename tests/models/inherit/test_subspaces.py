import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transkd.models.inherit.subspaces import (
    Moments,
    identity_basis,
    principal_basis,
    reconstructing_units,
    score_factors,
    value_factors,
)


def norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=0.0)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_layer_norm_commutes_with_the_basis_where_nothing_is_lost():
    """Tokens of 12 channels that fill 5 directions beside their mean; 6 channels hold these."""
    tokens = random(200, 5) @ random(5, 12, seed=1) + random(200, 1, seed=2)
    moments = Moments()
    moments.add(norm(tokens))
    basis = principal_basis(moments.second(), 6, torch.Generator().manual_seed(0))
    down, up = basis.down.double(), basis.up.double()
    ours = norm(tokens @ down)
    torch.testing.assert_close(ours, norm(tokens) @ down, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours @ up, norm(tokens), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.square().mean(1), torch.ones(200, dtype=torch.float64))  # its variance, kept


def test_channels_share_the_variance():
    moment = torch.diag(torch.tensor([100.0, 10, 1, 0.1] * 8, dtype=torch.float64))
    basis = principal_basis(moment, 17, torch.Generator().manual_seed(0))
    kept = (basis.down.T.double() @ moment @ basis.down.double()).diagonal()
    assert kept.max() < 8 * kept.min()  # of the principal components themselves it is 100


def test_the_seed_decides_the_turn():
    moment = random(9, 9) @ random(9, 9).T
    first, again, other = (principal_basis(moment, 4, torch.Generator().manual_seed(seed)).down for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_a_norm_in_a_basis_of_its_own_leaves_the_gain_to_its_readers():
    layer = nn.LayerNorm(8)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(8) + 0.5)
        layer.bias.copy_(torch.rand(8))
    tokens = random(1, 20, 8).float()
    basis = principal_basis(random(8, 8) @ random(8, 8).T, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(basis.normed(layer, tokens), F.layer_norm(tokens, (8,)) @ basis.down)
    torch.testing.assert_close(basis.reader(layer), basis.up @ torch.diag(layer.weight))
    same = identity_basis(layer.weight)
    torch.testing.assert_close(same.normed(layer, tokens), layer(tokens))
    assert torch.equal(same.reader(layer), torch.eye(8))


def test_moments_by_hand():
    moments = Moments()
    moments.add(torch.tensor([[1.0, 2.0]]), times=3)
    moments.add(torch.tensor([[[5.0, 0.0]]]))
    assert moments.second().tolist() == [[(3 + 25) / 4, 6 / 4], [6 / 4, 12 / 4]]
    assert moments.covariance().tolist() == [[7 - 4, 1.5 - 3], [1.5 - 3, 3 - 2.25]]


def test_scores_of_lower_rank_are_kept_whole():
    """Queries and keys of 6 channels that fill 3 directions each: rank 3 keeps every score."""
    queries, keys = random(50, 3) @ random(3, 6, seed=1), random(40, 3, seed=2) @ random(3, 6, seed=3)
    to_q, to_k = score_factors(queries.T @ queries / 50, keys.T @ keys / 40, 3)
    torch.testing.assert_close((queries @ to_q) @ (keys @ to_k).T, queries @ keys.T)


def test_scores_lose_least():
    queries, keys = random(500, 6), random(400, 6, seed=1) * torch.tensor([9.0, 1, 5, 0.1, 3, 0.5])
    exact = queries @ keys.T

    def error(to_q, to_k):
        return ((queries @ to_q) @ (keys @ to_k).T - exact).square().mean()

    found = error(*score_factors(queries.T @ queries / 500, keys.T @ keys / 400, 3))
    eye = torch.eye(6, dtype=torch.float64)
    subsets = [error(eye[:, list(kept)], eye[:, list(kept)]) for kept in ((0, 2, 4), (0, 1, 2), (0, 2, 5))]
    assert found <= min(subsets) * (1 + 1e-9)


def test_values_that_matter_are_kept_whole():
    """Of 6 channels the projection reads 2 directions."""
    values, readout = random(100, 6), random(5, 2, seed=1) @ random(2, 6, seed=2)
    down, back, sizes = value_factors(values.T @ values / 100, readout, 6)
    torch.testing.assert_close((values @ down[:, :2]) @ back[:2] @ readout.T, values @ readout.T)
    assert (sizes[2:] < 1e-9).all()


def test_units_are_chosen_for_what_they_explain():
    """Unit 0 is large and read by nobody, 1 is 2 with less noise, 3 is read alone: 1 and 3 are taken."""
    x = random(4000, 4)
    x[:, 0] *= 100
    x[:, 2] = x[:, 1] + 0.5 * x[:, 2]
    outputs = torch.stack([3 * x[:, 1], x[:, 3]], 1)
    x, outputs = x - x.mean(0), outputs - outputs.mean(0)
    covariance = x.T @ x / 4000, x.T @ outputs / 4000
    assert reconstructing_units(*covariance, 2).tolist() == [1, 3]
    assert reconstructing_units(*covariance, 1).tolist() == [1]


@pytest.mark.parametrize("count", [3, 5])
def test_units_that_never_vary_come_last(count):
    x = random(100, 5)
    x[:, 1] = 0
    x = x - x.mean(0)
    chosen = reconstructing_units(x.T @ x / 100, x.T @ x[:, :2] / 100, count).tolist()
    assert len(set(chosen)) == count
    assert (1 in chosen) == (count == 5)
