import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from hybrid_dit import flow
from hybrid_dit.errors import UserError
from hybrid_dit.flow import flow_matching_loss
from hybrid_dit.sampling.schedule import TRAIN_STEPS

B, SHAPE = 6, (2, 2, 3, 4)


def captured(velocity, latents, shift, seed=0):
    """The loss, and what the velocity function was given."""
    seen = []

    def spy(x, t):
        seen.append((np.asarray(x), np.asarray(t)))
        return velocity(x, t)

    loss = flow_matching_loss(spy, latents, jax.random.key(seed), shift)
    return np.asarray(loss), *seen[0]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_loss_is_the_squared_error_against_noise_minus_clean(dtype, shift):
    clean = (2 + jax.random.normal(jax.random.key(1), (B, *SHAPE))).astype(dtype)
    loss, x, t = captured(lambda x, t: 0.3 * x + 0.001 * t[:, None, None, None, None], clean, shift)
    assert loss.dtype == x.dtype == t.dtype == np.float32 and loss.shape == (B,)
    s = (t.astype(np.float64) / TRAIN_STEPS)[:, None, None, None, None]
    clean = np.asarray(clean, np.float64)
    noise = (x - (1 - s) * clean) / s
    expected = np.square(0.3 * x + s - (noise - clean)).mean(axis=(1, 2, 3, 4))
    # x is rounded at 2**-24 of about 4; recovering the noise divides that by s, and squaring doubles it (values < 10).
    np.testing.assert_allclose(loss, expected, atol=20 * 4 * 2**-22 / s.min(), rtol=1e-5)
    # The noise is standard normal: 288 draws, four standard errors.
    assert abs(noise.mean()) < 4 * noise.size**-0.5 and abs(noise.std() - 1) < 4 * (2 * noise.size) ** -0.5


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_noise_levels_are_stratified_uniform_before_the_shift_and_shuffled(shift):
    places = []
    for seed in range(20):
        _, _, t = captured(lambda x, t: x, jnp.zeros((B, *SHAPE)), shift, seed)
        s = t.astype(np.float64) / TRAIN_STEPS
        uniform = s / (shift - (shift - 1) * s)  # inverse of the shift
        slices = np.floor(uniform * B).astype(int)
        assert sorted(slices) == list(range(B))
        places.append((slices[0], uniform[0] * B % 1))
    assert len({slice_ for slice_, _ in places}) > 3  # the first sample does not always get the same slice
    inside = [place for _, place in places]
    assert min(inside) < 0.25 and max(inside) > 0.75  # nor the same place in it


def test_another_key_is_another_draw():
    clean = jnp.zeros((B, *SHAPE))
    losses = [captured(lambda x, t: x, clean, 3.0, seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(losses[0], losses[1])
    assert np.all(losses[0] != losses[2])


def test_logit_normal_levels_are_stratified_by_their_own_quantiles():
    b, mean, std, shift = 64, 0.5, 1.5, 3.0
    key = jax.random.key(0)
    level, noise = flow.draw(key, (b, 1, 1, 1, 1), shift, "logit_normal", mean, std)
    uniform, same = flow.draw(key, (b, 1, 1, 1, 1), 1.0)
    np.testing.assert_array_equal(noise, same)
    s = np.asarray(level, np.float64)
    z = special.logit(s / (shift - (shift - 1) * s))  # inverse of the shift, then of the sigmoid
    quantile = special.ndtr((z - mean) / std)
    # s has an ulp of 2**-24 below 1; logit and shift multiply it by up to shift / (s (1 - s)), the density of z by 0.4.
    atol = 8 * 2**-24 * shift / (s * (1 - s)).min()
    np.testing.assert_allclose(quantile, uniform, atol=atol)
    assert atol < 0.01 and sorted(np.floor(np.float64(uniform) * b)) == list(range(b))


def test_an_unknown_distribution_is_told():
    with pytest.raises(UserError, match="timesteps='beta' is unknown; choose one of uniform, logit_normal"):
        flow.draw(jax.random.key(0), (1, 1, 1, 1, 1), 1.0, "beta")


def test_values_are_summed_by_timestep():
    level = np.float32([0.0, 0.249, 0.25, 0.6, 1.0])
    sums, counts = flow.by_timestep(np.float32([1, 2, 4, 8, 16]), level, 4)
    assert sums.tolist() == [3, 4, 8, 16] and counts.tolist() == [2, 1, 1, 1]
    assert flow.bucket_names(4) == ["0-250", "250-500", "500-750", "750-1000"]
