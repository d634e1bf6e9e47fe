"""Other quantizers, as their users would run them. Each turns rows into codes and codes into rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import faiss
import numpy as np
import torch
from threadpoolctl import threadpool_info
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer import RQGMM, fit_rqgmm
from tokenizer.alternates import calibrated
from tokenizer.gmm import DiagonalGMM

LLOYD_ITERATIONS = 100
Encode = Callable[[Tensor], Tensor]  # (N, D) -> codes (N, L) int32
Centres = Callable[[np.ndarray, int], np.ndarray]  # residuals (N, D) and number of the level -> means (K, D)
Decode = Callable[[Tensor, Tensor], Tensor]  # codes (N, L), rows (N, D) -> (N, D); only PRQ looks at the rows


@dataclass(frozen=True, eq=False)
class Fitted:
    encode: Encode
    decode: Decode


def faiss_kernels() -> str:
    """The processor whose kernels faiss's BLAS uses, by its own name."""
    libraries = (library for library in threadpool_info() if "faiss" in library["filepath"])
    return next((str(library["architecture"]) for library in libraries if "architecture" in library), "unknown")


def rq_gmm(x: Tensor, levels: int, components: int, seed: int) -> Fitted:
    return _of(fit_rqgmm(x, levels=levels, components=components, seed=seed).rqgmm)


def rq_gmm_beam5(x: Tensor, levels: int, components: int, seed: int) -> Fitted:
    return _of(fit_rqgmm(x, levels=levels, components=components, seed=seed, beam=5).rqgmm)


def rq_gmm_paper(x: Tensor, levels: int, components: int, seed: int) -> Fitted:
    """The paper's model as it is written: EM of diagonal mixtures, no annealing."""
    return _of(fit_rqgmm(x, levels=levels, components=components, seed=seed, method="em").rqgmm)


def _of(rqgmm: RQGMM) -> Fitted:
    return Fitted(rqgmm.encode, lambda codes, _: rqgmm.decode(codes))


def rq_kmeans(x: Tensor, levels: int, components: int, seed: int) -> Fitted:
    """faiss k-means per level: every row, 100 iterations (it stops before where nothing moves)."""
    return _of_means(_residual_kmeans(x, levels, _faiss_centres(components, seed)))


def softened_rq_kmeans(x: Tensor, levels: int, components: int, seed: int) -> RQGMM:
    """RQ-KMeans with a posterior to soften: spherical mixtures about its means, with temperatures as RQ-GMM has them.

    The variance is the mean squared distance to the nearest mean, and the temperatures are calibrated on all rows.
    """
    residual, mixtures = x, []
    for means in map(torch.from_numpy, _residual_kmeans(x, levels, _faiss_centres(components, seed))):
        code = torch.from_numpy(_nearest(means.numpy(), residual.numpy()))
        residual = residual - means[code]
        variances = torch.full_like(means, float(residual.square().mean()))
        mixtures.append(DiagonalGMM(torch.full((components,), 1 / components), means, variances))
    hard = RQGMM(tuple(mixtures))
    return replace(hard, temperatures=calibrated(mixtures, x, hard.encode(x), len(x), prior_rows=0))


def _faiss_centres(components: int, seed: int) -> Centres:
    def centres(residual: np.ndarray, level: int) -> np.ndarray:
        kmeans = faiss.Kmeans(
            residual.shape[1],
            components,
            niter=LLOYD_ITERATIONS,
            seed=seed * 1000 + level,
            min_points_per_centroid=1,
            max_points_per_centroid=len(residual),
        )
        kmeans.train(residual)
        return np.asarray(kmeans.centroids)

    return centres


def rq_kmeans_pp(x: Tensor, levels: int, components: int, seed: int) -> Fitted:
    """scikit-learn's k-means++ per level, best of ten starts."""
    from sklearn.cluster import KMeans

    def centres(residual: np.ndarray, level: int) -> np.ndarray:
        fitted = KMeans(components, n_init=10, max_iter=LLOYD_ITERATIONS, random_state=seed * 1000 + level).fit(
            residual
        )
        return np.asarray(fitted.cluster_centers_, np.float32)

    return _of_means(_residual_kmeans(x, levels, centres))


def _residual_kmeans(x: Tensor, levels: int, centres: Centres) -> list[np.ndarray]:
    """The means (K, D) of each level."""
    residual = np.ascontiguousarray(x.numpy(), np.float32).copy()
    codebooks = []
    for level in range(levels):
        means = np.ascontiguousarray(centres(residual, level))
        residual -= means[_nearest(means, residual)]
        codebooks.append(means)
    return codebooks


def _of_means(codebooks: list[np.ndarray]) -> Fitted:
    def encode(rows: Tensor) -> Tensor:
        residual = np.ascontiguousarray(rows.numpy(), np.float32).copy()
        codes = []
        for means in codebooks:
            codes.append(_nearest(means, residual))
            residual -= means[codes[-1]]
        return torch.tensor(np.stack(codes, axis=1), dtype=torch.int32)

    return Fitted(
        encode,
        lambda codes, _: sum((torch.tensor(m)[codes[:, n].long()] for n, m in enumerate(codebooks)), torch.zeros(())),
    )


def _nearest(means: np.ndarray, rows: np.ndarray) -> np.ndarray:
    index = faiss.IndexFlatL2(means.shape[1])
    index.add(means)
    near: np.ndarray = index.search(rows, 1)[1][:, 0]
    return near


def faiss_rq(beam: int) -> Callable[[Tensor, int, int, int], Fitted]:
    """faiss ResidualQuantizer, trained and encoded with one beam width."""

    def fit(x: Tensor, levels: int, components: int, seed: int) -> Fitted:
        bits = components.bit_length() - 1
        if 2**bits != components:
            raise ValueError(f"faiss-rq needs a power of two, components is {components}; leave it out of --quantizers")
        rq = faiss.ResidualQuantizer(x.shape[1], levels, bits)
        rq.max_beam_size = beam
        rq.cp.seed, rq.cp.min_points_per_centroid, rq.cp.max_points_per_centroid = seed + 1, 1, len(x)
        rq.train(np.ascontiguousarray(x.numpy()))

        def encode(rows: Tensor) -> Tensor:
            packed = rq.compute_codes(np.ascontiguousarray(rows.numpy()))
            code_bits = np.unpackbits(packed, axis=1, bitorder="little")[:, : levels * bits].reshape(-1, levels, bits)
            return torch.tensor(code_bits @ (1 << np.arange(bits)), dtype=torch.int32)

        means = torch.tensor(faiss.vector_to_array(rq.codebooks).reshape(levels, components, -1))
        return Fitted(
            encode, lambda codes, _: sum((means[n][codes[:, n].long()] for n in range(levels)), torch.zeros(()))
        )

    return fit


def prq_kmeans(x: Tensor, levels: int, components: int, seed: int, top: int = 3, steps: int = 30) -> Fitted:
    """Projection residuals (Kuaishou 2026): the mean taken off, top-k soft updates, residual r - (r.c / |c|^2) c.

    Its reconstruction keeps one scalar per level and row beside the codes, so its RMSE is not of codes alone.
    """
    centre = x.mean(0)
    codebooks: list[Tensor] = []
    residual = x - centre
    generator = torch.Generator().manual_seed(seed)
    for _ in range(levels):
        means = residual[torch.randperm(len(residual), generator=generator)[:components]].clone()
        for _ in range(steps):
            near, index = torch.cdist(residual, means).topk(min(top, components), largest=False)
            weight = (-near.square() / near.square().mean()).softmax(dim=1)
            total = torch.zeros(components).index_add_(0, index.flatten(), weight.flatten())
            sums = torch.zeros_like(means)
            for rank in range(index.shape[1]):
                sums.index_add_(0, index[:, rank], weight[:, rank, None] * residual)
            means = torch.where(total[:, None] > 1e-6, sums / total.clamp_min(1e-6)[:, None], means)
        codebooks.append(means)
        chosen = means[torch.cdist(residual, means).argmin(1)]
        residual = residual - _projection(residual, chosen)

    def encode(rows: Tensor) -> Tensor:
        residual, codes = rows - centre, []
        for means in codebooks:
            codes.append(torch.cdist(residual, means).argmin(1))
            residual = residual - _projection(residual, means[codes[-1]])
        return torch.stack(codes, dim=1).int()

    def decode(codes: Tensor, rows: Tensor) -> Tensor:
        residual = rows - centre
        for level, means in enumerate(codebooks):
            residual = residual - _projection(residual, means[codes[:, level].long()])
        return rows - residual

    return Fitted(encode, decode)


def _projection(rows: Tensor, means: Tensor) -> Tensor:
    scale = (rows * means).sum(1, keepdim=True) / means.square().sum(1, keepdim=True).clamp_min(1e-12)
    return scale * means


def rq_vae(x: Tensor, levels: int, components: int, seed: int, epochs: int = 60) -> Fitted:
    """A small RQ-VAE: encoder and decoder of one hidden layer, straight-through quantization, k-means start."""
    torch.manual_seed(seed)
    dim, latent = x.shape[1], min(64, x.shape[1])
    scale = x.std()
    encoder = nn.Sequential(nn.Linear(dim, 256), nn.SiLU(), nn.Linear(256, latent))
    decoder = nn.Sequential(nn.Linear(latent, 256), nn.SiLU(), nn.Linear(256, dim))
    codebooks = nn.Parameter(torch.zeros(levels, components, latent))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), codebooks], lr=1e-3)
    order = torch.Generator().manual_seed(seed)

    def quantized(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        residual, total, loss, codes = z, torch.zeros_like(z), z.new_zeros(()), []
        for level in range(levels):
            code = torch.cdist(residual.detach(), codebooks[level].detach()).argmin(1)
            chosen = codebooks[level][code]
            loss = loss + F.mse_loss(chosen, residual.detach()) + 0.25 * F.mse_loss(residual, chosen.detach())
            total, residual = total + chosen, residual - chosen.detach()
            codes.append(code)
        return z + (total - z).detach(), loss, torch.stack(codes, dim=1).int()

    for epoch in range(epochs):
        if epoch == 5:  # the encoder has settled a little: start the codebooks from its own latents
            with torch.no_grad():
                residual = encoder(x / scale)
                for level in range(levels):
                    kmeans = faiss.Kmeans(
                        latent, components, niter=20, seed=seed + level + 1, min_points_per_centroid=1
                    )
                    kmeans.train(residual.numpy())
                    codebooks[level] = torch.tensor(kmeans.centroids)
                    residual = residual - codebooks[level][torch.cdist(residual, codebooks[level]).argmin(1)]
        for rows in torch.randperm(len(x), generator=order).split(512):
            batch = x[rows] / scale
            z = encoder(batch)
            latents, loss, _ = quantized(z) if epoch >= 5 else (z, z.new_zeros(()), None)
            loss = loss + F.mse_loss(decoder(latents), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def encode(rows: Tensor) -> Tensor:
        with torch.no_grad():
            codes: Tensor = quantized(encoder(rows / scale))[2]
            return codes

    def decode(codes: Tensor, _: Tensor) -> Tensor:
        with torch.no_grad():
            latents = torch.stack([codebooks[level][codes[:, level].long()] for level in range(levels)]).sum(0)
            vectors: Tensor = decoder(latents) * scale
            return vectors

    return Fitted(encode, decode)


def vq_vae(x: Tensor, levels: int, components: int, seed: int) -> Fitted:
    """RQ-VAE of a single level: one code per item."""
    return rq_vae(x, 1, components, seed)


QUANTIZERS: dict[str, Callable[[Tensor, int, int, int], Fitted]] = {
    "rq-gmm": rq_gmm,
    "rq-gmm-beam5": rq_gmm_beam5,
    "rq-gmm-paper": rq_gmm_paper,
    "rq-kmeans": rq_kmeans,
    "rq-kmeans++": rq_kmeans_pp,
    "faiss-rq-beam1": faiss_rq(1),
    "faiss-rq-beam5": faiss_rq(5),
    "prq-kmeans": prq_kmeans,
    "rq-vae": rq_vae,
    "vq-vae": vq_vae,
}
