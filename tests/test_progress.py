"""A collapsed codebook is said, with what helps."""

import pytest
from test_train import small

from titok_jax.training import loop
from titok_jax.training.progress import CodebookWatch
from titok_jax.training.recipes import read_config
from titok_jax.training.settings import parse_settings


def warnings(perplexities, *, differ=0.5, recipe="single_stage:smoke", changes=()) -> dict[int, str]:
    watch = CodebookWatch(parse_settings(read_config(recipe, [f"--config.{change}" for change in changes])))
    found = {}
    for line, perplexity in enumerate(perplexities, 1):
        text = watch.warning(10 * line, {"codebook_perplexity": perplexity, "tokens_differ": differ})
        if text:
            found[10 * line] = text
    return found


def test_five_low_lines_in_a_row_after_the_warm_up_are_a_collapse():
    """128 codes: below 2.56. The warm-up ends at step 15."""
    assert list(warnings([1.0] * 20)) == [60]  # lines 2 to 6, and once only
    assert list(warnings([1.0] * 5 + [2.6] + [2.5] * 9)) == [110]
    assert warnings([2.6] * 20) == {}


def test_a_batch_can_use_no_more_codes_than_it_has_tokens():
    few = ("data.batch_size=2",)  # 2 images of 8 tokens: below 0.32
    assert warnings([1.0] * 20, changes=few) == {}


@pytest.mark.parametrize(
    ("recipe", "differ", "changes", "said"),
    [
        ("single_stage:smoke", 0.01, (), "cannot help: it moves codes onto latents that are alike. a lower"),
        ("single_stage:smoke", 0.5, (), "--config.restart_codes=True moves unused codes"),
        ("single_stage:smoke", 0.5, ("restart_codes=True",), "restart_codes is on and does not suffice"),
        ("maskgit_vqgan:smoke", 0.01, (), "a higher --config.loss.entropy_weight"),
    ],
)
def test_the_remedy_depends_on_what_is_wrong(recipe, differ, changes, said):
    (text,) = warnings([1.04] * 9, recipe=recipe, differ=differ, changes=changes).values()
    assert said in text
    assert "is 1.0;" in text


def test_a_run_prints_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CodebookWatch, "SHARE", 1.0)
    config = small("tokenizer", log_every=1, checkpoint_every=100)
    config.optimizer.warmup_steps = 0
    loop.train(parse_settings(config), tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "collapsed" in line]
    assert len(lines) == 1
    assert lines[0].startswith(
        "WARNING: the codebook has collapsed: its perplexity has stayed below 100 % of 128 codes for 5"
    )
