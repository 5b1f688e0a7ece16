"""Metrics against a second computation: scipy, scikit-learn, or by hand."""

import numpy as np
import pytest
import scipy.ndimage
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from titok_jax import metrics
from titok_jax.data.digits import load_digits


def image_pairs(shape=(3, 40, 37, 3), noise=0.1):
    rng = np.random.default_rng(0)
    a = scipy.ndimage.gaussian_filter(rng.random(shape), (0, 2, 2, 0)).astype(np.float32)
    a = (a - a.min()) / (a.max() - a.min())
    return a, np.clip(a + noise * rng.standard_normal(shape), 0, 1).astype(np.float32)


def test_psnr_by_hand():
    a = np.zeros((3, 2, 2, 1))
    b = a.copy()
    b[0] = 0.1  # error 0.1 everywhere: 20 dB
    b[1, 0, 0] = 1.0  # mean squared error 1/4
    np.testing.assert_allclose(metrics.psnr(a, b), [20.0, 10 * np.log10(4), np.inf])


def test_ssim_against_scipy():
    a, b = image_pairs()

    def filtered(x):  # scipy's own Gaussian, cut at 5 taps either side; the border, where it pads, is thrown away
        return scipy.ndimage.gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]

    expected = []
    for x, y in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
        channels = []
        for c in range(3):
            p, q = x[..., c], y[..., c]
            mp, mq = filtered(p), filtered(q)
            vp, vq, cov = filtered(p * p) - mp * mp, filtered(q * q) - mq * mq, filtered(p * q) - mp * mq
            luminance = (2 * mp * mq + 1e-4) / (mp**2 + mq**2 + 1e-4)
            channels.append((luminance * (2 * cov + 9e-4) / (vp + vq + 9e-4)).mean())
        expected.append(np.mean(channels))
    np.testing.assert_allclose(metrics.ssim(a, b), expected, rtol=1e-9)
    assert (metrics.ssim(a, b) < 0.99).all()
    np.testing.assert_allclose(metrics.ssim(a, a), 1.0, rtol=1e-12)


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim])
def test_images_that_do_not_fit(measure):
    a, b = image_pairs()
    with pytest.raises(ValueError, match=r"shapes \[3, 40, 37, 3\] and \[2, 40, 37, 3\]"):
        measure(a, b[:2])
    with pytest.raises(ValueError, match="dtypes uint8 and float32"):
        measure((a * 255).astype(np.uint8), b)


def test_ssim_of_images_smaller_than_its_window():
    with pytest.raises(ValueError, match="10x12 pixels"):
        metrics.ssim(np.zeros((1, 10, 12, 3)), np.zeros((1, 10, 12, 3)))


def test_codebook_usage_by_hand():
    usage = metrics.CodebookUsage(8)
    assert (usage.usage, usage.entropy, usage.perplexity) == (0, 0, 1)
    usage.update(np.array([[0, 0], [1, 1]])).update(np.array([2, 2, 3, 3], np.int32))
    assert (usage.usage, usage.entropy, usage.perplexity) == (0.5, 2.0, 4.0)
    usage.update(np.full((2, 4), 7))  # probabilities 1/8 four times, 1/2
    assert usage.counts.tolist() == [2, 2, 2, 2, 0, 0, 0, 8]
    assert usage.usage == 5 / 8
    assert usage.entropy == pytest.approx(4 * 3 / 8 + 1 / 2)
    with pytest.raises(ValueError, match="from 0 to 8, expected 0 to 7"):
        usage.update(np.array([0, 8]))
    assert usage.counts.sum() == 16


def test_nearest_neighbours_against_scikit_learn():
    rng = np.random.default_rng(1)
    queries, references = rng.standard_normal((70, 12)), rng.standard_normal((300, 12))
    queries[5] = references[17]  # an exact copy
    expected_distances, expected = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(references).kneighbors(queries)
    distances, indices = metrics.nearest_neighbours(queries, references, 4, block=32)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_allclose(distances, expected_distances, atol=1e-6)  # scikit-learn's copy is at about 1e-7
    assert distances[5, 0] == 0


def test_equally_near_references_come_in_their_order():
    references = np.array([[3, 0], [0, 3], [1, 0], [0, 1]], np.uint8)
    distances, indices = metrics.nearest_neighbours(np.zeros((1, 2), np.uint8), references, 4)
    assert indices.tolist() == [[2, 3, 0, 1]]
    assert distances.tolist() == [[1, 1, 3, 3]]
    with pytest.raises(ValueError, match="k is 5, expected 1 to 4"):
        metrics.nearest_neighbours(references, references, 5)


@pytest.mark.parametrize("k", [1, 3])
def test_classifier_against_scikit_learn_on_the_digits(k):
    (train, labels), (test, truth) = load_digits("train", 8), load_digits("test", 8)
    train, test = train.reshape(len(train), -1), test.reshape(len(test), -1)
    ours = metrics.knn_classify(test, train, labels, k)
    theirs = KNeighborsClassifier(k, algorithm="brute").fit(train.astype(float), labels)
    votes = labels[theirs.kneighbors(test.astype(float))[1]]
    clear = np.array([len(set(v)) < k or k == 1 for v in votes])  # scikit-learn gives a tie to the smallest label
    assert clear.mean() > 0.98
    np.testing.assert_array_equal(ours[clear], theirs.predict(test.astype(float))[clear])
    assert np.mean(ours == truth) > 0.9


def test_a_tied_vote_goes_to_the_nearest():
    references, labels = np.array([[1.0], [2.0], [3.0], [4.0], [5.0]]), np.array([7, 2, 2, 7, 0])
    query = np.zeros((1, 1))
    assert [metrics.knn_classify(query, references, labels, k).item() for k in (1, 2, 3, 4, 5)] == [7, 7, 2, 7, 7]
    with pytest.raises(ValueError, match=r"labels have shape \[4\], expected \[5\]"):
        metrics.knn_classify(query, references, labels[:4], 1)
