"""Two small problems whose hypergradient is known exactly, and each estimator of it, in float64.

Nobody knows the true gradient of a recommender's quality with respect to the sequences it was
trained on; on these convex problems it is known. The problem is the bi-level one of `foster`,
min_S L_real(φ*(S)) with φ*(S) = argmin_φ L_syn(φ; S), and the truth is the implicit function
theorem: with H = ∂²L_syn/∂φ² at φ* and H q = ∇L_real(φ*),

    dL_real/dS = −∂_S ⟨∂_φ L_syn(φ*; S), q⟩.

| estimator | function | needs |
|---|---|---|
| implicit function theorem | `implicit_gradient` | the Hessian |
| backpropagation through T steps | `unrolled_gradient` | second derivatives, T graphs |
| the same without second order (FOMAML) | `unrolled_gradient` | nothing: it is zero |
| FOSTER's adjoint: reverse recursion by finite differences | `adjoint_gradient` | input gradients, T weights |
| penalty, both models converged | `penalty_gradient` | input gradients |
| FOSTER's penalty form, both models W steps on | `Alternation` | input gradients, two models |

S is one tensor that holds inputs and targets; θ and φ are one tensor of weights each. A problem has
L_syn(θ; S) `synthetic`, L_real(θ) `real`, the weights that training begins with `start`, and
θ_λ = argmin L_syn + L_real / λ `solution`, which is φ*(S) for λ = ∞.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foster_lib.errors import FosterError
from foster_lib.sasrec import ModelSettings
from foster_lib.subsets import Subset, SyntheticBatch
from foster_lib.training import Batch


def _normal(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def _solve(hessian: Tensor, right: Tensor) -> Tensor:
    """hessian⁻¹ · right; `FosterError` where the loss has no single minimum."""
    factor, failed = torch.linalg.cholesky_ex(hessian)
    if failed:
        raise FosterError("the loss has no single minimum: give S more positions, or take a larger |λ|.")
    return torch.cholesky_solve(right[:, None], factor)[:, 0]


@dataclass(frozen=True)
class Ridge:
    """Ridge regression on n synthetic rows S = [X | s], judged on m real rows; all in closed form.

        L_syn(φ; S) = ‖Xφ − s‖² / 2n + μ‖φ‖² / 2,    L_real(θ) = ‖Aθ − b‖² / 2m

    real_inputs : (m, d) A; real_targets : (m,) b; ridge : μ. S is (n, d + 1), weights are (d,).
    """

    real_inputs: Tensor
    real_targets: Tensor
    ridge: float = 0.1

    @classmethod
    def random(cls, seed: int, rows: int, width: int, real_rows: int = 40, noise: float = 0.3) -> tuple[Ridge, Tensor]:
        """A linear truth with noise, and an S of `rows` normal rows: (problem, S)."""
        A, S, truth, error = _normal(seed, (real_rows, width), (rows, width + 1), (width,), (real_rows,))
        return cls(A, A @ truth + noise * error), S

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.real_inputs[0])

    def synthetic(self, theta: Tensor, S: Tensor) -> Tensor:
        return ((S[:, :-1] @ theta - S[:, -1]) ** 2).mean() / 2 + self.ridge * (theta**2).sum() / 2

    def real(self, theta: Tensor) -> Tensor:
        return ((self.real_inputs @ theta - self.real_targets) ** 2).mean() / 2

    def hessian(self, S: Tensor) -> Tensor:
        """H = XᵀX / n + μI, (d, d)."""
        X = S[:, :-1]
        return X.T @ X / len(S) + self.ridge * torch.eye(X.shape[1], dtype=S.dtype)

    def solution(self, S: Tensor, penalty: float = torch.inf) -> Tensor:
        """θ_λ by its normal equations (H + AᵀA/mλ) θ = Xᵀs/n + Aᵀb/mλ."""
        A, weight = self.real_inputs, 1 / (penalty * len(self.real_inputs))
        right = S[:, :-1].T @ S[:, -1] / len(S) + weight * A.T @ self.real_targets
        return _solve(self.hessian(S) + weight * A.T @ A, right)

    def hypergradient(self, S: Tensor) -> Tensor:
        """dL_real(φ*(S))/dS: −[(Xφ* − s) qᵀ + (Xq) φ*ᵀ] / n for X, and Xq / n for s."""
        X, s, A, phi = S[:, :-1], S[:, -1], self.real_inputs, self.solution(S)
        q = _solve(self.hessian(S), A.T @ (A @ phi - self.real_targets) / len(A))
        of_inputs = -(torch.outer(X @ phi - s, q) + torch.outer(X @ q, phi))
        return torch.cat([of_inputs, (X @ q)[:, None]], 1) / len(S)

    def best_targets(self, S: Tensor) -> Tensor:
        """S with the targets that minimise L_real(φ*(S)), X as it is: least squares, φ* is linear in s."""
        X = S[:, :-1]
        response = self.real_inputs @ torch.linalg.solve(self.hessian(S), X.T) / len(S)  # A φ*(s) = response · s
        return torch.cat([X, torch.linalg.lstsq(response, self.real_targets[:, None]).solution], 1)


@dataclass(frozen=True)
class SoftmaxRegression:
    """A recommender without layers, on T synthetic positions: convex, but not quadratic.

        L_syn(φ; S) = −(1/T) Σ_t y_t · log softmax(p_t E φ Eᵀ)

    S (2, T, N) holds the logits of the input mixtures p and of the targets y over N items, as FOSTER's
    sequences do. L_real(θ) is the cross-entropy from a teacher to θ, with each item once as input.

    items : (N, d) E; teacher : weights (d, d), as φ and θ are.
    """

    items: Tensor
    teacher: Tensor

    @classmethod
    def random(cls, seed: int, positions: int = 8, items: int = 8, width: int = 2) -> tuple[SoftmaxRegression, Tensor]:
        """(problem, S), both drawn at random."""
        E, teacher, S = _normal(seed, (items, width), (width, width), (2, positions, items))
        E = torch.linalg.qr(E)[0] * items**0.5  # directions of equal weight: few steps suffice to train
        return cls(E, teacher), S * S.new_tensor([4, 2])[:, None, None]

    @property
    def start(self) -> Tensor:
        return torch.zeros_like(self.teacher)

    def synthetic(self, theta: Tensor, S: Tensor) -> Tensor:
        p, y = S.softmax(-1)
        return F.cross_entropy(p @ self.items @ theta @ self.items.T, y)

    def real(self, theta: Tensor) -> Tensor:
        taught, logits = (self.items @ weights @ self.items.T for weights in (self.teacher, theta))
        return F.cross_entropy(logits, taught.softmax(-1))

    def solution(self, S: Tensor, penalty: float = torch.inf) -> Tensor:
        return minimise(lambda theta: self.real(theta) / penalty + self.synthetic(theta, S), self.start)


class LinearRecommender(nn.Module):
    """Weights of `SoftmaxRegression` behind the interface of `SASRec`."""

    def __init__(self, items: Tensor, weights: Tensor):
        super().__init__()
        self.items, self.weights = items, nn.Parameter(weights)

    def features(self, items: Tensor) -> Tensor:
        return self.items[items]

    def transform(self, mixed: Tensor) -> Tensor:
        return mixed @ self.weights

    def scores(self, hidden: Tensor, features: Tensor) -> Tensor:
        return hidden @ features.T


@dataclass(frozen=True)
class LinearTask:
    """`SoftmaxRegression` as `penalty.Pair` and `penalty.gap_gradient` take it: the library's own
    code on a problem with a known answer. All items are in the subset, nothing has an anchor."""

    problem: SoftmaxRegression
    model_settings: ModelSettings = ModelSettings()

    def new_model(self, seed: int) -> LinearRecommender:
        return LinearRecommender(self.problem.items, self.problem.start)

    @property
    def teacher(self) -> LinearRecommender:
        return LinearRecommender(self.problem.items, self.problem.teacher)

    def windows(self) -> Batch:
        """Each item once, as a window of one position."""
        items = torch.arange(len(self.problem.items))
        return Batch(items[:, None], items, torch.ones(len(items), 1, dtype=torch.bool))

    def batch(self, S: Tensor) -> SyntheticBatch:
        """S as one synthetic sequence."""
        p, y = S.softmax(-1)
        T, N = p.shape
        anchors, mask = torch.zeros(1, T, dtype=torch.long), torch.ones(1, T, dtype=torch.bool)
        return SyntheticBatch(Subset.uniform(torch.arange(N), N), anchors, mask, p[None], S.new_zeros(1, T), y)


Problem = Ridge | SoftmaxRegression


def gradients(function: Callable[..., Tensor], *variables: Tensor) -> tuple[Tensor, ...]:
    """Of function(*variables), with respect to each: one forward and one backward pass."""
    variables = [v.detach().requires_grad_() for v in variables]
    return torch.autograd.grad(function(*variables), variables)


def newton_step(loss: Callable[[Tensor], Tensor], theta: Tensor, gradient: Tensor) -> Tensor:
    """H⁻¹ · gradient, H the Hessian of `loss` at θ; shapes as θ."""
    hessian = torch.autograd.functional.hessian(loss, theta).reshape(theta.numel(), theta.numel())
    return _solve(hessian, gradient.flatten()).view_as(theta)


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Newton's method with step halving, to rounding error; `FosterError` where it finds no minimum."""
    theta = start.detach()
    for _ in range(60):
        step = newton_step(loss, theta, gradients(loss, theta)[0])
        while loss(theta - step) > loss(theta) + 1e-13:
            step = step / 2
        theta = theta - step
        if step.norm() <= 1e-12 * (1 + theta.norm()):
            return theta
    raise FosterError("Newton's method finds no minimum: give S more positions, or take a larger |λ|.")


def implicit_gradient(problem: Problem, S: Tensor) -> Tensor:
    """dL_real(φ*(S))/dS by the implicit function theorem, the Hessian formed and solved."""
    phi, S = problem.solution(S), S.detach().requires_grad_()
    of_real = gradients(problem.real, phi)[0]
    q = newton_step(lambda theta: problem.synthetic(theta, S.detach()), phi, of_real)
    phi = phi.requires_grad_()
    (of_synthetic,) = torch.autograd.grad(problem.synthetic(phi, S), phi, create_graph=True)
    return -torch.autograd.grad((of_synthetic * q).sum(), S)[0]


def unrolled_gradient(problem: Problem, S: Tensor, steps: int, rate: float, second_order: bool = True) -> Tensor:
    """dL_real(φ_T)/dS through T steps of φ ← φ − η ∂_φ L_syn(φ; S), by autograd.

    Without second order each step's gradient counts as a constant, as FOMAML has it (Finn et al.
    2017); S enters nowhere else, so nothing is left.
    """
    S, phi = S.detach().requires_grad_(), problem.start.requires_grad_()
    for _ in range(steps):
        (of_synthetic,) = torch.autograd.grad(problem.synthetic(phi, S), phi, create_graph=second_order)
        phi = phi - rate * of_synthetic
    return torch.autograd.grad(problem.real(phi), S, allow_unused=True, materialize_grads=True)[0]


def curvature(problem: Problem, theta: Tensor, S: Tensor, v: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """(Hv, ∂_S⟨∂_θ L_syn, v⟩) by central differences at θ ± εv with ‖εv‖ = `length`.

    Two ordinary gradients. The error is O(length²); a quadratic has none (DARTS, Liu et al. 2019, eq. 8).
    """
    epsilon = length / v.norm().clamp(min=1e-30)
    ahead, behind = (gradients(problem.synthetic, theta + sign * epsilon * v, S) for sign in (1, -1))
    return tuple((a - b) / (2 * epsilon) for a, b in zip(ahead, behind))


def adjoint_gradient(problem: Problem, S: Tensor, steps: int, rate: float, length: float = 1e-4) -> Tensor:
    """`unrolled_gradient` by first-order passes only: its reverse recursion, with `curvature`.

        a_T = ∇L_real(φ_T);   dS −= η ∂_S⟨∂_φ L_syn(φ_t; S), a⟩,   a −= η H(φ_t) a,   t = T − 1 … 0

    With T = 1 it is DARTS' estimate.
    """
    path = [problem.start]
    for _ in range(steps):
        path.append(path[-1] - rate * gradients(lambda phi: problem.synthetic(phi, S), path[-1])[0])
    a, result = gradients(problem.real, path.pop())[0], torch.zeros_like(S)
    for phi in reversed(path):
        of_weights, of_data = curvature(problem, phi, S, a, length)
        result, a = result - rate * of_data, a - rate * of_weights
    return result


def difference(problem: Problem, S: Tensor, theta: Tensor, phi: Tensor, penalty: float) -> Tensor:
    """∂J/∂S = λ [∂L_syn(θ; S)/∂S − ∂L_syn(φ; S)/∂S], as `penalty.gap_gradient`, which leaves λ to Adam."""
    of_theta, of_phi = (gradients(lambda S: problem.synthetic(weights, S), S)[0] for weights in (theta, phi))
    return penalty * (of_theta - of_phi)


def penalty_gradient(problem: Problem, S: Tensor, penalty: float, symmetric: bool = False) -> Tensor:
    """∂J/∂S with both models converged; differs from the truth by O(1/λ) (F2SA, Kwon et al. 2023).

    It is a forward difference in 1/λ. The symmetric form replaces φ by argmin L_syn − L_real / λ, a
    model that shuns the real data as much as θ seeks them, and halves: error O(1/λ²), as a central
    difference has it (Chen et al. 2025, arXiv 2509.02937). That model exists only for large λ.
    """
    theta, phi = problem.solution(S, penalty), problem.solution(S, -penalty if symmetric else torch.inf)
    return difference(problem, S, theta, phi, penalty / (1 + symmetric))


class Alternation:
    """FOSTER's penalty form: `penalty.Pair` with plain gradient descent in the place of Adam.

    Called with S it lets φ take W steps on L_syn and θ as many on (L_real + λ L_syn) / (1 + λ), each
    from where it was, and returns the difference of their input gradients; every R calls (0: never)
    both return to the start. As W grows it becomes `penalty_gradient`.
    """

    def __init__(self, problem: Problem, penalty: float, inner_steps: int, rate: float, reset_every: int = 0):
        self.problem, self.penalty, self.inner_steps = problem, penalty, inner_steps
        self.rate, self.reset_every = rate, reset_every
        self.reset()

    def reset(self) -> None:
        self.theta = self.phi = self.problem.start
        self.served = 0

    def __call__(self, S: Tensor) -> Tensor:
        if self.reset_every and self.served == self.reset_every:
            self.reset()
        self.served += 1

        def joint(theta: Tensor) -> Tensor:
            return (self.problem.real(theta) + self.penalty * self.problem.synthetic(theta, S)) / (1 + self.penalty)

        for _ in range(self.inner_steps):
            self.phi = self.phi - self.rate * gradients(lambda phi: self.problem.synthetic(phi, S), self.phi)[0]
            self.theta = self.theta - self.rate * gradients(joint, self.theta)[0]
        return difference(self.problem, S, self.theta, self.phi, self.penalty)


def descend(S: Tensor, estimate: Callable[[Tensor], Tensor], rate: float, steps: int, learned: Tensor) -> list[Tensor]:
    """S ← S − rate · estimate(S) where `learned` is 1; all S on the way, the first one included."""
    path = [S]
    for _ in range(steps):
        path.append(path[-1] - rate * learned * estimate(path[-1]))
    return path
