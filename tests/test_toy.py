"""First-order estimators against problems whose hypergradient is known, in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foster_lib import coresets
from foster_lib.errors import FosterError
from foster_lib.foster import FosterSettings, Synthesizer, regularised
from foster_lib.penalty import Pair, gap_gradient
from foster_lib.subsets import real_loss, sample_subset, synthetic_loss
from foster_lib.toy import (
    Alternation,
    LinearTask,
    Ridge,
    SoftmaxRegression,
    adjoint_gradient,
    curvature,
    descend,
    gradients,
    implicit_gradient,
    penalty_gradient,
    unrolled_gradient,
)

PROBLEMS = {"ridge": Ridge.random(seed=1, rows=2, width=4), "softmax": SoftmaxRegression.random(seed=1)}
RATE = 1.0


@pytest.fixture(params=PROBLEMS)
def toy(request):
    """(problem, S), quadratic and not."""
    return PROBLEMS[request.param]


def error(estimate, truth):
    return float((estimate - truth).norm() / truth.norm())


def cosine(estimate, truth):
    return float((estimate * truth).sum() / estimate.norm() / truth.norm())


def slope(x, errors):
    return np.polyfit(np.log(x), np.log(errors), 1)[0]


def outer_loss(problem, S):
    """L_real(φ*(S))."""
    return float(problem.real(problem.solution(S)))


def targets_of(S):
    """1 at the targets of a ridge problem's S, 0 at its inputs."""
    return torch.zeros_like(S).index_fill_(1, torch.tensor([S.shape[1] - 1]), 1.0)


# ------------------------------------------------------------------------------ the truth


@pytest.mark.parametrize("penalty", [3.0, 100.0, torch.inf])
def test_solution_is_where_the_gradient_vanishes(toy, penalty):
    problem, S = toy
    theta = problem.solution(S, penalty)
    of_synthetic = gradients(lambda w: problem.synthetic(w, S), theta)[0]
    of_real = gradients(problem.real, theta)[0]
    assert (of_synthetic + of_real / penalty).norm() < 1e-12 < 1e-3 < of_real.norm()


def test_implicit_gradient_is_the_slope_of_the_outer_loss(toy):
    """Against differences of L_real(φ*(S)) in random directions: no derivative is used."""
    problem, S = toy
    truth, draw = implicit_gradient(problem, S), torch.Generator().manual_seed(0)
    for _ in range(5):
        step = 1e-4 * torch.randn(S.shape, generator=draw, dtype=S.dtype)
        numeric = (outer_loss(problem, S + step) - outer_loss(problem, S - step)) / 2
        assert numeric == pytest.approx(float((truth * step).sum()), abs=1e-6 * float(truth.norm() * step.norm()))


def test_closed_form_of_ridge_equals_the_implicit_gradient():
    problem, S = PROBLEMS["ridge"]
    assert error(problem.hypergradient(S), implicit_gradient(problem, S)) < 1e-12


def test_best_targets_are_the_outer_optimum():
    problem, S = PROBLEMS["ridge"]
    best = problem.best_targets(S)
    assert problem.hypergradient(best)[:, -1].norm() < 1e-12
    assert torch.equal(best[:, :-1], S[:, :-1])
    assert outer_loss(problem, best) < outer_loss(problem, S)


def test_a_problem_without_a_single_minimum_is_refused():
    problem, S = SoftmaxRegression.random(seed=0, positions=1)
    with pytest.raises(FosterError, match="more positions"):
        problem.solution(S)
    problem, S = PROBLEMS["ridge"]
    with pytest.raises(FosterError, match="larger"):
        penalty_gradient(problem, S, 1.0, symmetric=True)


# ----------------------------------------------------------------------- unrolled training


def test_first_order_maml_gives_no_gradient(toy):
    problem, S = toy
    assert not unrolled_gradient(problem, S, 5, RATE, second_order=False).any()
    assert unrolled_gradient(problem, S, 5, RATE).any()


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_adjoint_by_finite_differences_equals_autograd_through_the_steps(toy, steps):
    problem, S = toy
    assert error(adjoint_gradient(problem, S, steps, RATE), unrolled_gradient(problem, S, steps, RATE)) < 1e-7


def test_one_adjoint_step_is_darts_formula(toy):
    """−η [∂_S L_syn(φ_1' + εv) − ∂_S L_syn(φ_1' − εv)] / 2ε with v = ∇L_real(φ_1), written out."""
    problem, S = toy
    start = problem.start
    after = start - RATE * gradients(problem.synthetic, start, S)[0]
    v, epsilon = gradients(problem.real, after)[0], 1e-5
    ahead, behind = (gradients(problem.synthetic, start + sign * epsilon * v, S)[1] for sign in (1, -1))
    assert error(adjoint_gradient(problem, S, 1, RATE), -RATE * (ahead - behind) / (2 * epsilon)) < 1e-6


def test_curvature_is_the_hessian_times_a_vector(toy):
    problem, S = toy
    theta = problem.solution(S, 10.0)
    v = gradients(problem.real, theta)[0]
    hessian = torch.autograd.functional.hessian(lambda w: problem.synthetic(w, S), theta)
    expected = (hessian.reshape(v.numel(), v.numel()) @ v.flatten()).view_as(v)
    assert error(curvature(problem, theta, S, v, 1e-4)[0], expected) < 1e-7


def test_unrolled_gradient_tends_to_the_truth_as_fast_as_training_converges():
    """The targets' error falls like (1 − η μ)^T, μ the smallest curvature in the span of the inputs."""
    problem, S = PROBLEMS["ridge"]
    truth, lengths = problem.hypergradient(S)[:, -1], np.array([20, 40, 60, 80])
    errors = [error(adjoint_gradient(problem, S, T, RATE)[:, -1], truth) for T in lengths]
    smallest = float(torch.linalg.svdvals(S[:, :-1])[-1]) ** 2 / len(S) + problem.ridge
    assert np.polyfit(lengths, np.log(errors), 1)[0] == pytest.approx(np.log(1 - RATE * smallest), rel=0.02)
    assert errors[-1] < 1e-5


def test_finite_difference_error_falls_with_the_square_of_epsilon_until_rounding():
    """A softmax is not quadratic; a ridge regression is, so there no ε is too large."""
    problem, S = PROBLEMS["softmax"]
    exact = unrolled_gradient(problem, S, 5, RATE)
    lengths = 10.0 ** np.array([-1, -1.5, -2, -2.5, -3])
    assert slope(lengths, [error(adjoint_gradient(problem, S, 5, RATE, x), exact) for x in lengths]) == pytest.approx(
        2, abs=0.02
    )
    tiny = 10.0 ** np.array([-7, -8, -9, -10, -11.0])
    assert slope(tiny, [error(adjoint_gradient(problem, S, 5, RATE, x), exact) for x in tiny]) == pytest.approx(
        -1, abs=0.4
    )
    problem, S = PROBLEMS["ridge"]
    assert error(adjoint_gradient(problem, S, 5, RATE, 1.0), unrolled_gradient(problem, S, 5, RATE)) < 1e-13


# ------------------------------------------------------------------------ penalty and FOSTER


def test_penalty_error_falls_like_one_over_lambda(toy):
    """Symmetric form: like one over λ²."""
    problem, S = toy
    truth, penalties = implicit_gradient(problem, S), 10.0 ** np.arange(3, 7)
    errors = [error(penalty_gradient(problem, S, x), truth) for x in penalties]
    assert slope(penalties, errors) == pytest.approx(-1, abs=0.02) and errors[-1] < 1e-4
    penalties = 10.0 ** np.array([2.5, 3, 3.5])
    errors = [error(penalty_gradient(problem, S, x, symmetric=True), truth) for x in penalties]
    assert slope(penalties, errors) == pytest.approx(-2, abs=0.05)


@pytest.mark.parametrize("penalty", [1.0, 10.0])
def test_penalty_gradient_of_ridge_targets_solves_with_an_enlarged_hessian(penalty):
    """X (H + B/λ)⁻¹ ∇L_real(φ*) / n with B the Hessian of L_real: the 1/λ written out."""
    problem, S = PROBLEMS["ridge"]
    A, X, n = problem.real_inputs, S[:, :-1], len(S)
    of_real = A.T @ (A @ problem.solution(S) - problem.real_targets) / len(A)
    enlarged = X.T @ X / n + problem.ridge * torch.eye(4, dtype=S.dtype) + A.T @ A / len(A) / penalty
    expected = X @ torch.linalg.solve(enlarged, of_real) / n
    assert error(penalty_gradient(problem, S, penalty)[:, -1], expected) < 1e-11


def test_foster_step_written_out(toy):
    """W = 2, twice, the pair going on; then a reset returns it to the first answer, bit for bit."""
    problem, S = toy
    penalty, theta, phi = 3.0, problem.start, problem.start
    estimate, expected = Alternation(problem, penalty, 2, RATE), []
    for _ in range(2):
        for _ in range(2):
            phi = phi - RATE * gradients(problem.synthetic, phi, S)[0]
            step = gradients(problem.real, theta)[0] + penalty * gradients(problem.synthetic, theta, S)[0]
            theta = theta - RATE * step / (1 + penalty)
        expected.append(penalty * (gradients(problem.synthetic, theta, S)[1] - gradients(problem.synthetic, phi, S)[1]))
    first, second = estimate(S), estimate(S)
    assert error(first, expected[0]) < 1e-12 and error(second, expected[1]) < 1e-12
    again = Alternation(problem, penalty, 2, RATE, reset_every=2)
    assert torch.equal(again(S), first) and torch.equal(again(S), second) and torch.equal(again(S), first)


@pytest.mark.parametrize("penalty", [1.0, 100.0])
def test_foster_with_converged_models_is_the_penalty_gradient(toy, penalty):
    problem, S = toy
    estimate = Alternation(problem, penalty, 200, RATE)(S)
    assert error(estimate, penalty_gradient(problem, S, penalty)) < 1e-6


def test_foster_points_along_the_hypergradient_as_lambda_grows(toy):
    problem, S = toy
    truth = implicit_gradient(problem, S)
    cosines = [cosine(Alternation(problem, x, 150, RATE)(S), truth) for x in (1.0, 10.0, 1e4)]
    assert cosines == sorted(cosines) and cosines[0] < 0.9 and cosines[-1] > 0.9999


def test_learning_targets_with_foster_reaches_the_outer_optimum():
    """n = 2 targets for 4 weights, real data out of reach: a large λ is needed to end at the optimum."""
    problem, S = PROBLEMS["ridge"]
    best, targets = outer_loss(problem, problem.best_targets(S)), targets_of(S)
    closed = descend(S, problem.hypergradient, 1.4, 40, targets)[-1]
    ours = descend(S, Alternation(problem, 1e4, 20, RATE), 1.4, 40, targets)[-1]
    assert outer_loss(problem, S) > best + 1
    assert outer_loss(problem, closed) == pytest.approx(best, abs=1e-8)
    assert outer_loss(problem, ours) == pytest.approx(best, abs=1e-5)


def test_a_small_lambda_rests_short_of_the_optimum():
    """The gradient is linear in the targets, so its root is a linear system: FOSTER stays there, the truth goes on."""
    problem, S = PROBLEMS["ridge"]

    def at(*targets):
        return torch.cat([S[:, :-1], torch.tensor(targets, dtype=S.dtype)[:, None]], 1)

    offset, *columns = (penalty_gradient(problem, x, 1.0)[:, -1] for x in (at(0, 0), at(1, 0), at(0, 1)))
    rest = at(*torch.linalg.solve(torch.stack([column - offset for column in columns], 1), -offset).tolist())
    assert Alternation(problem, 1.0, 200, RATE)(rest)[:, -1].norm() < 1e-7
    assert problem.hypergradient(rest)[:, -1].norm() > 0.1
    assert outer_loss(problem, S) > outer_loss(problem, rest) > outer_loss(problem, problem.best_targets(S)) + 0.05


def test_learning_inputs_too_lambda_one_suffices():
    """S can then teach the minimum of L_real itself, where both gradients vanish whatever λ is."""
    problem, S = PROBLEMS["ridge"]
    A, b = problem.real_inputs, problem.real_targets
    least = float(((A @ torch.linalg.lstsq(A, b[:, None]).solution[:, 0] - b) ** 2).mean() / 2)
    end = descend(S, Alternation(problem, 1.0, 2, RATE), 0.5, 150, torch.ones_like(S))[-1]
    assert outer_loss(problem, S) > least + 1
    assert outer_loss(problem, end) == pytest.approx(least, abs=1e-6)


# ------------------------------------------------------------------------ the library itself


@pytest.mark.parametrize("penalty", [1.0, 16.0])
def test_pair_and_gap_gradient_arrive_at_the_penalty_gradient(penalty):
    """`penalty.Pair` (Adam, warm-up, clipping) and `penalty.gap_gradient` on the softmax problem."""
    problem, S = PROBLEMS["softmax"]
    task = LinearTask(problem)
    settings = FosterSettings(penalty=penalty, inner_steps=200, inner_learning_rate=0.05, inner_warmup=10)
    pair = Pair(task, settings, seed=0)
    pair.fit(task.batch(S), task.windows, task.teacher)
    live = S.clone().requires_grad_()
    learned = SimpleNamespace(tensors=[live])
    (gradient,), gap = gap_gradient(learned, task.batch(live), pair.theta.model, pair.phi.model)
    assert error(penalty * gradient, penalty_gradient(problem, S, penalty)) < 2e-3  # the library's loss is in float32
    theta, phi = problem.solution(S, penalty), problem.solution(S)
    assert gap == pytest.approx(float(problem.synthetic(theta, S) - problem.synthetic(phi, S)), rel=0.01)
    assert cosine(gradient, implicit_gradient(problem, S)) > (0.98 if penalty > 10 else 0.7)


def test_linear_task_has_the_losses_of_its_problem():
    problem, S = PROBLEMS["softmax"]
    task = LinearTask(problem)
    model = task.new_model(0)
    torch.nn.init.normal_(model.weights, generator=torch.Generator().manual_seed(0))
    weights, batch = model.weights.detach(), task.batch(S)
    assert float(synthetic_loss(model, batch).detach()) == pytest.approx(float(problem.synthetic(weights, S)), abs=1e-6)
    on_real = real_loss(model, task.windows(), batch.subset, task.teacher)
    assert float(on_real.detach()) == pytest.approx(float(problem.real(weights)), abs=1e-6)


@pytest.mark.parametrize("items", [15, 40])
def test_gradient_of_sasrec_is_autograd_of_the_written_formula(task, items):
    """∂/∂S [L_syn(θ; S) − L_syn(φ; S) + w L_r] for z_x, β and z_y, with one row per item and loops."""
    settings = FosterSettings(subset=items, neighbours=3, sharpness=2.0, bonus=1.0, regulariser=0.5)
    synthetic = Synthesizer(coresets.kd(task, 2, seed=0), task.embeddings, settings)
    drawn = sample_subset(task.n_items, items, np.random.default_rng(0))
    theta, phi, weight = task.teacher, task.new_model(3).eval(), settings.regulariser
    result, gap = gap_gradient(synthetic, batch := synthetic.batch(drawn), theta, phi)
    result, regulariser = regularised(synthetic, batch, result)

    z_x, bonus, z_y = variables = [t.detach().clone().requires_grad_() for t in synthetic.tensors]
    start = synthetic.start
    f = start.features(task.embeddings)
    chosen = torch.zeros(task.n_items, dtype=torch.bool)
    chosen[drawn.items] = True
    rows = []
    for a in range(len(start)):
        for position in range(start.items.shape[1]):
            anchor = torch.arange(task.n_items) == start.items[a, position]
            logits = f @ z_x[a, position] + torch.where(anchor, bonus[a, position], np.log(task.n_items / items))
            rows.append(logits.masked_fill(~(chosen | anchor), -torch.inf).softmax(-1))
    p = torch.stack(rows).view(len(start), -1, task.n_items)
    y = torch.stack([(f[drawn.items] @ z).softmax(-1) for z in z_y[start.mask]])

    losses = []
    for model in (theta, phi):
        features = model.features().detach()
        hidden = model.transform(p @ features)[start.mask]
        log_probability = (model.log_scale.exp() * hidden @ features[drawn.items].T).log_softmax(-1)
        losses.append(-sum(y_t @ l_t for y_t, l_t in zip(y, log_probability)) / len(y))

    inside, text = p[start.mask][:, drawn.items], torch.nn.functional.normalize(task.embeddings[drawn.items], dim=-1)
    q = [(inside[:, i, None] * y).sum(0) / inside[:, i].sum() for i in range(items)]
    similar = (text @ text.T).fill_diagonal_(-torch.inf)
    l_r = 0.0
    for i in range(items):
        near = similar[i].argsort(descending=True)[: settings.neighbours]
        for j, w in zip(near.tolist(), (similar[i, near] / settings.neighbour_temperature).softmax(0)):
            l_r = l_r + w * (1 - (q[i] * q[j]).sqrt().sum()) / items

    expected = torch.autograd.grad(losses[0] - losses[1] + weight * l_r, variables)
    assert gap == pytest.approx(float((losses[0] - losses[1]).detach()), abs=1e-5)
    assert regulariser == pytest.approx(float(l_r.detach()), abs=1e-5)
    for ours, theirs in zip(result, expected):
        assert theirs.abs().max() > 1e-6
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
