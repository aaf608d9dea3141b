"""Solvers: one contract, any device, nothing lost when the map is bad."""

import json
from pathlib import Path

import pytest
import torch

from get_nb.lab.core import ConfigError, torch_rng
from get_nb.fixed_point import fixed_point_iter
from get_nb.gradients import equilibrium
from get_nb.solvers import SOLVERS, anderson, broyden, solve

GOLDEN = json.loads((Path(__file__).parent / "data/deq_solvers.json").read_text(encoding="utf-8"))


def linear(rho, dtype=torch.float64, n=32, batch=3):
    W = torch.randn(n, n, generator=torch_rng("W"), dtype=torch.float64)
    W = (W + W.T) / 2
    W = (W * rho / torch.linalg.eigvalsh(W).abs().max()).to(dtype)
    b = torch.randn(batch, n, generator=torch_rng("b"), dtype=torch.float64).to(dtype)
    return (lambda z: z @ W.T + b), torch.zeros_like(b), W, b


def test_the_golden_table_is_whole():
    assert len(GOLDEN) == 27 and {k.split("|")[2] for k in GOLDEN} == {"fixed_point_iter", "anderson", "broyden"}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("dtype, tol, error", [(torch.float64, 1e-12, 1e-9), (torch.float32, 1e-6, 1e-4)])
def test_a_linear_map_gives_what_linalg_solve_gives_in_both_precisions(name, dtype, tol, error):
    f, z0, W, b = linear(0.8, dtype)
    z, stats = solve(f, z0, name, max_iter=200, tol=tol)
    exact = torch.linalg.solve(torch.eye(32) - W.double(), b.double().T).T
    assert stats.converged.all() and z.dtype == dtype and (z.double() - exact).abs().max() < error
    assert stats.rel_trace.shape == (3, stats.n_evals) and torch.equal(stats.rel_lowest, stats.rel_trace.min(1).values)


@pytest.mark.parametrize("name", SOLVERS)
def test_without_a_tolerance_nothing_is_read_back_from_the_device(name):
    z, stats = solve(
        lambda z: 0.5 * z + 1, torch.zeros(2, 8, device="meta"), name, max_iter=9
    )  # a meta tensor has no value to read
    assert z.shape == (2, 8) and stats.n_evals == 9


@pytest.mark.parametrize("name", SOLVERS)
def test_torch_compile_gives_the_same_without_a_break(name):
    f, z0, _, _ = linear(0.7)

    def run(z):
        z, stats = SOLVERS[name](f, z, max_iter=4)
        return z, stats.rel_trace

    for a, b in zip(torch.compile(run, backend="eager", fullgraph=True)(z0), run(z0)):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_torch_compile_works_with_a_tolerance_too():
    f, z0, _, _ = linear(0.7)

    def run(z):
        return anderson(f, z, max_iter=30, tol=1e-8)[0]

    assert torch.allclose(torch.compile(run, backend="eager")(z0), run(z0), atol=1e-7)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_map_that_is_broken_from_the_start_gives_the_start_back(name):
    z0 = torch.ones(2, 4)
    z, stats = solve(lambda z: z * torch.nan, z0, name, max_iter=5, tol=1e-3)
    assert torch.equal(z, z0) and stats.failed.all() and not stats.converged.any() and stats.abs_lowest.isinf().all()


@pytest.mark.parametrize("name", SOLVERS)
def test_one_broken_image_leaves_the_others_as_they_were(name):
    f, z0, _, _ = linear(0.8)

    def bad(z):
        out = f(z).clone()
        out[1] = torch.nan
        return out

    (good, s), (z, t) = solve(f, z0, name, max_iter=100, tol=1e-8), solve(bad, z0, name, max_iter=100, tol=1e-8)
    assert torch.allclose(z[[0, 2]], good[[0, 2]], atol=1e-10) and z.isfinite().all()
    assert (
        t.failed.tolist() == [False, True, False] and t.converged.tolist() == [True, False, True] and s.converged.all()
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_a_map_that_overflows_ends_with_its_best_iterate(name):
    z, stats = solve(lambda z: z.exp() * 1e3, torch.ones(2, 4), name, max_iter=12)
    assert z.isfinite().all() and not stats.converged.any() and stats.n_evals == 12


@pytest.mark.parametrize("solver", [anderson, broyden])
def test_a_singular_system_of_differences_is_survived(solver):
    # each image lives on one line: all differences after the first are parallel
    z, stats = solver(lambda z: 0.5 * z + 1, torch.zeros(2, 16, dtype=torch.float64), max_iter=20, window=10, tol=1e-14)
    assert torch.allclose(z, torch.full_like(z, 2.0)) and stats.converged.all()
    z, stats = solver(
        lambda z: torch.ones_like(z), torch.zeros(2, 16), max_iter=20, window=10
    )  # constant, and no tolerance to stop at
    assert torch.equal(z, torch.ones(2, 16)) and stats.n_evals == 20 and not stats.failed.any()


@pytest.mark.parametrize("name", SOLVERS)
def test_one_evaluation_is_one_step(name):
    f, z0, _, b = linear(0.8)
    z, stats = solve(f, z0, name, max_iter=1)
    assert torch.equal(z, b) and stats.n_evals == 1 and stats.evals.tolist() == [1] * 3


def test_bfloat16_inside_the_map_keeps_a_float32_state():
    f, z0, W, b = linear(0.8, torch.float32)
    seen = []

    def rounded(z):
        seen.append(z.dtype)
        return z.bfloat16() @ W.T.bfloat16() + b.bfloat16()

    z, stats = anderson(rounded, z0, max_iter=20)
    assert (
        set(seen) == {torch.float32}
        and z.dtype == torch.float32
        and stats.rel_trace.dtype == torch.float32
        and stats.rel_lowest.max() < 2**-6
    )


def test_a_gradient_passes_through_plain_iteration_and_not_through_the_others():
    f, z0, _, _ = linear(0.5)
    a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    assert fixed_point_iter(lambda z: a * f(z), z0, max_iter=4)[0].requires_grad
    assert not anderson(lambda z: a * f(z), z0, max_iter=4)[0].requires_grad


def test_damping_and_the_last_iterate_are_honoured():
    def f(z):
        return -1.5 * z + 1

    one = torch.ones(1, 1, dtype=torch.float64)
    assert fixed_point_iter(f, one, max_iter=3, select="last")[1].lowest_step.item() == 2
    assert fixed_point_iter(f, one, max_iter=8, tol=1e-9, tau=0.4)[1].n_evals == 2
    assert anderson(f, one, max_iter=8, tol=1e-9, tau=0.5)[1].converged.all()


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(solver="andersn", max_iter=3), "anderson"),
        (dict(max_iter=3, windo=2), "window"),
        (dict(max_iter=3, tol=-1), "tol"),
        (dict(max_iter=2.5), "max_iter"),
        (dict(), "max_iter"),
        (dict(max_iter=3, tau=0), "tau"),
        (dict(max_iter=3, window=0), "window"),
        (dict(max_iter=3, select="best"), "lowest"),
    ],
)
def test_a_wrong_option_is_refused_and_the_right_one_named(options, said):
    with pytest.raises(ConfigError, match=said):
        solve(lambda z: z, torch.zeros(1, 1), **options)


@pytest.mark.parametrize("solver", [anderson, broyden])
def test_a_step_that_is_taken_back_is_damped_as_well(solver):
    seen = []

    def f(z):
        seen.append(z.item())
        return torch.full_like(z, float("nan")) if len(seen) == 2 else -3 * z

    solver(f, torch.ones(1, 1, dtype=torch.float64), max_iter=3, tau=0.25)
    assert seen == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("name", SOLVERS)
def test_a_map_onto_zero_has_not_failed_and_an_empty_batch_is_one(name):
    z, stats = solve(lambda z: 0 * z, torch.full((2, 3), 5.0), name, max_iter=4, tol=1e-3)
    assert not stats.failed.any() and stats.converged.all() and (z == 0).all()
    z, stats = solve(lambda z: 0.5 * z, torch.zeros(0, 3), name, max_iter=4)
    assert z.shape == (0, 3) and stats.rel_trace.shape == (0, 4)


def test_of_equal_residuals_the_later_state_is_returned():
    z, stats = fixed_point_iter(lambda z: 0.5 * z, torch.ones(2, 3), max_iter=30, tol=1e-3)
    assert stats.rel_trace.eq(1).all() and stats.lowest_step.tolist() == [29, 29]  # it falls to 0, with the same ratio
    assert z.abs().max() < 1e-8
    frozen, stats = fixed_point_iter(lambda z: 0 * z + 1, torch.tensor([[1.0], [3.0]]), max_iter=5, tol=0.1)
    assert stats.lowest_step.tolist() == [0, 1] and frozen.eq(1).all()
    broken, stats = fixed_point_iter(lambda z: z / 0, torch.ones(1, 3), max_iter=3)
    assert broken.eq(1).all() and stats.failed.all()


def test_a_solver_of_ones_own_is_called_with_its_own_options():
    f, start, W, b = linear(0.5)
    seen = []

    def mine(g, x0, *, max_iter, beta=1.0):
        seen.append(beta)
        return fixed_point_iter(g, x0, max_iter=max_iter, tau=beta)

    for solver in (mine, anderson, lambda f, z0, **options: anderson(f, z0, **options)):
        options = dict(beta=0.9) if solver is mine else dict(window=3)
        z, _ = solve(f, start, solver=solver, max_iter=60, **options)
        assert torch.allclose(f(z), z, atol=1e-9)
        (x,), _ = solve(lambda z: (f(z),), (start,), solver=solver, max_iter=60, **options)
        assert torch.allclose(x, z, atol=1e-12)
    assert seen == [0.9, 0.9]
    with pytest.raises(ConfigError, match="solver mine: unknown option 'bta'; did you mean 'beta'"):
        solve(f, start, solver=mine, max_iter=3, bta=1.0)
    z, _ = equilibrium(f, start.requires_grad_(), "unrolled", solver=fixed_point_iter, max_iter=3)
    assert z.requires_grad
