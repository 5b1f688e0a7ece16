"""The models that are known by name."""

from pathlib import Path

EMBEDDED = Path(__file__).parent / "embedded"

# name -> what it is, for messages and listings
KNOWN = {"digits": "the embedded model: hand-written digits, 32 x 32 pixels, tokenizer and generator"}


def find(name_or_folder: str | Path) -> Path:
    """The folder of a model given by name or by folder.

    Raises:
      ValueError: it is neither a known name nor an existing folder; the message lists the known names.
    """
    name = str(name_or_folder)
    if name in KNOWN:
        return EMBEDDED / name
    if Path(name).is_dir():
        return Path(name)
    known = "".join(f"\n  {known}: {what}" for known, what in KNOWN.items())
    raise ValueError(f"unknown model {name!r}: neither a folder nor one of{known}")
