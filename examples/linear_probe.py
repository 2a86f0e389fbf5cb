"""A linear probe with scikit-learn: how far do CLIP's embeddings tell the classes of a data set apart?

    pip install scikit-learn
    python examples/linear_probe.py train/ test/ --model ViT-B/32

Both folders hold one folder for each class. Radford et al. 2021, appendix A.3: logistic regression on the features that
`encode_image` gives, not normalised. The paper searches for the strength of regularisation; this program takes
scikit-learn's default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader, Dataset

import clip_fast
from clip_fast import ImageEncoder, Preprocess


class Folders(Dataset[tuple[object, str]]):
    """The pictures in the folders of a folder, each labelled with the name of its own folder."""

    def __init__(self, folder: Path, preprocess: Preprocess) -> None:
        self.paths = sorted(path for path in folder.glob("*/*") if path.is_file())
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[object, str]:
        with Image.open(self.paths[index]) as picture:
            return self.preprocess(picture), self.paths[index].parent.name


@torch.no_grad()
def features(encoder: ImageEncoder, data: Folders, workers: int = 0) -> tuple[NDArray[np.float32], list[str]]:
    """Embeddings (pictures, embed_dim) and labels."""
    rows, labels = [], []
    for images, names in DataLoader(data, batch_size=256, num_workers=workers):
        rows.append(encoder.encode_image(images).float().cpu().numpy())
        labels += names
    return np.concatenate(rows), labels


def probe(encoder: ImageEncoder, preprocess: Preprocess, train: Path, test: Path, workers: int = 0) -> float:
    """Accuracy on `test` of a linear classifier of the embeddings of `train`."""
    classifier = LogisticRegression(max_iter=1000).fit(*features(encoder, Folders(train, preprocess), workers))
    return float(classifier.score(*features(encoder, Folders(test, preprocess), workers)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Linear probe")
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--model", default="ViT-B/32", help="a name or a checkpoint, as clip_fast.load takes it")
    parser.add_argument("--workers", type=int, default=4, help="processes that decode")
    options = parser.parse_args()
    encoder, preprocess = clip_fast.load(options.model)
    print(f"accuracy {probe(encoder, preprocess, options.train, options.test, options.workers):.2%}")


if __name__ == "__main__":
    main()
