"""Readers of single calls: the parts they give against autograd of one row's output at a time.

Shapes: S sequences, T tokens.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from curate.scorers import conv_uses, elementwise_uses, product_uses
from curate.scorers.parts import Layout, Sketched, join
from curate.scorers.readouts import TwoSidedSketch
from curate.scorers.row_map import RowMap
from curate.scorers.uses import Lookup, Param

S, T = 3, 4
FIRST = Layout("dense", 0, S)
SECOND = Layout("dense", 1, S)
FLAT = Layout("flat", 0, S)
INTERLEAVED = Layout("interleaved", 0, S)
# float64 on both sides; what is left is the order of sums.
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def p(*shape: int) -> Tensor:
    return x(*shape).requires_grad_(True)


def lookup(*params: Tensor) -> Lookup:
    """Know these parameters, and their transposes among the arguments."""

    def find(value: object) -> Param | None:
        for i, param in enumerate(params):
            if value is param:
                return Param(str(i), param.shape)
            if isinstance(value, Tensor) and value._base is param:
                return Param(str(i), param.shape, transposed=True)
        return None

    return find


def of_row(g: Tensor, layout: Layout, row: int) -> Tensor:
    """Return g with the entries of other rows at 0."""
    out = torch.zeros_like(g)
    if layout.kind == "flat":
        some = slice(row * (len(g) // S), (row + 1) * (len(g) // S))
        out[some] = g[some]
    elif layout.kind == "interleaved":
        out[row::S] = g[row::S]
    else:
        out.select(layout.axis, row).copy_(g.select(layout.axis, row))
    return out


def check(
    reader: Callable[..., Any], function: Callable[..., Tensor], *args: Any,
    layout: Layout = FIRST, **kwargs: Any,
) -> None:  # fmt: skip
    """Compare what the reader says of each parameter with autograd, row by row."""
    given = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    params = [a if a.is_leaf else a._base for a in given if a.requires_grad]
    use = reader(lookup(*params), *args, **kwargs)
    out = function(*args, **kwargs)
    g = torch.randn_like(out)
    parts = use.parts(g, layout, frozenset(use.params))
    assert sorted(param.name for param in use.params.values()) == sorted(
        map(str, range(len(params)))
    )
    assert parts.keys() == use.params.keys()
    for role, part in parts.items():
        assert use.parts(g, layout, frozenset({role})).keys() == {role}
        param = params[int(use.params[role].name)]
        found = join("", param.shape, [part], RowMap(S)).materialised(slice(None))
        true = [
            torch.autograd.grad(out, param, of_row(g, layout, s), retain_graph=True)[0]
            for s in range(S)
        ]
        torch.testing.assert_close(found.view(S, *param.shape), torch.stack(true), **EXACT)


def many(shape: tuple[int, ...], layout: Layout) -> Tensor:
    return x(*shape) if layout.kind == "dense" else x(2 * shape[0], *shape[1:])


class TestConvolutions:
    @pytest.mark.filterwarnings("ignore:Using padding")
    @pytest.mark.parametrize("layout", [FIRST, FLAT, INTERLEAVED])
    @pytest.mark.parametrize(
        ("settings", "channels", "kernel"),
        [
            ({"stride": 2, "padding": 1}, 2, (3,)),
            ({"padding": "same"}, 2, (4,)),  # an even side: one end is padded more
            ({"padding": "same", "dilation": (1, 2)}, 2, (2, 3)),
            ({"stride": (1, 2), "padding": (2, 0), "groups": 2}, 4, (3, 2)),
            ({"padding": "valid"}, 1, (2, 1, 2)),
        ],
    )
    def test_plain(self, layout, settings, channels, kernel) -> None:
        function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
        given = many((S, channels, *(5, 6, 4)[: len(kernel)]), layout)
        weight = p(4, channels // settings.get("groups", 1), *kernel)
        check(conv_uses.conv, function, given, weight, p(4), layout=layout, **settings)

    @pytest.mark.parametrize("layout", [FIRST, INTERLEAVED])
    @pytest.mark.parametrize(
        "settings",
        [{}, {"stride": 2, "output_padding": 1, "padding": 1}, {"groups": 2, "dilation": (2, 1)}],
    )
    def test_transposed(self, layout, settings) -> None:
        given, weight = many((S, 4, 3, 4), layout), p(4, 2, 2, 3)
        bias = p(2 * settings.get("groups", 1))
        function = F.conv_transpose2d
        check(conv_uses.conv_transpose, function, given, weight, bias, layout=layout, **settings)

    def test_what_is_not_read(self) -> None:
        weight = p(4, 2, 3)
        find = lookup(weight)
        assert conv_uses.conv(find, x(2, 5), weight) is None  # no axis of images
        assert conv_uses.conv(find, weight, weight) is None  # a product of parameters
        wide = {"stride": 1, "dilation": 2, "output_padding": 1}
        assert conv_uses.conv_transpose(find, x(S, 4, 5), weight, **wide) is None


class TestProducts:
    @pytest.mark.parametrize(
        ("shape", "layout"), [((S, T, 5), FIRST), ((T, S, 5), SECOND), ((2 * S, 5), FLAT)]
    )
    def test_with_a_matrix_either_way_round(self, shape, layout) -> None:
        check(product_uses.linear, F.linear, x(*shape), p(6, 5), p(6), layout=layout)
        check(product_uses.linear, F.linear, x(*shape), p(5, 6).T, p(6), layout=layout)
        check(product_uses.matmul, torch.matmul, x(*shape), p(5, 6), layout=layout)
        check(product_uses.matmul, torch.matmul, x(*shape), p(6, 5).T, layout=layout)

    def test_with_a_vector_added(self) -> None:
        check(product_uses.addmm, torch.addmm, p(6), x(S, 5), p(5, 6))

    @pytest.mark.parametrize("is_transposed", [False, True])
    def test_a_shrunk_product_is_the_sketch_of_the_gradient(self, is_transposed) -> None:
        weight, given, g, sketch = p(6, 5), x(S, T, 5), x(S, T, 6), TwoSidedSketch(3, (2, 4))
        argument, reader = (weight, product_uses.linear)
        if is_transposed:
            weight = p(5, 6)
            argument, reader = weight, product_uses.matmul
        whole, small = (reader(lookup(weight), given, argument) for _ in range(2))
        small.shrink(FIRST, sketch)
        assert not small.saved
        (part,) = small.parts(g, FIRST, frozenset({"weight"})).values()
        assert isinstance(part, Sketched)
        true = whole.parts(g, FIRST, frozenset({"weight"}))["weight"]
        expected = sketch(join("0", weight.shape, [true], RowMap(S)))
        torch.testing.assert_close(part.value, expected, **EXACT)

    def test_a_table(self) -> None:
        table, index = p(7, 3), torch.tensor([[1, 1, 0], [6, 2, 1], [0, 0, 0]])

        def look_up(weight: Tensor, indices: Tensor, padding_idx: int = -1) -> Tensor:
            return F.embedding(indices, weight, None if padding_idx < 0 else padding_idx)

        check(product_uses.embedding, look_up, table, index)
        check(product_uses.embedding, look_up, table, index, padding_idx=0)
        check(product_uses.embedding, look_up, table, index.T, layout=SECOND)

    @pytest.mark.parametrize("kind", ["shared", "shared_new"])
    def test_a_table_looked_up_once_for_all_rows(self, kind) -> None:
        table, index = p(7, 3), torch.tensor([2, 5, 2])
        index = index[None] if kind == "shared" else index
        layout = Layout(kind, 0, S)
        use = product_uses.embedding(lookup(table), table, index)
        g = x(S, 3, 3)
        part = use.parts(g, layout, frozenset({"weight"}))["weight"]
        found = join("", table.shape, [part], RowMap(S)).materialised(slice(None))
        true = torch.zeros(S, 7, 3, dtype=torch.float64)
        true[:, 2], true[:, 5] = g[:, 0] + g[:, 2], g[:, 1]
        torch.testing.assert_close(found, true, **EXACT)

    def test_what_is_not_read(self) -> None:
        weight, bias = p(5, 5), p(5)
        find = lookup(weight, bias)
        assert product_uses.linear(find, weight, weight) is None
        assert product_uses.linear(find, x(S, 5), bias) is None  # a vector is no matrix
        assert product_uses.addmm(find, bias, x(S, 5), weight, beta=2) is None
        assert product_uses.addmm(find, weight, x(S, 5), weight) is None
        assert product_uses.matmul(find, x(5), weight) is None
        assert product_uses.embedding(find, weight, torch.zeros(S), scale_grad_by_freq=True) is None

    @pytest.mark.parametrize("length", [1, 2])
    def test_one_number_added_to_every_output_is_no_bias_of_the_layer(self, length) -> None:
        weight, number = p(6, 5), p(*(1,) * length)
        find = lookup(weight, number)
        assert product_uses.linear(find, x(S, 5), weight, number) is None
        assert product_uses.addmm(find, number, x(S, 5), weight.detach().T) is None


class TestElementwise:
    @pytest.mark.parametrize(
        ("shape", "axes", "layout"),
        [((S, T, 5), (5,), FIRST), ((T, S, 2, 5), (2, 5), SECOND), ((2 * S, 5), (5,), INTERLEAVED)],
    )
    def test_norms_of_tokens(self, shape, axes, layout) -> None:
        given = 3 * x(*shape) + 1
        read, norm = elementwise_uses.layer_norm, torch.layer_norm
        check(read, norm, given, axes, p(*axes), p(*axes), eps=0.1, layout=layout)
        read, norm = elementwise_uses.rms_norm, torch.rms_norm
        check(read, norm, given, axes, p(*axes), 0.1, layout=layout)
        check(read, norm, given * 1e-8, axes, p(*axes), layout=layout)  # eps matters, by default

    @pytest.mark.parametrize("layout", [FIRST, FLAT, INTERLEAVED])
    def test_norms_of_channels(self, layout) -> None:
        for shape in ((S, 4, 3, 2), (S, 4)):
            given = many(shape, layout)
            read, norm = elementwise_uses.batch_norm, torch.batch_norm
            mean, var = x(4), x(4).square()
            rest = mean, var, False, 0.1, 0.01, False
            check(read, norm, given, p(4), p(4), *rest, layout=layout)
        given = many((S, 4, 3, 2), layout)
        read, norm = elementwise_uses.group_norm, torch.group_norm
        check(read, norm, given, 2, p(4), p(4), 0.01, layout=layout)

    @pytest.mark.parametrize("shape", [(5,), (1, 5), (T, 1), (1, 1, 5), ()])
    @pytest.mark.parametrize("layout", [FIRST, SECOND, INTERLEAVED])
    def test_parameters_broadcast_over_the_rows(self, shape, layout) -> None:
        if layout is SECOND and len(shape) == 2:
            shape = (1, *shape[::2], 5) if shape[0] == 1 else (T, 1, 1)
        sizes = {FIRST: (S, T, 5), SECOND: (T, S, 5), INTERLEAVED: (2 * S, T, 5)}[layout]
        given = x(*sizes)
        for reader, function in (
            (elementwise_uses.mul, torch.mul),
            (elementwise_uses.add, torch.add),
            (elementwise_uses.sub, torch.sub),
        ):
            check(reader, function, given, p(*shape), layout=layout)
            check(reader, function, p(*shape), given, layout=layout)
        check(elementwise_uses.rsub, torch.rsub, given, p(*shape), layout=layout)
        check(elementwise_uses.rsub, torch.rsub, p(*shape), given, layout=layout)

    def test_in_place(self) -> None:
        for reader, function in (
            (elementwise_uses.imul, Tensor.mul_), (elementwise_uses.iadd, Tensor.add_)
        ):  # fmt: skip
            check(reader, lambda a, b, f=function: f(a.clone(), b), x(S, 5), p(5))
        scale, given = p(5), x(S, 5)
        before, use = given.clone(), elementwise_uses.imul(lookup(scale), given, scale)
        with torch.no_grad():
            given.mul_(scale)  # the factor is gone: the use has a copy
        part = use.parts(torch.ones(S, 5).double(), FIRST, frozenset({"weight"}))["weight"]
        torch.testing.assert_close(part.grad, before, **EXACT)

    def test_repeated_parameters(self) -> None:
        def expanded(param: Tensor, *sizes: int) -> Tensor:
            return param.expand(*sizes)

        check(elementwise_uses.expand, expanded, p(1, 1, 5), S, T, -1)
        check(elementwise_uses.expand, expanded, p(5), T, S, 5, layout=SECOND)
        check(elementwise_uses.repeat, Tensor.repeat, p(1, 1, 5), S, T, 1)
        check(elementwise_uses.repeat, Tensor.repeat, p(T, 5), (S, 1, 1))

    @pytest.mark.parametrize("sizes", [(S, 2), (S, 1, 2), ((S, 2),)])
    def test_a_parameter_side_by_side_with_itself_is_not_read(self, sizes) -> None:
        param = p(5)
        assert elementwise_uses.repeat(lookup(param), param, *sizes) is None

    def test_what_is_not_read(self) -> None:
        a, b, given = p(5), p(5), x(S, 5)
        find = lookup(a, b)
        assert elementwise_uses.mul(find, a, b) is None
        assert elementwise_uses.mul(find, a, 2.0) is None
        assert elementwise_uses.imul(find, a, given) is None  # the parameter itself would change
        for read in (elementwise_uses.add, elementwise_uses.iadd, elementwise_uses.sub):
            assert read(find, given, a, alpha=2) is None
        for training, mean in ((True, x(5)), (False, None)):  # statistics of the batch
            norm = elementwise_uses.batch_norm
            assert norm(find, given, a, b, mean, mean, training, 0.1, 1e-5) is None

    def test_rows_run_outside_a_parameters_own_axes(self) -> None:
        """Of three axes: an addition's, a norm's, a product's, a convolution's."""
        use = elementwise_uses.add(lookup(param := p(T, 1, 5)), x(T, S, 5), param)
        assert [use.takes_row_axis(axis, 3) for axis in range(3)] == [False, True, False]
        use = elementwise_uses.layer_norm(lookup(param := p(5)), x(T, S, 5), (5,), param)
        assert [use.takes_row_axis(axis, 3) for axis in range(3)] == [True, True, False]
        use = product_uses.linear(lookup(param := p(6, 5)), x(T, S, 5), param)
        assert [use.takes_row_axis(axis, 3) for axis in range(3)] == [True, True, False]
        use = conv_uses.conv(lookup(param := p(4, 2, 3)), x(S, 2, 5), param)
        assert [use.takes_row_axis(axis, 3) for axis in range(3)] == [True, False, False]
        use = conv_uses.conv_transpose(lookup(param := p(2, 4, 3)), x(S, 2, 5), param)
        assert [use.takes_row_axis(axis, 3) for axis in range(3)] == [True, False, False]
