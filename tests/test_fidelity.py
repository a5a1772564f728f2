"""Likeness of videos against scikit-image, and velocity errors against their definition."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from hybrid_dit import fidelity


@pytest.fixture(scope="module")
def videos():
    rng = np.random.default_rng(0)
    reference = rng.integers(0, 256, (3, 2, 24, 33, 3), np.uint8)
    smooth = np.linspace(0, 255, 33).astype(np.uint8) * np.ones((2, 24, 1), np.uint8)
    reference[1] = smooth[..., None]
    changed = np.clip(reference + rng.normal(0, (5, 40, 120), (3,))[:, None, None, None, None], 0, 255)
    changed = np.clip(changed + rng.normal(0, 20, reference.shape), 0, 255).astype(np.uint8)
    return changed, reference


def test_ssim_is_that_of_scikit_image(videos):
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    expected = [
        np.mean([structural_similarity(a, b, channel_axis=-1, **settings) for a, b in zip(*pair)])
        for pair in zip(*(x.astype(np.float64) for x in videos))
    ]
    # Both in float64: var = E[x²] - E[x]² loses 65025 eps against C2 = 58, 3e-13; sums are in another order.
    np.testing.assert_allclose(fidelity.ssim(*videos), expected, atol=1e-11)
    assert expected[0] > expected[1] + 0.01


def test_psnr_is_that_of_scikit_image(videos):
    expected = [peak_signal_noise_ratio(b, a, data_range=255) for a, b in zip(*videos)]
    np.testing.assert_allclose(fidelity.psnr(*videos), expected, atol=1e-4)  # float32 differences


def test_a_video_is_like_itself(videos):
    assert (fidelity.ssim(videos[0], videos[0]) == 1).all()
    assert fidelity.psnr(videos[0], videos[0]) == pytest.approx([100] * 3)


def test_errors_are_relative_norms_of_each_video():
    rng = np.random.default_rng(1)
    teacher, student = rng.normal(size=(2, 2, 3, 2, 4, 4, 5)).astype(np.float32)
    errors = fidelity.relative_errors(student, teacher)
    for k in range(2):
        for b in range(3):
            a, s = teacher[k, b].ravel().astype(np.float64), student[k, b].ravel().astype(np.float64)
            for norm, order in (("l1", 1), ("l2", 2)):
                expected = np.linalg.norm(s - a, order) / np.linalg.norm(a, order)
                np.testing.assert_allclose(errors[norm][k, b], expected, rtol=1e-12)


def test_probe_times_span_the_schedule():
    schedule = np.linspace(1000, 20, 50).astype(np.float32)
    times = fidelity.probe_times(schedule, 5)
    assert len(times) == 5 and times[0] == schedule[0] and times[-1] == schedule[-1]
    assert (np.diff(times) < 0).all()
    np.testing.assert_array_equal(fidelity.probe_times(schedule[:3], 5), schedule[:3])
    assert len(fidelity.probe_times(schedule, 0)) == 0


def test_velocities_are_asked_for_at_noisy_latents():
    rng = np.random.default_rng(2)
    latents, noise = rng.normal(size=(2, 2, 1, 2, 2, 3)).astype(np.float32)

    def velocity(params, x, t, context):
        return params * x + t[:, None, None, None, None] * context

    found = fidelity.velocities(velocity, 2.0, latents, noise, np.float32([1000, 250]), 3.0)
    np.testing.assert_allclose(found[0], 2 * noise + 3000, rtol=1e-6)
    np.testing.assert_allclose(found[1], 2 * (0.75 * latents + 0.25 * noise) + 750, rtol=1e-6)
