"""The public API on tiny models: shapes, dtypes, errors, and that nothing is compiled twice."""

import threading
from concurrent.futures import ThreadPoolExecutor

import golden_data
import jax
import numpy as np
import pytest
import tiny_models
from flax import nnx

import titok_jax
from titok_jax.data.digits import load_digits
from titok_jax.inference.generator import Generator
from titok_jax.inference.loading import check_pair
from titok_jax.inference.tokenizer import Tokenizer
from titok_jax.models import GeneratorConfig, MaskgitVQGAN, MaskgitVQGANConfig
from titok_jax.weights import config_files, convert, flax_file, pretrained

VQGAN_CONFIG = MaskgitVQGANConfig(hidden_channels=32, resolution=64)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tiny_models.TOKENIZER, tiny_models.params(tiny_models.TOKENIZER))


@pytest.fixture(scope="module")
def vae():
    return Tokenizer(tiny_models.VAE, tiny_models.params(tiny_models.VAE))


@pytest.fixture(scope="module")
def generator():
    return Generator(tiny_models.GENERATOR, tiny_models.params(tiny_models.GENERATOR))


IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)


def test_encode_and_decode(tokenizer):
    tokens = tokenizer.encode(IMAGES)
    assert tokens.shape == (2, 8)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens, tokenizer.encode(IMAGES.astype(np.float32) / 255))
    images = tokenizer.decode(tokens)
    assert images.shape == (2, 32, 32, 3)
    assert images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1
    np.testing.assert_array_equal(images, tokenizer.decode(np.asarray(tokens).tolist()))


def test_a_vae_gives_the_mean_or_a_draw(vae):
    mean = vae.encode(IMAGES)
    assert mean.shape == (2, 8, 4)
    assert mean.dtype == np.float32
    draws = [vae.encode(IMAGES, jax.random.key(k)) for k in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.allclose(draws[0], draws[2])
    assert not np.allclose(draws[0], mean)
    assert vae.decode(mean).shape == (2, 32, 32, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[0], r"shape \[32, 32, 3\], expected \[batch, 32, 32, 3\]"),
        (np.zeros((1, 64, 64, 3), np.uint8), r"expected \[batch, 32, 32, 3\]"),
        (IMAGES.astype(np.int64), "dtype int64"),
        (IMAGES.astype(np.float32), r"reach from 0 to 255, expected \[0, 1\]: divide grey levels by 255"),
        (IMAGES / np.float32(127.5) - 1, r"reach from -1 to 1, expected \[0, 1\].*take \(x \+ 1\) / 2"),
        (np.full((1, 32, 32, 3), np.nan), "reach from nan to nan"),
    ],
)
def test_bad_images_are_refused(tokenizer, images, message):
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(images)


def test_bad_tokens_are_refused(tokenizer, vae):
    with pytest.raises(ValueError, match="0 to 64, expected 0 to 63"):
        tokenizer.decode(np.arange(57, 65)[None] * np.array([0, 1, 1, 1, 1, 1, 1, 1]))
    with pytest.raises(ValueError, match=r"expected integers \[batch, 8\]"):
        tokenizer.decode(np.zeros((1, 7), int))
    with pytest.raises(ValueError, match=r"expected integers"):
        tokenizer.decode(np.zeros((1, 8, 4), np.float32))
    with pytest.raises(ValueError, match=r"expected float \[batch, 8, 4\]"):
        vae.decode(np.zeros((1, 8), int))
    with pytest.raises(ValueError, match="only a VAE takes a key"):
        tokenizer.encode(IMAGES, jax.random.key(0))


def test_a_stage_1_model_has_no_images():
    stage_1 = Tokenizer(tiny_models.STAGE_1, tiny_models.params(tiny_models.STAGE_1))
    with pytest.raises(ValueError, match="stage 1"):
        stage_1.decode(np.zeros((1, 8), int))


def test_generate(generator):
    ids = titok_jax.generate(generator, [3, 1, 3], jax.random.key(0))
    assert ids.shape == (3, 8)
    assert ids.dtype == np.int32
    assert 0 <= ids.min() <= ids.max() < 64
    assert not np.array_equal(ids[0], ids[2])  # the label is the same, the image is not
    np.testing.assert_array_equal(ids, titok_jax.generate(generator, np.array([3, 1, 3]), jax.random.key(0)))
    assert not np.array_equal(ids, titok_jax.generate(generator, [3, 1, 3], jax.random.key(1)))


def test_a_guidance_scale_of_0_is_none_under_every_schedule():
    """With a scale of 0, "power-cosine" would end in unconditional images, which do not depend on the labels."""
    generator = titok_jax.load_generator("digits")

    def ids(labels, schedule, scale):
        options = {"guidance_schedule": schedule, "guidance_scale": scale, "num_steps": 3}
        return np.asarray(titok_jax.generate(generator, labels, jax.random.key(0), **options))

    labels, others = [3, 1, 4], [5, 9, 2]
    plain = ids(labels, "constant", 0)
    for schedule in ("linear", "power-cosine"):
        np.testing.assert_array_equal(ids(labels, schedule, 0), plain)
        assert not np.array_equal(ids(others, schedule, 0), plain)
        assert not np.array_equal(ids(labels, schedule, 3), plain)


def test_nothing_is_compiled_again_for_other_labels_seed_scale_or_temperature(generator):
    titok_jax.generate(generator, [3, 1, 3], jax.random.key(0))
    before = generator._compiled["sample"]._cache_size()
    for labels, seed, scale, temperature in (([0, 9, 2], 0, 3.0, 2.0), ([1, 1, 1], 5, 0.0, 0.0), ([4, 4, 5], 9, 7.5, 10)):
        titok_jax.generate(generator, labels, jax.random.key(seed), guidance_scale=scale, temperature=temperature)
    assert generator._compiled["sample"]._cache_size() == before
    titok_jax.generate(generator, [3, 1, 3], jax.random.key(0), num_steps=3)
    assert generator._compiled["sample"]._cache_size() == before + 1  # this shows that the count works


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([10], {}, "expected 0 to 9"),
        ([-1], {}, "expected 0 to 9"),
        ([1.5], {}, "expected integers"),
        ([1], {"num_steps": 0}, "num_steps is 0"),
        ([1], {"temperature": -1.0}, "temperature is -1"),
        ([1], {"guidance_schedule": "cubic"}, "cubic"),
    ],
)
def test_bad_settings_are_refused(generator, labels, options, message):
    with pytest.raises(ValueError, match=message):
        titok_jax.generate(generator, labels, jax.random.key(0), **options)


def test_logits(generator):
    logits = generator.logits(np.full((2, 8), 64), [0, 10])
    assert logits.shape == (2, 8, 64)
    assert logits.dtype == np.float32
    with pytest.raises(ValueError, match="expected 0 to 64"):
        generator.logits(np.full((2, 8), 65), [0, 10])
    with pytest.raises(ValueError, match="expected 0 to 10"):
        generator.logits(np.full((2, 8), 64), [0, 11])
    with pytest.raises(ValueError, match=r"expected integers \[2\]"):
        generator.logits(np.full((2, 8), 64), [0])


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_the_vqgan_in_each_of_its_forms(tmp_path):
    """The golden weights give the golden codes and images from a folder, a file and a Flax checkpoint."""
    golden = golden_data.load("tiny/tiny_maskgit_vqgan.npz")
    _, params = golden_data.seeded_model(
        lambda: MaskgitVQGAN(VQGAN_CONFIG, rngs=nnx.Rngs(0)), convert.table_for(VQGAN_CONFIG)
    )
    folder = pretrained.save(tmp_path / "folder", VQGAN_CONFIG, params)
    tensors = convert.to_published(convert.table_for(VQGAN_CONFIG), params)
    flax_file.write_flax(tmp_path / "checkpoint", convert.published_to_jax_vqgan(tensors, config=VQGAN_CONFIG))
    config_files.write_config(tmp_path / "checkpoint.json", VQGAN_CONFIG)
    images = golden_data.images(2, 64, 0)
    for source in (folder, folder / "model.safetensors", tmp_path / "checkpoint"):
        vqgan = titok_jax.load_vqgan(source)
        assert pretrained.tokenizer_kind(source) is MaskgitVQGANConfig
        assert same(vqgan.params, params)
        if source != folder:  # the same parameters give the same results
            continue
        codes = vqgan.encode(images)
        assert codes.shape == (2, 4, 4)
        assert codes.dtype == np.int32
        clear = golden["margin"].reshape(2, 4, 4) > 1e-3
        np.testing.assert_array_equal(np.asarray(codes)[clear], golden["codes"].reshape(2, 4, 4)[clear])
        decoded = vqgan.decode(golden["codes"].reshape(2, 4, 4).astype(int))
        np.testing.assert_allclose(decoded, golden["reconstruction"].transpose(0, 2, 3, 1), atol=1e-4)
    for call, argument, message in (
        (vqgan.encode, images[:, :24], r"shape \[2, 24, 64, 3\], expected .* multiples of 16"),
        (vqgan.encode, images * 255, "reach from"),
        (vqgan.decode, np.zeros((2, 16), int), r"expected integers \[batch, height, width\]"),
        (vqgan.decode, np.full((1, 1, 1), 1024), "reach from 1024 to 1024, expected 0 to 1023"),
    ):
        with pytest.raises(ValueError, match=message):
            call(argument)
    with pytest.raises(ValueError, match="is the configuration of a MaskGIT-VQGAN; a tokenizer belongs here"):
        titok_jax.load_tokenizer(folder)


def test_pairs_that_do_not_fit_are_refused():
    check_pair(tiny_models.TOKENIZER, tiny_models.GENERATOR)
    with pytest.raises(ValueError, match="VAE"):
        check_pair(tiny_models.VAE, tiny_models.GENERATOR)
    with pytest.raises(ValueError, match="codebook size 64 against 4096"):
        check_pair(tiny_models.TOKENIZER, GeneratorConfig(num_tokens=8))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match="digits"):
        titok_jax.load_tokenizer("titok_xxl")


def test_threads_that_share_a_model_get_the_answers_of_one():
    """Eight threads use one tokenizer and one generator from the first call on, with other shapes and settings each."""
    digits = np.repeat(load_digits("test", 32)[0][:40, ..., None], 3, axis=-1)

    def work(tokenizer, generator, number):
        answers = []
        for turn in range(2):
            count = (2, 5)[(number + turn) % 2]
            images, labels = digits[number : number + count], (np.arange(count) + number) % 10
            ids = np.asarray(tokenizer.encode(images))
            scale = np.linspace(0, 4, count) if number % 4 < 2 else 3.0
            options = {"num_steps": 3, "guidance_scale": scale}
            answers += [ids, tokenizer.decode(ids), generator.generate(labels, number, **options)]
            answers += [generator.logits(ids, labels), tokenizer.encode_all(digits[number : number + 4], batch_size=2)]
        return list(map(np.asarray, answers))

    shared, start = titok_jax.load_pair("digits"), threading.Barrier(8)

    def in_thread(number):
        start.wait(60)
        return work(*shared, number)

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(in_thread, range(8)))
    alone = titok_jax.load_pair("digits")
    for number, answers in enumerate(together):
        for mine, expected in zip(answers, work(*alone, number), strict=True):
            np.testing.assert_array_equal(mine, expected)
