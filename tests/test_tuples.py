"""Equilibria of several parts: a tuple of states is solved for, unrolled and differentiated as the packed system is."""

import pytest
import torch

from get_nb import equilibrium, solve, unroll, unroll_constant
from get_nb.gradients import implicit, phantom
from get_nb.jacobian import jacobian_penalty, residual_penalty, spectral_radius
from get_nb.lab.core import ConfigError, torch_rng

SHAPES = [((3,), (2, 2)), ((1,),), ((2, 3), (4,), (1, 2, 2))]


def system(shapes, dtype=torch.float64):
    "A contraction of states of these shapes, as a function of them and of the packed vector; its weight, the start."
    g = torch_rng("system", str(shapes))
    sizes = [torch.Size(s).numel() for s in shapes]
    n = sum(sizes)
    w = (torch.randn(n, n, generator=g, dtype=dtype) * 0.4 / n**0.5).requires_grad_()
    b = torch.randn(n, generator=g, dtype=dtype)

    def packed(z):
        return torch.tanh(z @ w.T + b)

    def split(z):
        return tuple(p.unflatten(1, s) for p, s in zip(z.split(sizes, 1), shapes))

    def parts(*states):
        return split(packed(torch.cat([z.flatten(1) for z in states], 1)))

    start = torch.randn(5, n, generator=g, dtype=dtype)
    return parts, packed, split, w, start


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("solver", ["fixed_point", "anderson", "broyden"])
def test_a_tuple_is_solved_for_as_the_packed_system_is(shapes, solver):
    parts, packed, split, _, start = system(shapes)
    got, stats = solve(parts, split(start), solver, max_iter=40, tol=1e-9)
    wanted, plain = solve(packed, start, solver, max_iter=40, tol=1e-9)
    assert isinstance(got, tuple) and [z.shape[1:] for z in got] == [torch.Size(s) for s in shapes]
    assert all(torch.equal(a, b) for a, b in zip(got, split(wanted))) and torch.equal(stats.rel_trace, plain.rel_trace)
    assert stats.converged.all()


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("gradient", ["implicit", "phantom", "unrolled"])
def test_gradients_of_a_tuple_are_those_of_the_packed_system(shapes, gradient):
    parts, packed, split, w, start = system(shapes)
    options = dict(gradient=gradient, solver="fixed_point" if gradient == "unrolled" else "anderson", max_iter=30)
    got, _ = equilibrium(parts, split(start), **options)
    wanted, _ = equilibrium(packed, start, **options)
    loss = [sum(z.square().sum() for z in got), wanted.square().sum()]
    a, b = (torch.autograd.grad(x, w)[0] for x in loss)
    assert torch.allclose(a, b, rtol=1e-9) and b.abs().sum() > 0


@pytest.mark.parametrize("shapes", SHAPES)
def test_unrolled_states_come_back_as_tuples_with_the_same_gradients(shapes):
    parts, packed, split, w, start = system(shapes)
    plain = unroll(packed, start, 6, [2, -1])
    ways = dict(
        unrolled=unroll(parts, split(start), 6, [2, -1]),
        constant=unroll_constant(parts, split(start), 6, [2, -1], tensors=[w], slots=2),
        maps=unroll([parts] * 6, split(start), 6, [2, -1]),
    )
    wanted = torch.autograd.grad(sum(z.square().sum() for z in plain), w)[0]
    for name, states in ways.items():
        assert all(torch.equal(a, b) for s, z in zip(states, plain) for a, b in zip(s, split(z))), name
        loss = sum(z.square().sum() for s in states for z in s)
        assert torch.allclose(torch.autograd.grad(loss, w)[0], wanted, rtol=1e-9), name
    read = unroll_constant(parts, split(start), 6, read=lambda *s: s[0].flatten(1).sum(1), tensors=[w])
    assert len(read) == 6 and read[0].shape == (5,)


@pytest.mark.parametrize(
    "z0, reason",
    [
        ((), "empty tuple"),
        ((torch.zeros(2, 3), torch.zeros(3, 3)), "one batch size"),
        ((torch.zeros(2, 3), torch.zeros(2, 3).double()), "type"),
        ((torch.zeros(2, 3), None), "floating-point tensor"),
        ((torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)), "floating-point tensor"),
    ],
)
@pytest.mark.parametrize("call", ["solve", "equilibrium", "unroll", "unroll_constant"])
def test_a_tuple_that_is_no_system_is_refused_in_one_line(z0, reason, call):
    calls = dict(
        solve=lambda f: solve(f, z0, max_iter=3),
        equilibrium=lambda f: equilibrium(f, z0, solver="anderson", max_iter=3),
        unroll=lambda f: unroll(f, z0, 3),
        unroll_constant=lambda f: unroll_constant(f, z0, 3),
    )
    with pytest.raises(ConfigError, match=reason) as e:
        calls[call](lambda *z: z)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("wrong", [lambda x, y: x, lambda x, y: (x,), lambda x, y: (y, x), lambda x, y: None])
def test_a_map_that_returns_other_states_is_refused(wrong):
    with pytest.raises(ConfigError, match="f must return a tuple of 2 states"):
        solve(wrong, (torch.zeros(2, 3), torch.zeros(2, 4)), max_iter=3)


@pytest.mark.parametrize("shapes", SHAPES)
def test_whatever_takes_a_map_and_a_state_takes_a_tuple(shapes):
    parts, packed, split, w, start = system(shapes)
    z = solve(packed, start, max_iter=40, tol=1e-9)[0].detach()
    for method in (implicit, phantom):
        got, wanted = method(parts, split(z)), method(packed, z)
        assert all(torch.equal(a, b) for a, b in zip(got, split(wanted)))
        a, b = (torch.autograd.grad(x, w)[0] for x in (sum(p.sum() for p in got), wanted.sum()))
        assert torch.allclose(a, b, rtol=1e-9)
    for penalty in (residual_penalty, lambda f, z: jacobian_penalty(f, z, seed=0), spectral_radius):
        assert torch.equal(penalty(parts, split(z)), penalty(packed, z))
    half = spectral_radius(parts, split(z), project=lambda *s: tuple(0.5 * p for p in s))
    assert torch.allclose(half, spectral_radius(packed, z, project=lambda v: 0.5 * v))
    by_place = unroll_constant(parts, split(z), 2, None, lambda *s: s[0].flatten(1).sum(1), [w])
    assert by_place[0].shape == (5,)
    with pytest.raises(ConfigError, match="read must return one tensor, not a tuple"):
        unroll_constant(parts, split(z), 2, read=lambda *s: s, tensors=[w])
