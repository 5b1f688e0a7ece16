"""A prepared TFDS set that names Python classes of its own: their modules are not imported."""

import json

import pytest

from titok_jax import pretokenize
from titok_jax.data import sources, tfds_files

OWN = "a_strangers_module.Feature"
PLAIN = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
LABEL = {
    "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
    "classLabel": {"numClasses": "3"},
}


def features(**by_name):
    return {"pythonClassName": PLAIN, "featuresDict": {"features": by_name}}


# Each names the class in another place or form that TFDS reads.
FORMS = {
    "top": json.dumps({"pythonClassName": OWN, "jsonFeature": {"json": "{}"}}),
    "nested": json.dumps(features(label=LABEL, image=features(a=features(b={"pythonClassName": OWN})))),
    "sequence": json.dumps(features(a={"pythonClassName": f"{PLAIN}", "sequence": {"feature": {"pythonClassName": OWN}}})),
    "snake case": json.dumps({"python_class_name": OWN}),
    "former form": json.dumps({"type": PLAIN, "content": {"a": {"type": OWN, "content": {}}}}),
    "former form as text": json.dumps({"type": PLAIN, "content": json.dumps({"features": {"a": {"pythonClassName": OWN}}})}),
    "text in a feature": json.dumps(
        features(
            a={"pythonClassName": PLAIN, "jsonFeature": {"json": json.dumps({"feature": {"type": OWN, "content": {}}})}}
        )
    ),
    "twice": f'{{"pythonClassName": "{OWN}", "pythonClassName": "{PLAIN}"}}',
    "escaped": f'{{"\\u0070ythonClassName": "{OWN}"}}',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a version of a set, beside a module that must not be imported."""
    (tmp_path / "a_strangers_module.py").write_text("import pathlib\npathlib.Path(__file__).with_name('it_ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "data" / "tiny" / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(json.dumps({"name": "tiny", "version": "1.0.0", "fileFormat": "array_record"}))
    yield folder
    assert not (tmp_path / "it_ran").exists()


@pytest.mark.parametrize("form", FORMS)
def test_classes_of_others_are_refused(form, folder):
    pytest.importorskip("tensorflow_datasets")
    (folder / "features.json").write_text(FORMS[form])
    message = rf"{folder}/features\.json names the feature class {OWN}, which is not one of tensorflow_datasets; code that"
    for spec in (
        {"path": str(folder)},
        {"dataset": "tiny", "data_dir": str(folder.parents[1])},
        {"dataset": "tiny:1.0.0", "data_dir": str(folder.parents[1])},
    ):
        with pytest.raises(ValueError, match=message):
            sources.make_source({"name": "tfds", "split": "train"} | spec)


def test_every_configuration_of_a_set_is_checked(folder, monkeypatch, capsys):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder.parents[1]))
    (folder / "features.json").write_text(json.dumps(features(label=LABEL)))
    other = folder.parent / "large" / "2.0.0"
    other.mkdir(parents=True)
    (other / "features.json").write_text(FORMS["nested"])
    assert pretokenize.main(["tfds:tiny/large:2.0.0:train", "--out", str(folder / "out")]) == 2
    assert f"{other}/features.json names the feature class {OWN}" in capsys.readouterr().err


def test_classes_of_tfds_pass(folder):
    # A feature may have the name of a key.
    fields = features(label=LABEL, type=LABEL, content=LABEL, json=LABEL, pythonClassName=LABEL)
    for text in (json.dumps(fields), json.dumps({"type": PLAIN, "content": {"a": {"type": PLAIN, "content": {}}}})):
        (folder / "features.json").write_text(text)
        for place in (folder, folder.parent):
            tfds_files.check_feature_classes(place)
    for name in ("tensorflow_datasets", "tensorflow_datasets_of_mine.A", "tensorflow_datasets.a b", "", "os.path\x1b[2J"):
        (folder / "features.json").write_text(json.dumps({"pythonClassName": name}))
        with pytest.raises(ValueError, match="names the feature class") as error:
            tfds_files.check_feature_classes(folder)
        assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b" " * 10_000_001])
def test_what_cannot_be_read_is_refused(content, folder):
    (folder / "features.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"features.json (is not valid JSON|has 10,000,001 bytes)"):
        tfds_files.check_feature_classes(folder)
