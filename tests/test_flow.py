import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
