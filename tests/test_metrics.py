"""Metrics against values of the published evaluators or a second computation: scipy, scikit-learn, or by hand."""

import golden_data as gd
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from titok_jax.data.digits import load_digits
from titok_jax.evaluation import metrics
from titok_jax.evaluation.metrics import FeatureStatistics, InceptionScore


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

    def filtered(x):  # scipy's Gaussian, truncated at 5 taps either side; its padded border is thrown away
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
    # The 1e-8 inside the logarithm takes 6e-8 bits away.
    assert (usage.usage, usage.entropy, usage.perplexity) == pytest.approx((0.5, 2.0, 4.0), rel=1e-6)
    usage.update(np.full((2, 4), 7))  # probabilities: four times 1/8, and 1/2
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


# ---------------------------------------------------------------------------------------------------------------------
# Feature statistics, Inception score, precision and recall


@pytest.fixture(scope="module")
def golden():
    return gd.load("evaluator.npz")


def statistics(features, batch_size=None, network=""):
    stats = FeatureStatistics(features.shape[1], network)
    for start in range(0, len(features), batch_size or len(features)):
        stats.update(features[start : start + (batch_size or len(features))])
    return stats


@pytest.mark.parametrize("case", ["a", "b"])  # b: half of the dimensions are 0, the covariances singular
def test_published_evaluator(golden, case):
    real, fake, logits = (golden[f"{case}/{name}"] for name in ("real", "fake", "logits"))
    distance = metrics.frechet_distance(statistics(real, 16), statistics(fake, 16))
    assert distance == pytest.approx(float(golden[f"{case}/rFID_f64"]), rel=1e-6)
    assert InceptionScore().update(logits).value == pytest.approx(float(golden[f"{case}/InceptionScore_f64"]), rel=1e-6)
    usage = metrics.CodebookUsage(len(golden[f"{case}/codebook_frequencies"])).update(golden[f"{case}/codebook_indices"])
    np.testing.assert_array_equal(usage.counts, golden[f"{case}/codebook_frequencies"])
    assert usage.usage == pytest.approx(float(golden[f"{case}/CodebookUsage_f64"]), rel=1e-6)
    assert usage.entropy == pytest.approx(float(golden[f"{case}/CodebookEntropy_f64"]), rel=1e-6)
    assert usage.perplexity == pytest.approx(2 ** float(golden[f"{case}/CodebookEntropy_f64"]), rel=1e-6)


def test_adm_evaluator(golden):
    distance = metrics.frechet_distance(statistics(golden["pr/ref"]), statistics(golden["pr/sample"]))
    assert distance == pytest.approx(float(golden["adm/fid_f64"]), rel=1e-6)
    for chunk in (5000, 50):
        score = InceptionScore(chunk).update(golden["adm/logits"])
        assert score.value == pytest.approx(float(golden[f"adm/is_split{chunk}_f64"]), rel=1e-6)


@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("block", [64, 512])
def test_precision_recall(golden, k, block):
    found = metrics.precision_recall(golden["pr/ref"], golden["pr/sample"], k, block=block)
    assert found == (float(golden[f"pr/precision_k{k}_f64"]), float(golden[f"pr/recall_k{k}_f64"]))


def test_precision_recall_does_not_depend_on_order_and_refuses_nonsense(golden):
    rng = np.random.default_rng(0)
    ref, sample = rng.permutation(golden["pr/ref"]), rng.permutation(golden["pr/sample"])
    expected = (float(golden["pr/precision_k3_f64"]), float(golden["pr/recall_k3_f64"]))
    assert metrics.precision_recall(ref, sample) == expected
    assert metrics.precision_recall(sample, ref) == expected[::-1]
    with pytest.raises(ValueError, match="k is 3, expected 1 to 2"):
        metrics.precision_recall(ref, sample[:3])
    with pytest.raises(ValueError, match=r"shapes \[200, 16\] and \[150, 15\]"):
        metrics.precision_recall(ref, sample[:, :15])


def features_with_offsets():
    """Features [101, 12] with means up to 1,000 times their deviations, so that sums of squares would lose six digits."""
    rng = np.random.default_rng(3)
    return (rng.standard_normal((101, 12)) @ rng.standard_normal((12, 12)) + 1000 * rng.random(12)).astype(np.float32)


@pytest.mark.parametrize("batch_size", [1, 7, 50, 101])
def test_statistics_do_not_depend_on_batches(batch_size):
    features = features_with_offsets()
    stats = statistics(features, batch_size)
    exact = features.astype(np.float64)
    assert stats.count == 101
    np.testing.assert_allclose(stats.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(exact, rowvar=False), rtol=1e-12, atol=1e-12)


def test_statistics_do_not_depend_on_shards_or_order():
    features = features_with_offsets()
    whole = statistics(features)
    for cuts in ([40], [1, 2, 90], list(range(10, 101, 10))):
        merged = FeatureStatistics(12)
        for part in np.split(np.random.default_rng(4).permutation(features), cuts):
            merged.merge(statistics(part, 8))
        assert merged.count == 101
        np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
        np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-12, atol=1e-12)
    assert FeatureStatistics(12).merge(FeatureStatistics(12)).update(features[:0]).count == 0


def test_statistics_that_do_not_fit():
    stats = statistics(features_with_offsets(), network="inception")
    with pytest.raises(ValueError, match=r"shape \[3, 11\], expected \[B, 12\]"):
        stats.update(np.zeros((3, 11)))
    with pytest.raises(ValueError, match="not finite"):
        stats.update(np.full((1, 12), np.nan))
    with pytest.raises(ValueError, match="of inception and of digits"):
        metrics.frechet_distance(stats, statistics(features_with_offsets(), network="digits"))
    with pytest.raises(ValueError, match="of length 12 and 11"):
        stats.merge(FeatureStatistics(11))
    with pytest.raises(ValueError, match="covariance of 1 images"):
        metrics.frechet_distance(stats, statistics(np.zeros((1, 12))))
    assert stats.count == 101


def test_frechet_distance_of_a_root_that_is_not_finite(golden, monkeypatch):
    real, fake = (statistics(golden[f"b/{name}"]) for name in ("real", "fake"))
    offset = [stats.covariance + 1e-6 * np.eye(16) for stats in (real, fake)]
    # The trace of the root by another way: eigenvalues of the symmetric form.
    values, vectors = np.linalg.eigh(offset[0])
    half = vectors * np.sqrt(values) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(half @ offset[1] @ half)).sum()
    expected = np.square(real.mean - fake.mean).sum() + np.trace(real.covariance + fake.covariance) - 2 * trace
    sqrtm, arguments = scipy.linalg.sqrtm, []

    def failing_once(matrix):
        arguments.append(matrix)
        return np.full_like(matrix, np.nan) if len(arguments) == 1 else sqrtm(matrix)

    monkeypatch.setattr(scipy.linalg, "sqrtm", failing_once)
    assert metrics.frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(arguments[0], real.covariance @ fake.covariance)
    assert expected != pytest.approx(float(golden["b/rFID_f64"]), rel=1e-6)
    monkeypatch.setattr(scipy.linalg, "sqrtm", lambda matrix: sqrtm(matrix) + 0.1j)
    with pytest.raises(ValueError, match=r"imaginary part of 0\.1"):
        metrics.frechet_distance(real, fake)


def test_statistics_saved_and_loaded(tmp_path):
    features = features_with_offsets()
    pool, spatial = statistics(features[:60], network="inception"), statistics(features[:, :5], network="inception")
    pool.save(tmp_path / "reference.npz", spatial)
    loaded = FeatureStatistics.load(tmp_path / "reference.npz")
    assert (loaded.count, loaded.dim, loaded.network) == (60, 12, "inception")
    assert metrics.frechet_distance(loaded, pool) == pytest.approx(0, abs=1e-8)
    loaded.update(features[60:])  # continues where the saved one ended
    np.testing.assert_allclose(loaded.covariance, statistics(features).covariance, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(FeatureStatistics.load(tmp_path / "reference.npz", spatial=True).mean, spatial.mean)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.npz"]

    pool.save(tmp_path / "reference.npz")
    with pytest.raises(ValueError, match="holds no mu_s and no sigma_s; it holds mu, sigma, count, network"):
        FeatureStatistics.load(tmp_path / "reference.npz", spatial=True)


def test_reference_of_adm(tmp_path):
    """Reference files of ADM hold float32 means, float64 covariances, no counts, and also images."""
    features, path = features_with_offsets(), tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    np.savez(
        path,
        arr_0=np.zeros((2, 4, 4, 3), np.uint8),
        mu=features.mean(0),
        sigma=np.cov(features, rowvar=False),
        mu_s=features[:, :5].mean(0),
        sigma_s=np.cov(features[:, :5], rowvar=False),
    )
    stats = FeatureStatistics.load(path)
    assert (stats.count, stats.network, stats.mean.dtype) == (0, "", np.float64)
    sample = statistics(features[::2], network="inception")
    expected = metrics.frechet_distance(statistics(features), sample)
    assert metrics.frechet_distance(stats, sample) == pytest.approx(expected, rel=1e-4)  # the file's mean is float32
    assert FeatureStatistics.load(path, spatial=True).dim == 5
    for change in (lambda: stats.update(features), lambda: stats.merge(sample), lambda: sample.merge(stats)):
        with pytest.raises(ValueError, match="unknown number of images"):
            change()


def test_files_that_are_no_statistics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.npz is not a file"):
        FeatureStatistics.load(tmp_path / "absent.npz")
    path = tmp_path / "x.npz"
    path.write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"x\.npz is no \.npz file"):
        FeatureStatistics.load(path)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((4, 4)))
    with pytest.raises(ValueError, match=r"mu float64 \[3\] and sigma float64 \[4, 4\]"):
        FeatureStatistics.load(path)
    np.savez(path, mu=np.array([{}]), sigma=np.zeros((1, 1)))  # a pickle
    with pytest.raises(ValueError, match=r"x\.npz is no \.npz file that can be read: mu holds Python objects"):
        FeatureStatistics.load(path)
    np.savez_compressed(path, mu=np.zeros(3), sigma=np.random.default_rng(0).random((3, 3)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.npz is"):
        FeatureStatistics.load(path)


@pytest.mark.parametrize("chunk_size", [None, 50])
def test_inception_score_does_not_depend_on_batches_and_shards(golden, chunk_size):
    logits = golden["adm/logits"]
    expected = InceptionScore(chunk_size).update(logits).value
    for batch_size in (1, 7, 64, 130):
        score = InceptionScore(chunk_size)
        for start in range(0, 130, batch_size):
            score.update(logits[start : start + batch_size])
        assert (score.count, score.value) == (130, pytest.approx(expected, rel=1e-12))
    # Two shards, split where a chunk ends.
    shards = [InceptionScore(chunk_size).update(part) for part in (logits[:50], logits[50:])]
    assert shards[0].merge(shards[1]).value == pytest.approx(expected, rel=1e-12)


def test_inception_score_and_order(golden):
    logits = golden["adm/logits"][np.argsort(golden["adm/logits"].argmax(1), kind="stable")]  # sorted by class
    assert InceptionScore().update(logits).value == pytest.approx(InceptionScore().update(golden["adm/logits"]).value)
    assert InceptionScore(50).update(logits).value < 0.99 * float(golden["adm/is_split50_f64"])
    with pytest.raises(ValueError, match="130 images end inside a chunk of 50"):
        InceptionScore(50).update(logits).merge(InceptionScore(50).update(logits))
    with pytest.raises(ValueError, match="chunks of 50 and None"):
        InceptionScore(50).merge(InceptionScore())
    with pytest.raises(ValueError, match=r"logits of shape \[2, 9\], expected \[B, 10\]"):
        InceptionScore().update(logits).update(logits[:2, :9])
    with pytest.raises(ValueError, match="of no images"):
        _ = InceptionScore().value


def test_codebook_usage_merged(golden):
    tokens = golden["b/codebook_indices"]
    parts = [metrics.CodebookUsage(4096).update(part) for part in np.split(tokens, [10, 30])]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    np.testing.assert_array_equal(merged.counts, golden["b/codebook_frequencies"])
    with pytest.raises(ValueError, match="4096 and 64 codes"):
        merged.merge(metrics.CodebookUsage(64))
