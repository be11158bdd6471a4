"""`make bench`: speed, compared in one run as ratios. Absolute seconds are noise on a shared machine.

1. An epoch at the post's settings: the post's way of training (a DataLoader with ToTensor, one flow step after the
   other by indexing) against `planar_helpers.train.fit`.
2. planar_chain for growing K, forward and backward: linear cost, against indexing w[:, k] in a loop.
"""

import argparse
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

from planar_helpers.data import load_images
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


def post_epoch(dataset: PilImages) -> None:
    """One epoch the post's way, its loss added up as the series' earlier VAE posts report it."""
    model = PlainVAE()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-5)
    total = 0.0
    for x, _ in DataLoader(dataset, batch_size=100, shuffle=True):
        loss = model(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()


def paired(first: Callable[[], object], second: Callable[[], object], pairs: int) -> tuple[float, float, float]:
    """Time both, alternating; return both medians and the median of the ratios first/second."""
    times = []
    for _ in range(pairs):
        pair = []
        for task in (first, second):
            start = time.perf_counter()
            task()
            pair.append(time.perf_counter() - start)
        times.append(pair)
    return (
        *(statistics.median(column) for column in zip(*times, strict=True)),
        statistics.median(one / other for one, other in times),
    )


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
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    images = load_images()
    dataset, small_test = PilImages(*images[:2]), images._replace(test=images.test[:1])
    post, ours, ratio = paired(
        lambda: post_epoch(dataset), lambda: fit(PlanarVAE(), small_test, epochs=1, progress=False), pairs
    )
    print(f"one epoch on {images.name}, median of {pairs} pairs on {torch.get_num_threads()} threads:")
    print(f"  the post's loop {post:.2f} s, planar_helpers {ours:.2f} s, {ratio:.2f} times faster (goal 2.3)")
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

        indexed, chain, ratio = paired(lambda a=(z, w, u, b): indexed_chain(*a).backward(), ours, 20)
        print(f"K = {K:3}: planar_chain {1e3 * chain:6.2f} ms, {1e6 * chain / K:5.1f} µs a step; "
              f"indexing takes {ratio:.2f} times as long")  # fmt: skip


if __name__ == "__main__":
    main()
