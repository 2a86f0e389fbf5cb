"""SigLIP from a folder of transformers to a search by words, against transformers' own scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from saved_siglips import byte_pairs, full, siglip_folder

import clip_fast
from clip_fast.cli import main as cli

pytest.importorskip("pyarrow")
PHOTOS = 7


def test_encode_search_and_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    theirs, tokenizer = siglip_folder(tmp_path / "siglip"), byte_pairs(tmp_path / "siglip")
    Path("photos").mkdir()
    for i in range(PHOTOS):
        pixels = np.random.default_rng().integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((90, 70)).save(f"photos/{i}.png")
    options = ["--model", "siglip", "--output", "out/", "--workers", "0", "--shard-size", "3", "--device", "cpu"]
    assert cli.main(["encode", "photos", *options, "--quiet"]) == 0
    assert cli.main(["verify", "out"]) == 0
    assert capsys.readouterr().out == "out: 3 shards, 7 images, no damage found\n"
    texts = ["a photo of a dog", "NAÏVE café"]
    Path("queries.txt").write_text("\n".join(texts), "utf-8")
    assert cli.main(["search", "--queries", "queries.txt", "--index", "out", "-k", str(PHOTOS), "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    _, preprocess = clip_fast.load("siglip", "cpu")
    images = torch.stack([preprocess(Image.open(f"photos/{i}.png")) for i in range(PHOTOS)])
    with torch.no_grad():
        logits = theirs(pixel_values=images, input_ids=full(tokenizer, texts)).logits_per_text
    cosines = (logits - theirs.logit_bias) / theirs.logit_scale.exp()
    scores = {(each["query"], each["image_path"]): each["score"] for each in found}
    for row, text in zip(cosines, texts, strict=True):
        for i, cosine in enumerate(row.tolist()):
            assert scores[text, f"photos/{i}.png"] == pytest.approx(cosine, abs=2e-5)
