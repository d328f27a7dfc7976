import pytest
import torch

from vla_rl.encoders import Features


def make(rows: int, tokens: int, fingerprint: str = "a", start: float = 0.0) -> Features:
    values = torch.arange(rows * tokens * 2, dtype=torch.float32).reshape(rows, tokens, 2) + start
    return Features(tokens=values, mask=torch.ones(rows, tokens, dtype=torch.bool), fingerprint=fingerprint)


def test_cat_pads_to_the_longest_and_masks_the_padding():
    joined = Features.cat([make(1, 2), make(2, 3, start=100.0)])
    assert joined.tokens.shape == (3, 3, 2)
    assert joined.mask.tolist() == [[True, True, False], [True, True, True], [True, True, True]]
    assert joined.tokens[0].tolist() == [[0, 1], [2, 3], [0, 0]]
    assert joined.tokens[1, 0].tolist() == [100, 101]


def test_cat_refuses_features_of_different_encoders():
    with pytest.raises(ValueError, match="different encoders"):
        Features.cat([make(1, 2, "a"), make(1, 2, "b")])
    with pytest.raises(ValueError, match="empty"):
        Features.cat([])


@pytest.mark.parametrize(
    ("index", "rows"), [(1, [1]), (-1, [2]), (slice(0, 2), [0, 1]), ([2, 0], [2, 0]), (torch.tensor([1, 1]), [1, 1])]
)
def test_indexing_selects_rows_and_keeps_the_batch_dimension(index, rows):
    features = make(3, 2)
    chosen = features[index]
    assert len(chosen) == len(rows)
    assert torch.equal(chosen.tokens, features.tokens[torch.tensor(rows)])
    assert chosen.fingerprint == "a"


def test_iteration_ends_and_bad_index_raises():
    assert len(list(make(3, 2))) == 3
    with pytest.raises(IndexError):
        make(3, 2)[3]


def test_to_casts_tokens_and_leaves_the_mask():
    features = make(1, 2).to(dtype=torch.float16)
    assert features.tokens.dtype == torch.float16
    assert features.mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        (torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)),
        (torch.zeros(2, 3, 4), torch.ones(2, 3)),
        (torch.zeros(2, 3, 4), torch.ones(2, 2, dtype=torch.bool)),
    ],
)
def test_wrong_shapes_are_refused(tokens, mask):
    with pytest.raises(ValueError, match="tokens \\[B, M, D\\]"):
        Features(tokens=tokens, mask=mask, fingerprint="a")
