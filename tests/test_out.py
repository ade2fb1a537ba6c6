"""One contract of `out`, however a kernel declares and treats it."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from schemas import OPS

from diffusers_fa3.errors import InputError, KernelUnavailableError
from diffusers_fa3.kernels.out import call_kernel, check_out, fits_kernels
from diffusers_fa3.kernels.signature import ByIdentity, read_signature


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return [torch.randn(6, 2, 8) for _ in range(3)]


class Watched:
    """A kernel's body: returns 2q, in `out` if it gets one, and records its calls."""

    def __init__(self) -> None:
        self.calls = []

    def __call__(self, q, k, v, **options):
        self.calls.append(options)
        out = options.get("out")
        return 2 * q if out is None else out.copy_(2 * q)

    @property
    def got_out(self):
        return [call.get("out") is not None for call in self.calls]


def kernels_with_out(body):
    def by_keyword(q, k, v, *, out=None):
        return body(q, k, v, out=out)

    def by_position(q, k, v, scale=1.0, out=None):
        return body(q, k, v, out=out)

    def returning_a_tuple(q, k, v, out=None):
        return body(q, k, v, out=out), "lse", "more"

    @functools.wraps(by_keyword)
    def wrapped(*args, **kwargs):
        return by_keyword(*args, **kwargs)

    class Method:
        def kernel(self, q, k, v, out=None):
            return body(q, k, v, out=out)

    class Unhashable:
        __hash__ = None

        def __call__(self, q, k, v, out=None):
            return body(q, k, v, out=out)

    class Slotted:
        __slots__ = ()

        def __call__(self, q, k, v, out=None):
            return body(q, k, v, out=out)

    return {
        "by keyword": by_keyword,
        "by position": by_position,
        "tuple": returning_a_tuple,
        "wrapped": wrapped,
        "wrapped twice": functools.wraps(wrapped)(lambda *a, **kw: wrapped(*a, **kw)),
        "partial": functools.partial(by_position, scale=2.0),
        "partial of a partial": functools.partial(functools.partial(by_position), scale=2.0),
        "bound method": Method().kernel,
        "unhashable": Unhashable(),
        "slotted": Slotted(),
    }


def kernels_without_out(body):
    def plain(q, k, v):
        return body(q, k, v)

    def out_with_an_underscore(q, k, v, out_=None):
        if out_ is not None:
            out_.fill_(7)
            raise RuntimeError("the output of this operator may not be an input")
        return body(q, k, v)

    def any_keyword(q, k, v, **kwargs):
        assert not kwargs
        return body(q, k, v)

    def positional_only(q, k, v, out=None, /):
        assert out is None
        return body(q, k, v)

    @functools.wraps(kernels_with_out(body)["by keyword"])
    def hides_out(q, k, v):
        return body(q, k, v)

    return {
        "plain": plain,
        "out_": out_with_an_underscore,
        "**kwargs": any_keyword,
        "positional only": positional_only,
        "wraps without handing on": hides_out,
        "list": lambda q, k, v: [body(q, k, v), "lse"],
    }


WITH = list(kernels_with_out(None))
WITHOUT = list(kernels_without_out(None))


@pytest.mark.parametrize("name", WITH)
def test_a_kernel_that_has_out_writes_into_it(qkv, name):
    body = Watched()
    kernel = kernels_with_out(body)[name]
    out = torch.empty_like(qkv[0])
    result = call_kernel(kernel, *qkv, out=out)
    first = result[0] if isinstance(result, tuple) else result
    assert first is out
    assert torch.equal(out, 2 * qkv[0])
    assert body.got_out == [True]


@pytest.mark.parametrize("name", WITHOUT)
def test_the_result_of_a_kernel_without_out_is_copied(qkv, name):
    body = Watched()
    kernel = kernels_without_out(body)[name]
    out = torch.empty_like(qkv[0])
    result = call_kernel(kernel, *qkv, out=out)
    first = result[0] if isinstance(result, tuple) else result
    assert first is out
    assert torch.equal(out, 2 * qkv[0])
    assert body.got_out == [False]


@pytest.mark.parametrize("name", [*WITH, *WITHOUT])
def test_without_out_the_kernel_is_called_as_it_is(qkv, name):
    body = Watched()
    kernel = (kernels_with_out(body) | kernels_without_out(body))[name]
    result = call_kernel(kernel, *qkv)
    first = result[0] if isinstance(result, (tuple, list)) else result
    assert torch.equal(first, 2 * qkv[0])
    assert body.got_out == [False]


def test_none_is_never_passed_down_as_out(qkv):
    seen = []

    def kernel(q, k, v, out="not given"):
        seen.append(out)
        return q

    call_kernel(kernel, *qkv, out=None)
    assert seen == ["not given"]


def test_a_tuple_keeps_its_other_members(qkv):
    kernel = kernels_with_out(Watched())["tuple"]
    out = torch.empty_like(qkv[0])
    assert call_kernel(kernel, *qkv, out=out)[1:] == ("lse", "more")


@pytest.mark.parametrize("name", list(OPS))
@pytest.mark.parametrize("form", ["packet", "overload", "partial"])
def test_raw_ops_are_asked_by_their_schema(name, form):
    op = OPS[name].op
    kernel = {"packet": op, "overload": op.default, "partial": functools.partial(op)}[form]
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    arguments = {a.name: None for a in op.default._schema.arguments[3:] if a.name != "out"}
    arguments |= {"softmax_scale": 1.0, "is_causal": False, "softcap": 0.0, "num_splits": 1}
    arguments |= dict.fromkeys(("window_size_left", "window_size_right"), -1)
    flags = ("is_rotary_interleaved", "only_qv")
    arguments |= {n: False for n in flags if n in arguments}
    numbers = ("attention_chunk", "sm_margin", "cp_world_size", "cp_rank")
    arguments |= {n: 0 for n in numbers if n in arguments}
    out = torch.empty_like(q)
    result = call_kernel(kernel, q, k, v, out=out, **arguments)
    assert result[0] is out
    assert len(result) == 4
    assert OPS[name].last["out"].data_ptr() == out.data_ptr()
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=1.0
    )
    torch.testing.assert_close(out, want.transpose(1, 2))


def test_out_takes_its_place_among_arguments_by_position():
    q, k, v = (torch.randn(1, 4, 2, 8) for _ in range(3))
    out = torch.empty_like(q)
    before_and_after = (None, None, None, None, None)  # k_new, v_new, q_v, out, cu_seqlens_q
    call_kernel(OPS["upstream"].op, q, k, v, *before_and_after, softmax_scale=1.0, out=out)
    assert OPS["upstream"].last["out"].data_ptr() == out.data_ptr()


def test_an_out_that_was_passed_already_is_refused(qkv):
    def kernel(out, q, k, v):
        return out

    other = torch.empty_like(qkv[0])
    with pytest.raises(InputError, match="takes `out` by position"):
        call_kernel(kernel, *qkv, out=other)
    bound = functools.partial(kernels_with_out(Watched())["by keyword"], out=other)
    with pytest.raises(InputError, match="has an `out` bound already"):
        call_kernel(bound, *qkv, out=torch.empty_like(other))
    assert call_kernel(bound, *qkv) is other


def test_a_kernel_that_ignores_its_out_is_found_out(qkv):
    def forgetful(q, k, v, out=None):
        return 2 * q

    out = torch.zeros_like(qkv[0])
    assert call_kernel(forgetful, *qkv, out=out) is out
    assert torch.equal(out, 2 * qkv[0])


def test_a_kernel_that_returns_another_view_of_out_is_copied_right(qkv):
    q, k, v = (x[:2] for x in qkv)

    def transposed(q, k, v, out=None):
        out.copy_(2 * q.transpose(0, 1))
        return out.transpose(0, 1)

    out = torch.zeros_like(q)
    assert call_kernel(transposed, q, k, v, out=out) is out
    assert torch.equal(out, 2 * q)


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda q: q[:1], r"returned shape \(1, 2, 8\); out has \(6, 2, 8\)"),
        (lambda q: "text", "must return a tensor; got str"),
        (lambda q: (), "must return a tensor; got tuple"),
    ],
    ids=["would broadcast", "no tensor", "nothing"],
)
def test_a_result_that_is_no_attention_of_q_is_refused(qkv, result, words):
    with pytest.raises(InputError, match=words):
        call_kernel(lambda q, k, v: result(q), *qkv, out=torch.empty_like(qkv[0]))


def test_what_a_kernel_raises_passes_and_nothing_is_tried_again(qkv):
    calls = []

    def half_way(q, k, v, out=None):
        calls.append(out)
        out[:3] = 1
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match=r"^half way$"):
        call_kernel(half_way, *qkv, out=torch.zeros_like(qkv[0]))
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["with", "without"])
def test_a_type_error_inside_a_kernel_is_no_sign_of_anything(qkv, name):
    calls = []

    def fails(*_):
        calls.append(1)
        raise TypeError("got an unexpected keyword argument 'out'")

    def with_out(q, k, v, out=None):
        fails()

    def without_out(q, k, v):
        fails()

    kernel = {"with": with_out, "without": without_out}[name]
    with pytest.raises(TypeError, match="unexpected keyword argument 'out'"):
        call_kernel(kernel, *qkv, out=torch.empty_like(qkv[0]))
    assert calls == [1]


@pytest.mark.parametrize("switch", ["return_lse", "return_softmax_lse", "return_attn_probs"])
def test_the_log_sum_exp_is_asked_for_by_the_kernels_own_name(qkv, switch):
    scope = {}
    exec(f"def kernel(q, k, v, {switch}=False): return (q, 'lse') if {switch} else q", scope)
    assert call_kernel(scope["kernel"], *qkv, return_lse=True) == (qkv[0], "lse")
    assert call_kernel(scope["kernel"], *qkv) is qkv[0]


def test_the_plainest_switch_is_taken_where_there_are_two(qkv):
    def kernel(q, k, v, return_attn_probs=False, return_softmax_lse=False):
        return q, (return_attn_probs, return_softmax_lse)

    assert call_kernel(kernel, *qkv, return_lse=True)[1] == (False, True)


def test_a_kernel_that_always_returns_a_tuple_needs_no_switch(qkv):
    assert call_kernel(lambda q, k, v: (q, "lse"), *qkv, return_lse=True) == (qkv[0], "lse")


def test_a_log_sum_exp_that_does_not_come_is_an_error(qkv):
    def no_switch(q, k, v):
        return q

    with pytest.raises(
        KernelUnavailableError, match="no_switch returned no log-sum-exp, but one result; with"
    ):
        call_kernel(no_switch, *qkv, return_lse=True)
    with pytest.raises(KernelUnavailableError, match="relu cannot return a log-sum-exp"):
        call_kernel(torch.ops.aten.relu, *qkv, return_lse=True)


def never(q, k, v, out=None):
    raise AssertionError("the kernel must not run")


UNFIT = {
    "shape": (lambda q: torch.empty(6, 2, 4), r"shape \(6, 2, 8\); got \(6, 2, 4\)"),
    "dtype": (lambda q: torch.empty(6, 2, 8).half(), "dtype torch.float32 for torch.float32"),
    "device": (lambda q: torch.empty(6, 2, 8, device="meta"), "on cpu; got meta"),
    "no tensor": (lambda q: [1.0], "must be a tensor; got list"),
    "requires grad": (lambda q: torch.empty(6, 2, 8, requires_grad=True), "autograd"),
    "expanded": (lambda q: torch.empty(1, 2, 8).expand(6, 2, 8), "overlap itself"),
    "overlapping rows": (lambda q: torch.empty(64).as_strided((6, 2, 8), (4, 4, 1)), "itself"),
    "q itself": (lambda q: q, "memory of an input"),
    "a view of q's memory": (lambda q: q.flip(0).set_(q).view(6, 2, 8), "memory of an input"),
}


@pytest.mark.parametrize("name", list(UNFIT))
def test_an_unfit_out_is_refused_before_the_kernel_runs(qkv, name):
    make, words = UNFIT[name]
    with pytest.raises(InputError, match=words):
        call_kernel(never, *qkv, out=make(qkv[0]))


@pytest.mark.parametrize("input_", [0, 1, 2], ids=["q", "k", "v"])
def test_an_out_that_shares_bytes_with_an_input_is_refused(qkv, input_):
    buffer = torch.zeros(6 * 2 * 8 + 4)
    qkv[input_] = buffer[:96].view(6, 2, 8)
    with pytest.raises(InputError, match="must not overlap the memory of an input"):
        call_kernel(never, *qkv, out=buffer[4:].view(6, 2, 8))


def test_neighbours_in_one_buffer_do_not_overlap(qkv):
    buffer = torch.randn(2, 6, 2, 8)
    check_out(buffer[0], buffer[1], qkv[2])


def test_an_input_without_elements_overlaps_nothing(qkv):
    out = torch.empty(6, 2, 8)
    check_out(out, qkv[0], out[3:3], others=(out[3:3],))


def test_a_mask_counts_as_an_input(qkv):
    out = torch.empty_like(qkv[0])
    with pytest.raises(InputError, match="must not overlap the memory of an input"):
        check_out(out, qkv[0], qkv[2], others=(None, out.view(-1)[:6]))


def test_out_takes_v_head_size(qkv):
    out = torch.empty(6, 2, 4)
    call_kernel(lambda q, k, v: q[..., :4], qkv[0], qkv[1], qkv[2][..., :4], out=out)
    assert torch.equal(out, qkv[0][..., :4])


def test_out_of_float8_inputs_is_bfloat16(qkv):
    q, _, v = (x.to(torch.float8_e4m3fn) for x in qkv)
    check_out(torch.empty(6, 2, 8, dtype=torch.bfloat16), q, v)
    with pytest.raises(InputError, match=r"torch.bfloat16 for torch.float8_e4m3fn"):
        check_out(torch.empty(6, 2, 8, dtype=torch.float8_e4m3fn), q, v)


@pytest.mark.parametrize("position", [0, 1, 2], ids=["q", "k", "v"])
def test_out_and_autograd_exclude_each_other(qkv, position):
    qkv[position].requires_grad_()
    out = torch.empty_like(qkv[0]).detach()
    with pytest.raises(InputError, match=r"torch\.no_grad"):
        call_kernel(never, *qkv, out=out)
    with torch.no_grad():
        call_kernel(lambda q, k, v: q, *qkv, out=out)
    assert torch.equal(out, qkv[0])


def test_an_inference_out_is_refused_outside_of_inference_mode(qkv):
    with torch.inference_mode():
        out = torch.empty_like(qkv[0])
        call_kernel(lambda q, k, v: q, *qkv, out=out)
    with pytest.raises(InputError, match="made in inference mode"):
        call_kernel(never, *qkv, out=out)


def test_q_and_v_may_be_given_by_name(qkv):
    q, k, v = qkv
    body = Watched()
    kernel = kernels_with_out(body)["by keyword"]
    out = torch.empty_like(q)
    assert call_kernel(kernel, q=q, k=k, v=v, out=out) is out
    with pytest.raises(InputError, match=r"shape \(6, 2, 8\)"):
        call_kernel(kernel, q=q, k=k, v=v, out=out[:1])
    with pytest.raises(InputError, match="q, k and v must come first, or by name"):
        call_kernel(kernel, x=q, k=k, v=v, out=out)


STRIDED = {
    "transposed": lambda: torch.empty(2, 6, 8).transpose(0, 1),
    "part of a row": lambda: torch.empty(6, 2, 16)[..., :8],
    "every other element": lambda: torch.empty(6, 2, 16)[..., ::2],
    "not 16-byte aligned": lambda: torch.empty(97)[1:].view(6, 2, 8),
    "rows not 16-byte aligned": lambda: torch.empty(6, 2, 9)[..., :8],
}


@pytest.mark.parametrize("name", list(STRIDED))
def test_a_strided_out_is_served(qkv, name):
    body = Watched()
    out = STRIDED[name]()
    assert call_kernel(kernels_with_out(body)["by keyword"], *qkv, out=out) is out
    assert torch.equal(out, 2 * qkv[0])
    assert body.got_out == [name in ("transposed", "part of a row")]
    assert fits_kernels(out) == body.got_out[0]


def test_nothing_around_a_strided_out_is_touched(qkv):
    buffer = torch.full((6, 2, 24), 5.0)
    call_kernel(lambda q, k, v: q, *qkv, out=buffer[..., 8:16])
    assert (buffer[..., :8] == 5).all()
    assert (buffer[..., 16:] == 5).all()


def test_a_signature_is_read_once_and_forgotten_with_its_kernel():
    reads = []
    remembered = ByIdentity(lambda thing: reads.append(thing.__name__))

    def kernel():
        pass

    remembered(kernel)
    remembered(kernel)
    assert reads == ["kernel"]
    assert len(remembered._known) == 1
    gone = weakref.ref(kernel)
    del kernel
    gc.collect()
    assert gone() is None
    assert not remembered._known


def test_a_bound_method_is_known_by_its_function():
    class Owner:
        def method(self, q, k, v, out=None):
            pass

    owner = Owner()
    read_signature(owner.method)
    known = len(read_signature._known)
    signature = read_signature(Owner().method)
    assert len(read_signature._known) == known
    assert signature.positional == ("q", "k", "v", "out")
    assert read_signature(Owner.method).positional[0] == "self"


def test_a_builtin_without_a_signature_is_asked_for_nothing():
    assert read_signature(torch.ops.aten.add.Tensor).names == ("self", "other", "alpha")
    assert "out" not in read_signature(torch.nn.functional.scaled_dot_product_attention).names
