"""The formulas of the methods, in loops over whole gradients in float64: the slow twins of the scores."""

from __future__ import annotations

import numpy as np
import scipy.linalg

from tests.analysis.synthetic import SAMPLES, STEPS, TIMES, Rows, Synthetic

UNIT = ("retrac", "das", "whitened-retrac")
WHITENED = ("trak", "d-trak", "das", "whitened-retrac")


def query_direction(rows: Rows, query: int, step: int, method: str, kept: list[int]) -> np.ndarray:
    """1/|S| Σ_t of the mean over noise that is kept, for ReTrac over the norm of that over all."""
    return np.mean(directions_by_time(rows, query, step, method, kept), axis=0)


def directions_by_time(rows: Rows, query: int, step: int, method: str, kept: list[int]) -> list[np.ndarray]:
    by_time = []
    for timestep in TIMES:
        draws = {
            seed: gradient
            for gradient, s, k, t, seed in each_row(rows)
            if (s, k, t) == (query, step, timestep)
        }
        mean = np.mean([draws[seed] for seed in kept], axis=0)
        whole = np.linalg.norm(np.mean(list(draws.values()), axis=0))
        by_time.append(mean / whole if method in UNIT else mean)
    return by_time


def each_row(rows: Rows) -> list[tuple[np.ndarray, int, int, float, int]]:
    columns = (rows.columns[c].tolist() for c in ("sample", "step", "timestep", "noise_seed"))
    return list(zip(rows.gradient, *columns, strict=True))


def nearest_step(step: int) -> int:
    return min(STEPS, key=lambda k: (abs(k - step), k))


def rows_of_sample(rows: Rows, sample: int, snapshot: int) -> list[tuple[np.ndarray, float, float]]:
    """(gradient, lr · weight, weight) of a sample's rows nearest to a snapshot."""
    lr, weight = rows.columns["lr"].astype(float), rows.columns["weight"].astype(float)
    return [
        (gradient, lr[r] * weight[r], weight[r])
        for r, (gradient, s, step, _, _) in enumerate(each_row(rows))
        if s == sample and nearest_step(step) == snapshot
    ]


RIDGE = {"trak": 0.1, "d-trak": 0.1, "das": 0.1, "whitened-retrac": 0.1}


def direct(
    rows: Rows, asked: Rows, method: str, kept: list[int] | None = None, ridge: float | None = None
) -> np.ndarray:
    kept = [0, 1, 2] if kept is None else kept
    ridge = RIDGE.get(method) if ridge is None else ridge
    scores = np.zeros((4, len(SAMPLES)))
    for step in STEPS:
        queries = [query_direction(asked, q, step, method, kept) for q in range(4)]
        if method in WHITENED:
            features = np.zeros((len(SAMPLES), rows.gradient.shape[1]))
            for i, sample in enumerate(SAMPLES):
                mine = rows_of_sample(rows, sample, step)
                each = [(g / np.linalg.norm(g) if method in UNIT else g, w) for g, _, w in mine]
                features[i] = sum(w * g for g, w in each) / sum(w for _, w in each)
            gram = moment(rows) if method == "whitened-retrac" else features.T @ features
            scores += np.array(queries) @ kernel_of(method, gram, ridge) @ features.T / len(STEPS)
            continue
        for i, sample in enumerate(SAMPLES):
            mine = rows_of_sample(rows, sample, step)
            total, rate = sum(rate * g for g, rate, _ in mine), sum(rate for _, rate, _ in mine)
            for q, asking in enumerate(queries):
                if method == "tracin":
                    scores[q, i] += sum(rate * (g @ asking) for g, rate, _ in mine)
                elif method == "retrac":
                    scores[q, i] += sum(rate * (g / np.linalg.norm(g) @ asking) for g, rate, _ in mine)
                else:
                    cosine = total @ asking / np.linalg.norm(total) / np.linalg.norm(asking)
                    scores[q, i] += rate * cosine
    return scores


def of_events(rows: Rows, asked: Rows) -> np.ndarray:
    """Whitened ReTrac of the training's events, each against the queries around the centre next to its
    timestep, by Gaussian weights as wide as centres are apart."""
    kernel = kernel_of("whitened-retrac", moment(rows))
    centres = np.linspace(min(TIMES), max(TIMES), 8)
    scores = np.zeros((4, len(SAMPLES)))
    for step in STEPS:
        queries = [directions_by_time(asked, q, step, "whitened-retrac", [0, 1, 2]) for q in range(4)]
        for i, sample in enumerate(SAMPLES):
            mine = [
                (gradient / np.linalg.norm(gradient), timestep)
                for gradient, s, taken, timestep, _ in each_row(rows)
                if s == sample and nearest_step(taken) == step
            ]
            for unit, timestep in mine:
                centre = min(centres, key=lambda c: (abs(c - timestep), c))
                near = np.exp(-(((np.array(TIMES) - centre) / (centres[1] - centres[0])) ** 2) / 2)
                for q, by_time in enumerate(queries):
                    asking = near @ np.array(by_time) / near.sum()
                    scores[q, i] += asking @ kernel @ unit / len(mine) / len(STEPS)
    return scores


def moment(rows: Rows) -> np.ndarray:
    """The mean over all rows of the outer product of the unit gradient with itself."""
    units = rows.gradient / np.linalg.norm(rows.gradient, axis=1, keepdims=True)
    return sum(np.outer(unit, unit) for unit in units) / len(units)


def kernel_of(method: str, gram: np.ndarray, ridge: float | None = None) -> np.ndarray:
    """(G + λI)⁻¹; for the method that whitens both sides, its square times λ²."""
    level = (RIDGE[method] if ridge is None else ridge) * np.trace(gram) / len(gram)
    inverse = np.linalg.inv(gram + level * np.eye(len(gram)))
    return level**2 * inverse @ inverse if method == "whitened-retrac" else inverse


def left_out(made: Synthetic, method: str, gone: int) -> np.ndarray:
    """(Q, N) without one replicate on either side; what a method takes from all samples is that of all, but
    for the second moment of rows, whose change counts to first order."""
    kept = [r for r in range(3) if r != gone]
    asked = made.queries["new"]
    if method not in ("cosine", *WHITENED):
        return direct(some(made.probe, kept), asked, method, kept)
    scores = np.zeros((4, len(SAMPLES)))
    for step in STEPS:
        whole, left = (
            np.array([feature(rows, sample, step, method) for sample in SAMPLES])
            for rows in (made.probe, some(made.probe, kept))
        )
        queries = np.array([query_direction(asked, q, step, method, kept) for q in range(4)])
        if method == "cosine":
            rates = [sum(rate for _, rate, _ in rows_of_sample(made.probe, s, step)) for s in SAMPLES]
            norms = np.linalg.norm(whole, axis=1)
            units = queries / np.linalg.norm(queries, axis=1, keepdims=True)
            scores += units @ left.T * rates / norms
        else:
            gram = moment(made.probe) if method == "whitened-retrac" else whole.T @ whole
            kernel = kernel_of(method, gram)
            changed = queries @ kernel
            if method == "whitened-retrac":
                of_all = np.array([query_direction(asked, q, step, method, [0, 1, 2]) for q in range(4)])
                root, change = scipy.linalg.sqrtm(kernel), moment(some(made.probe, kept)) - gram
                moved = root @ change @ kernel + kernel @ change @ root
                moved /= RIDGE[method] * np.trace(gram) / len(gram)
                changed = changed - of_all @ moved
            scores += changed @ left.T / len(STEPS)
    return scores


def some(rows: Rows, kept: list[int]) -> Rows:
    """The rows of some replicates, in the place of all."""
    chosen = np.isin(rows.columns["replicate"], kept)
    columns = {name: values[chosen] for name, values in rows.columns.items()}
    return Rows(rows.gradient[chosen], {**columns, "weight": columns["weight"] * 3 / len(kept)})


def feature(rows: Rows, sample: int, step: int, method: str) -> np.ndarray:
    mine = rows_of_sample(rows, sample, step)
    return np.mean([g / np.linalg.norm(g) if method in UNIT else g for g, _, _ in mine], axis=0)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
