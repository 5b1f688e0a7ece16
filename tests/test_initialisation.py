"""New parameters of every published model against those of the published constructors: kind of distribution, mean, standard
deviation, largest magnitude.

golden/initialisation.json holds what benchmarks/initialisation.py measured there, by groups of parameters: those of a kind
of model that have one shape, and one name but for the numbers of layers.
"""

import collections
import dataclasses
import math
import pathlib

import golden_data as gd
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from titok_jax import models
from titok_jax.models.generator import GeneratorConfig
from titok_jax.models.layers import normal_init, uniform_init
from titok_jax.weights import convert, published_models

TOOL = pathlib.Path(__file__).parents[1] / "benchmarks" / "initialisation.py"
# What the original JAX code gave stands for what the PyTorch code gave, which never trains the MaskGIT-VQGAN.
PUBLISHED = gd.load_json("initialisation.json")
# Networks without published initialisation: those of losses and metrics are always read from files, the last is our own.
NOT_COMPARED = (models.PerceptualConfig, models.InceptionConfig, models.DigitsNetConfig)

NUMBERS = 16_384  # drawn for each parameter
# Two measurements may differ by five standard errors, which happens by chance once in 1.7 million comparisons. These are
# some thousand, and seeded, so that no machine has another chance.
ERRORS = 5.0
CHANCE = 1e-7  # of a largest magnitude as small, or as large, as the least probable that passes
# Kurtosis of a distribution, and n times the variance of the kurtosis of n numbers.
KURTOSIS = {"normal": (3.0, 24.0), "uniform": (1.8, 1.32)}


def published_configs() -> dict[str, list[models.Config]]:
    """{kind: configurations}. Stage 1 of a two-stage tokenizer is a model of its own."""
    configs = collections.defaultdict(list)
    for model in published_models.MODELS:
        if model.architecture is None:
            continue
        if model.kind == "vqgan":
            configs["maskgit_vqgan"].append(models.MaskgitVQGANConfig.from_published(model.published_config))
        elif model.kind == "generator":
            config = GeneratorConfig.from_published(model.published_config)
            configs[config.model_type].append(config)
        else:
            config = models.TiTokConfig.from_published(model.published_config)
            configs["tokenizer"].append(config)
            if config.is_legacy:
                configs["tokenizer"].append(dataclasses.replace(config, finetune_decoder=False))
    configs["discriminator"].append(models.DiscriminatorConfig())
    return configs


# How jax.random makes uniform numbers, normal ones and cut normal ones of random bits, number by number.
ELEMENTWISE = {
    *("shift_right_logical", "or", "bitcast_convert_type", "convert_element_type", "add", "sub", "mul", "div", "max", "min"),
    *("erf", "erf_inv", "sqrt", "nextafter", "stop_gradient"),
}
LAYOUT = {"broadcast_in_dim", "reshape", "squeeze"}


def draw(jaxpr, constants, inputs, rng: np.random.Generator) -> list:
    """Runs the program of an initialisation with NUMBERS numbers in place of each array, whatever its size: the published
    models have billions. All numbers of an array must be made alike, each from random bits of its own.

    Returns [NUMBERS] for each output. What is not made so is a string instead: "key", or the name of the first primitive
    that is not known here.
    """
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *inputs], strict=True))

    def read(atom):
        return jnp.full(NUMBERS, atom.val) if hasattr(atom, "val") else known[atom]

    for equation in jaxpr.eqns:
        name, values = equation.primitive.name, [read(atom) for atom in equation.invars]
        unknown = [value for value in values if isinstance(value, str)]
        outputs = (unknown[:1] or [name]) * len(equation.outvars)
        if name == "random_bits":
            outputs = [rng.integers(0, 2**32, NUMBERS, dtype=np.uint32)]
        elif "jaxpr" in equation.params:
            inner = equation.params["jaxpr"]
            outputs = draw(inner.jaxpr, [jnp.full(NUMBERS, c) for c in inner.consts], values, rng)
        elif name in ELEMENTWISE and not unknown:
            outputs = [equation.primitive.bind(*values, **equation.params)]
        elif name in LAYOUT and not unknown:
            grows = equation.outvars[0].aval.size > equation.invars[0].aval.size
            if not grows or np.ptp(values[0]) == 0:  # a number that is repeated is a constant
                outputs = values[:1]
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def new_parameters(config: models.Config, rng: np.random.Generator) -> list[tuple[dict[str, tuple[int, ...]], np.ndarray]]:
    """For each parameter of a model: {published name: shape}, and NUMBERS numbers as `models.init` draws them."""
    closed, shapes = jax.make_jaxpr(lambda key: models.init(config, key), return_shape=True)(jax.random.key(0))
    outputs = draw(closed.jaxpr, closed.consts, ["key"], rng)
    table, leaves = convert.table_for(config), convert.flatten(shapes)
    return [
        (convert.published_shapes(table, convert.unflatten({path: leaf})), numbers)
        for (path, leaf), numbers in zip(leaves.items(), outputs, strict=True)
    ]


def check(label: str, numbers: np.ndarray, row: float | list[float]) -> None:
    """Compares numbers with a published row: a constant, or count, mean, standard deviation, largest magnitude, kurtosis."""
    x = np.asarray(numbers, np.float64).reshape(-1)
    if isinstance(row, float):
        assert (x == row).all(), f"{label}: {x.min()} to {x.max()}, published {row}"
        return
    assert np.ptp(x) > 0, f"{label}: always {x[0]}, published standard deviation {row[2]}"
    count, mean, std, largest, kurtosis = row
    kind = min(KURTOSIS, key=lambda kind: abs(kurtosis - KURTOSIS[kind][0]))
    exact, variance = KURTOSIS[kind]
    center = x - x.mean()
    found = np.mean(center**4) / np.mean(center**2) ** 2
    gd.within(kurtosis - exact, ERRORS * math.sqrt(variance / count), f"{label}: published kurtosis {kurtosis}, {kind}")
    gd.within(found - exact, ERRORS * math.sqrt(variance / x.size), f"{label}: kurtosis {found}, published {kind}")
    error = ERRORS * math.sqrt(1.0 / count + 1.0 / x.size)
    gd.within(x.mean() - mean, std * error, f"{label}: mean {x.mean()}, published {mean}")
    of_std = error * math.sqrt((exact - 1.0) / 4.0)
    gd.within(x.std() / std - 1.0, of_std, f"{label}: standard deviation {x.std()}, published {std}")
    if kind == "normal":
        check_largest_of_normal(np.abs(x).max(), std, x.size, label)
        check_largest_of_normal(largest, std, count, f"{label}, published")
    else:
        # Of n numbers the largest lacks a share of -log(CHANCE) / n to the bound, or less.
        lack = -math.log(CHANCE)
        least, most = largest * (1 - lack / x.size), largest * (1 + lack / count)
        assert least < np.abs(x).max() < most, f"{label}: largest {np.abs(x).max()}, published {largest}"


def check_largest_of_normal(largest: float, std: float, count: int, label: str) -> None:
    """Asserts that `largest` is a probable largest magnitude of `count` numbers."""
    beyond = math.erfc(largest / std / math.sqrt(2.0))
    all_within = count * math.log1p(-beyond)  # logarithm of the probability
    assert math.log(CHANCE) < all_within < math.log1p(-CHANCE), f"{label}: largest {largest}, standard deviation {std}"


@pytest.mark.parametrize("kind", sorted(published_configs()))
def test_every_parameter_is_drawn_as_published(kind, tool):
    rng, rows, compared = np.random.default_rng(0), PUBLISHED[kind] | PUBLISHED.get(f"{kind} in JAX", {}), set()
    for config in published_configs()[kind]:
        for shapes, numbers in new_parameters(config, rng):
            for group in {tool.group(name, shape) for name, shape in shapes.items()}:
                assert not isinstance(numbers, str), f"{group}: made with {numbers}, which `draw` does not know"
                check(f"{kind} {group}", numbers, rows[group])
                compared.add(group)
    assert compared == set(rows)


def test_every_model_is_compared():
    compared = {type(config) for configs in published_configs().values() for config in configs}
    assert compared | set(NOT_COMPARED) == {family.config for family in models.families()}
    assert set(published_configs()) == set(PUBLISHED) - {"made with", "maskgit_vqgan in JAX"}


def test_a_whole_model_is_drawn_as_published(tool):
    """What `draw` leaves out: arrays of their true size, and JAX's random bits."""
    config, rows = models.DiscriminatorConfig(), PUBLISHED["discriminator"]
    params = jax.jit(lambda key: models.init(config, key))(jax.random.key(0))
    for name, array in convert.to_published(convert.table_for(config), params).items():
        group = tool.group(name, array.shape)
        if array.size > 1:
            check(group, array, rows[group])


@pytest.mark.parametrize(
    ("init", "row"),
    [(normal_init(0.02), (10**9, 0.0, 0.02, 0.12, 3.0)), (uniform_init(0.5), (10**9, 0.0, 0.5 / 3**0.5, 0.5, 1.8))],
)
def test_initialisers(init, row):
    check("", init(jax.random.key(0), (512, 1024)), row)
