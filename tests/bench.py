"""`make bench`: speed, compared in one run as ratios. Absolute seconds are noise on a shared machine.

1. The first epochs at the post's settings: the post's way of training (a DataLoader with ToTensor, one flow step
   after the other by indexing) against `planar_helpers.train.fit`. The post's epochs grow slower: weight decay takes
   weights of pixels that are always black to subnormal numbers, which `fit` sets to 0.
2. planar_chain for growing K, forward and backward: linear cost, against indexing w[:, k] in a loop.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import VisionDataset

from planar_helpers.data import Images, load_images
from planar_helpers.elbo import LOG_2PI
from planar_helpers.planar import _constrain, _det, planar_chain
from planar_helpers.train import fit
from planar_helpers.vae import PlanarVAE


class PilImages(VisionDataset):
    """Serve images as torchvision.datasets.MNIST does: an array, a PIL image, then the transform; and the label."""

    def __init__(self, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__(root="", transform=transforms.Compose([transforms.ToTensor()]))
        self.data, self.targets = pixels.view(-1, 28, 28), labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.data[index].numpy())), int(self.targets[index])


class PlainVAE(nn.Module):
    """The post's architecture and operations (indexing, bmm, epsilons, probabilities), with the steps chained."""

    def __init__(self, hidden: int = 500, D: int = 2, K: int = 3) -> None:
        super().__init__()
        self.D, self.K = D, K
        self.hidden = nn.Linear(784, hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, size) for size in (D, D, D * K, D * K, K))
        self.out = nn.Sequential(nn.Linear(D, hidden), nn.ReLU(), nn.Linear(hidden, 784), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.view(-1, 784)
        h = F.relu(self.hidden(x))
        mu, logvar, w, u, b = (head(h) for head in self.heads)
        w, u, b = w.view(-1, self.K, 1, self.D), u.view(-1, self.K, self.D, 1), b.view(-1, self.K, 1, 1)
        z0 = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        z, sum_ladj = z0.unsqueeze(2), torch.zeros(len(x), 1)
        for k in range(self.K):
            w_k, u_k, b_k = w[:, k], u[:, k], b[:, k]
            s = torch.bmm(w_k, u_k)
            u_hat = u_k + (-1 + F.softplus(s) - s) * w_k.transpose(2, 1) / w_k.norm(dim=2, keepdim=True) ** 2
            a = torch.bmm(w_k, z) + b_k
            z = z + u_hat * torch.tanh(a)
            h_prime = 1 - torch.tanh(a) ** 2
            sum_ladj += (1 + torch.bmm(h_prime * w_k, u_hat)).abs().add(1e-8).log().squeeze(2)
        z0, zK = z0.unsqueeze(1), z.transpose(2, 1)
        scaled = (z0 - mu.unsqueeze(1)).add(1e-8) / (2 * torch.exp(logvar)).unsqueeze(1)
        square = torch.bmm(scaled, (z0 - mu.unsqueeze(1)).transpose(2, 1)).squeeze(2)
        log_q0 = -LOG_2PI - 0.5 * logvar.add(1e-8).sum(dim=1, keepdim=True) - square
        log_pz = -LOG_2PI - 0.5 * torch.bmm(zK, zK.transpose(2, 1)).squeeze(2).add(1e-8)
        log_px_z = -F.binary_cross_entropy(self.out(zK.squeeze(1)), x, reduction="sum") / len(x)
        return (log_q0 - sum_ladj - log_pz).mean() - log_px_z


def post_epochs(dataset: PilImages, epochs: int) -> list[float]:
    """Train the post's way, the loss added up as the series' earlier VAE posts do; return each epoch's seconds."""
    model, seconds = PlainVAE(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    for _ in range(epochs):
        start, total = time.perf_counter(), 0.0
        for x, _ in DataLoader(dataset, batch_size=100, shuffle=True):
            loss = model(x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        seconds.append(time.perf_counter() - start)
    return seconds


def our_epochs(images: Images, epochs: int) -> list[float]:
    """Train by `fit`, the test set cut to one image, as the post's loop has none; return each epoch's seconds."""
    marks = [time.perf_counter()]

    class Marked(PlanarVAE):
        def train(self, mode: bool = True) -> "Marked":  # fit calls this at the start of each epoch
            marks.append(time.perf_counter())
            return super().train(mode)

    fit(Marked(), images._replace(test=images.test[:1]), epochs=epochs, progress=False)
    marks.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(marks[1:])]


def medians(pairs: list[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the median of both columns and of the ratios first/second."""
    first, second = zip(*pairs, strict=True)
    return statistics.median(first), statistics.median(second), statistics.median(a / b for a, b in pairs)


def seconds(task: Callable[[], object]) -> float:
    """Return how long the task takes."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def indexed_chain(z: torch.Tensor, w: torch.Tensor, u: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """planar_chain's own lines, but by indexing: each backward of w[:, k] writes a full (B, K, D)."""
    u_hat, slack = _constrain(w, u, "paper")
    a = []
    for k in range(w.shape[1]):
        a.append((w[:, k] * z).sum(dim=-1, keepdim=True) + b[:, k, None])
        z = z + u_hat[:, k] * torch.tanh(a[-1])
    return z.sum() + torch.log(_det(torch.cat(a, dim=-1), slack)).sum()


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="how often both train, in turns")
    parser.add_argument("--epochs", type=int, default=5, help="for how many epochs")
    arguments = parser.parse_args()
    images = load_images()
    dataset = PilImages(*images[:2])
    pairs = [
        (post_epochs(dataset, arguments.epochs), our_epochs(images, arguments.epochs)) for _ in range(arguments.pairs)
    ]
    print(f"an epoch on {images.name}, medians of {len(pairs)} pairs on {torch.get_num_threads()} threads:")
    for epoch in range(arguments.epochs):
        post, ours, ratio = medians([(one[epoch], other[epoch]) for one, other in pairs])
        print(
            f"  epoch {epoch + 1}: the post's loop {post:.2f} s, planar_helpers {ours:.2f} s, {ratio:.2f} times faster"
        )
    _, _, ratio = medians([(sum(one), sum(other)) for one, other in pairs])
    print(f"  all together: {ratio:.2f} times faster (goal 2.3)")
    for K in (20, 40, 80, 160):
        torch.manual_seed(0)
        z, w, u, b = (
            torch.randn(100, 2),
            torch.randn(100, K, 2) / 9,
            torch.randn(100, K, 2) / 9,
            torch.randn(100, K),
        )
        for tensor in (w, u, b):
            tensor.requires_grad_()

        def ours(z=z, w=w, u=u, b=b) -> None:
            zK, sum_ladj = planar_chain(z, w, u, b)
            (zK.sum() + sum_ladj.sum()).backward()

        def indexed(z=z, w=w, u=u, b=b) -> None:
            indexed_chain(z, w, u, b).backward()

        _, chain, ratio = medians([(seconds(indexed), seconds(ours)) for _ in range(20)])
        print(f"K = {K:3}: planar_chain {1e3 * chain:6.2f} ms, {1e6 * chain / K:5.1f} µs a step; "
              f"indexing takes {ratio:.2f} times as long")  # fmt: skip


if __name__ == "__main__":
    main()
