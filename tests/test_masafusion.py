"""MaSaFusion against its algorithm: a literal two-loop version, and the cases whose result is known."""

from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch

from masafusion_lab import InputError
from masafusion_lab.given import Given
from masafusion_lab.methods import MaSaFusion
from masafusion_lab.methods.masafusion import layers

W = 7.5


@pytest.fixture
def case(tiny):
    """Two pictures with their own prompts, regions, sketches and noise, in four steps."""
    g = torch.Generator().manual_seed(0)
    schedule = tiny.schedule(4)
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, 4:12, 4:12] = mask[1, :, :6, 9:] = 1
    given = Given(
        {
            "source": tiny.embed(["a cat on grass", "a red dog in snow"]),
            "target": tiny.embed(["a cat sitting on grass", "a red horse in snow"]),
            "empty": tiny.embed(["", ""]),
        },
        mask,
        tiny.hint("sketch", torch.rand(2, 1, 64, 64, generator=g)),
        0.1 * torch.randn(4, 2, 24, 32, generator=g),
    )
    states = torch.randn(5, 2, 4, 16, 16, generator=g)
    x = torch.randn(2, 4, 16, 16, generator=g)
    return SimpleNamespace(
        model=tiny, given=given, source=SimpleNamespace(states=states, null=given.null), x=x, schedule=schedule
    )


def run(case, method, **changes):
    given = replace(case.given, **changes)
    return list(method(case.model, given, case.source, case.x, schedule=case.schedule))


class Recorder:
    """A stock-like attention processor that caches or replaces Q, K, V, as Algorithm 1 writes it."""

    def __init__(self, cache, name):
        self.cache, self.name, self.mode = cache, name, None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        if encoder_hidden_states is None:
            kind, key = self.cache["mode"]
            if kind == "store":
                self.cache[key, self.name] = q, k, v
            elif kind == "qkv":
                q, k, v = self.cache[key, self.name]
            elif kind == "qk":
                q, k, _ = self.cache[key, self.name]
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for y in (q, k, v))
        p = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def algorithm_1(case):
    """Algorithm 1 as printed: cache the source's Q, K, V; loop for x^t2i, caching its Q, K; loop for x^T."""
    unet, schedule, given, x = case.model.unet, case.schedule, case.given, case.x
    cache = {"mode": (None, None)}
    kept = dict(unet.attn_processors)
    unet.set_attn_processor({name: Recorder(cache, name) for name in kept})

    def eps(x, i, text, null, mode, hint=True):
        out = []
        for half, c in (("null", null), ("text", text)):
            cache["mode"] = (mode[0], (mode[1], i, half))
            features = [f.clone() for f in given.hint] if hint else None
            out.append(unet(x, schedule.timesteps[i], c, down_intrablock_additional_residuals=features).sample)
        return W * out[1] + (1 - W) * out[0]

    try:
        source, target, empty = (given.prompts[name] for name in ("source", "target", "empty"))
        mask, steps = given.mask, range(len(schedule))
        for i in steps:
            eps(case.source.states[i], i, source, given.null[i], ("store", "S"), hint=False)
        t2i, history = x, []
        for i in steps:
            keep = eps(t2i, i, source, empty, ("qkv", "S"))
            edit = eps(t2i, i, target, empty, ("store", "I"))
            t2i = schedule.denoise(t2i, mask * edit + (1 - mask) * keep, i)
            history.append(t2i)
        final = mask * x + (1 - mask) * case.source.states[0]
        for i in steps:
            keep = eps(final, i, source, empty, ("qkv", "S"))
            edit = eps(final, i, target, empty, ("qk", "I"))
            final = schedule.denoise(final, mask * edit + (1 - mask) * keep, i)
    finally:
        unet.set_attn_processor(kept)
    return history, final


def test_lockstep_is_algorithm_1_with_its_two_loops_and_caches(case):
    states = run(case, MaSaFusion())
    t2i, final = algorithm_1(case)
    for state, expected in zip(states, t2i, strict=True):
        torch.testing.assert_close(state.x["t2i"], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(states[-1].x["target"], final, rtol=1e-3, atol=1e-3)


def test_a_batch_equals_its_pictures_one_by_one(case):
    both = run(case, MaSaFusion())[-1].x["target"]
    for b in range(2):
        one = SimpleNamespace(
            model=case.model,
            given=Given(
                {name: c[b : b + 1] for name, c in case.given.prompts.items()},
                case.given.mask[b : b + 1],
                tuple(f[b : b + 1] for f in case.given.hint),
                case.given.null[:, b : b + 1],
            ),
            source=SimpleNamespace(states=case.source.states[:, b : b + 1], null=None),
            x=case.x[b : b + 1],
            schedule=case.schedule,
        )
        torch.testing.assert_close(run(one, MaSaFusion())[-1].x["target"], both[b : b + 1], rtol=1e-3, atol=1e-3)


def test_with_an_empty_region_the_target_starts_at_the_source_and_only_preserves(case):
    nowhere = torch.zeros_like(case.given.mask)
    start = MaSaFusion().start(case.source.states[0], case.x, nowhere)
    assert torch.equal(start["target"], case.source.states[0])
    a = run(case, MaSaFusion(), mask=nowhere)[-1].x["target"]
    prompts = case.given.prompts | {"target": case.given.prompts["empty"]}
    b = run(case, MaSaFusion(), mask=nowhere, prompts=prompts)[-1].x["target"]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # the target prompt is not heard


def test_with_the_whole_picture_as_region_target_and_intermediate_are_the_same(case):
    for state in run(case, MaSaFusion(), mask=torch.ones_like(case.given.mask)):
        torch.testing.assert_close(state.x["target"], state.x["t2i"], rtol=1e-4, atol=1e-4)


def test_the_target_follows_the_source_when_nothing_differs(case):
    """Adapter silent, one prompt, empty region, the source's null: DI's target is the source, step by step."""
    given = replace(
        case.given,
        prompts=case.given.prompts | {"target": case.given.prompts["source"]},
        hint=tuple(torch.zeros_like(f) for f in case.given.hint),
        mask=torch.zeros_like(case.given.mask),
        null=None,
    )
    method = MaSaFusion(init_target="source")
    alone = case.source.states[0]
    from masafusion_lab.lockstep import predict

    for i, state in enumerate(method(case.model, given, replay_of(case, given), case.x, schedule=case.schedule)):
        branch = method.plan(case.model.sites, 4).branches["S"]
        eps = predict(case.model, {"S": branch}, {"source": alone}, given, i, schedule=case.schedule)["S"]
        alone = case.schedule.denoise(alone, eps, i)
        torch.testing.assert_close(state.x["target"], alone, rtol=1e-3, atol=1e-3)


def replay_of(case, given):
    """A source record that is the model's own guided trajectory."""
    from masafusion_lab.lockstep import predict

    method, x, states = MaSaFusion(), case.source.states[0], [case.source.states[0]]
    branch = method.plan(case.model.sites, 4).branches["S"]
    with torch.no_grad():
        for i in range(4):
            eps = predict(case.model, {"S": branch}, {"source": x}, given, i, schedule=case.schedule)["S"]
            x = case.schedule.denoise(x, eps, i)
            states.append(x)
    return SimpleNamespace(states=torch.stack(states), null=None)


SWITCHES = [
    {"preserve": "kv"},
    {"preserve": "qk"},
    {"preserve_layers": "decoder"},
    {"preserve_steps": (0, 2)},
    {"edit_layers": "0:2"},
    {"edit_steps": (2, 4)},
    {"qk_from": "preserve"},
    {"cfg_pairing": "cond_only"},
    {"source_null": "empty"},
    {"preserve_null": "tuned"},
    {"edit_null": "tuned"},
    {"hint_scale": 0.5},
    {"hint_until": 0.5},
    {"hint_on_null": False},
    {"hint_on_preserve": False},
    {"hint_on_source": True},
    {"init_t2i": "source"},
    {"init_t2i": "mixed"},
    {"init_target": "source"},
    {"init_target": "gauss"},
    {"share_noise": False},
    {"fusion_steps": (1, 3)},
    {"fusion_steps": (1, 3), "fusion_of": "both"},
    {"guidance": 3.0},
]


def test_every_switch_is_in_the_list_above_but_what_is_done_to_the_decoded_picture():
    assert {name for change in SWITCHES for name in change} | {"background"} == {f.name for f in fields(MaSaFusion)}


@pytest.mark.parametrize("change", SWITCHES, ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()))
def test_every_switch_is_alive(case, change):
    *others, _ = change.items()
    default = run(case, MaSaFusion(**dict(others)))[-1].x["target"]
    assert not torch.allclose(run(case, MaSaFusion(**change))[-1].x["target"], default, atol=1e-3)


def test_a_step_costs_ten_rows_and_none_for_a_source_nobody_reads_any_more(case):
    assert run(case, MaSaFusion())[-1].rows == 4 * 10
    assert run(case, MaSaFusion(preserve_steps=(0, 2)))[-1].rows == 2 * 10 + 2 * 8


def test_without_a_region_or_a_sketch_the_remedy_is_named(case):
    with pytest.raises(InputError, match="mask=FILE"):
        run(case, MaSaFusion(), mask=None)
    with pytest.raises(InputError, match="sketch=FILE"):
        run(case, MaSaFusion(), hint=None)
    without = run(case, MaSaFusion(hint_until=0), hint=None)[-1].x["target"]
    assert torch.equal(without, run(case, MaSaFusion(hint_until=0))[-1].x["target"])


@pytest.mark.parametrize("change", [{"edit_steps": (9, 12)}, {"preserve_layers": "40:"}, {"edit_layers": "7:7"}])
def test_a_window_that_touches_nothing_is_an_error(case, change):
    with pytest.raises(InputError, match="holds none of the"):
        run(case, MaSaFusion(**change))


def test_layers_are_named_in_running_order(tiny):
    assert layers("decoder", tiny.sites) == {s.depth for s in tiny.sites if not s.cross and "up_" in s.name}
    assert 3 in layers("2:4", tiny.sites)
    assert 4 not in layers("2:4", tiny.sites)
    assert layers("3,5", tiny.sites) == {3, 5}
    with pytest.raises(InputError, match="names no layers"):
        layers("upper", tiny.sites)
    with pytest.raises(InputError, match=r"'0,40': layer 40 is not there; this model has 0 to \d+$"):
        layers("0,40", tiny.sites)
