"""Methods that fuse attention against their published rules, written out row by row on a UNet with plain hooks."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from masafusion_lab.methods import EmbCtrl, MasaCtrl, MaSaFusionNoAdapter, PlugAndPlay, PromptToPrompt, T2IOnly
from masafusion_lab.model import StableDiffusion
from tests.test_methods_attention import SOURCE, TARGET, make, one, run

W, STEPS = 7.5, 4
COARSE = ("down_blocks.2", "mid_block", "up_blocks.0")
"""Where this UNet's maps are a quarter of the latent's side; the largest are in down_blocks.0 and up_blocks.2."""


REFINED = [
    [0, 1, None, 2, None, 4, 5, 6, *range(8, 24)],  # a cat sitting on grass -> a blue cat running on grass
    [0, 1, 2, None, None, None, None, 4, 5, 6, *range(10, 24)],  # a red dog in snow -> a red h-or-s-e in snow
]
"""The source's token at each place of the target; None: the token is new. After the end, padding."""
SHORTENED = [
    [0, 1, 3, None, 5, 6, 7, *range(8, 24), 23],  # the other way round
    [0, 1, 2, None, 7, 8, 9, *range(10, 24), 23, 23, 23],
]
SHORTENED_AS_PUBLISHED = [[0, 1, 3, None, 5, 6, 7, *range(7, 24)], [0, 1, 2, None, 7, 8, 9, *range(7, 24)]]


@pytest.fixture(scope="module")
def case(tiny_root):
    return make(StableDiffusion.load(str(tiny_root)), STEPS)


def softmax_qk(q, k, bias=0.0):
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias, -1)


@contextmanager
def hooked(unet, attend, feature=None):
    """Every attention layer computes attend(name, cross, q, k, v), rows by heads; `feature`: block and its rule."""

    class Plain:
        def __init__(self, name):
            self.name = name

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
            q, k, v = (y.reshape(*y.shape[:2], attn.heads, -1).permute(0, 2, 1, 3) for y in (q, k, v))
            out = attend(self.name, encoder_hidden_states is not None, q, k, v)
            return attn.to_out[0](out.permute(0, 2, 1, 3).flatten(2))

    kept = dict(unet.attn_processors)
    unet.set_attn_processor({name: Plain(name) for name in kept})
    hook = feature and unet.get_submodule(feature[0]).register_forward_hook(lambda _, __, y: feature[1](y))
    try:
        yield unet
    finally:
        unet.set_attn_processor(kept)
        if hook:
            hook.remove()


def own(name, cross, q, k, v):
    return softmax_qk(q, k) @ v


def step(case, x, eps, i):
    a, b = case.schedule.abar[i], case.schedule.abar[i + 1]
    return b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps


def call(case, unet, i, rows, hints=None):
    """eps of rows (latent, embedding); `hints`: which rows see the adapter's features."""
    features = None
    if hints:
        features = [torch.cat([f if on else 0 * f for on in hints]) for f in hints_of(case)]
    x, text = (torch.cat(y) for y in zip(*rows, strict=True))
    return unet(x, case.schedule.timesteps[i], text, down_intrablock_additional_residuals=features).sample.chunk(
        len(rows)
    )


def hints_of(case):
    return [f.clone() for f in case.given.hint]


def cfg(null, text, w=W):
    return null + w * (text - null)


def each(case, of):
    """What `of` gives for every picture alone, as a batch."""
    out = []
    for b in range(2):
        pick = {name: c[b : b + 1] for name, c in case.given.prompts.items()}
        alone = type(case)(**vars(case))
        alone.given = type(case.given)(
            pick,
            case.given.mask[b : b + 1],
            tuple(f[b : b + 1] for f in case.given.hint),
            texts={k: [t[b]] for k, t in case.given.texts.items()},
        )
        alone.states, alone.x, alone.b = case.source.states[:, b : b + 1], case.x[b : b + 1], b
        with torch.no_grad():
            out.append(of(alone))
    return torch.cat(out)


def assert_same(case, method, published, **changes):
    got = run(case, method, **changes)[-1].x["target"]
    want = each(case, published)
    assert (got - want).norm() <= 1e-4 * want.norm()


@pytest.mark.parametrize("masked", [True, False])
def test_masafusion_without_adapter_is_algorithm_5_with_its_cache(case, masked):
    a, b = 1, 3

    def algorithm_5(one):
        cache, mode, prompts = {}, {}, one.given.prompts

        def attend(name, cross, q, k, v):
            if not cross and mode["kind"] == "store":
                cache[name, mode["at"]] = q, k, v
            elif not cross and mode["kind"] == "kv":
                _, k, v = cache[name, mode["at"]]
            elif not cross and mode["kind"] == "qkv":
                q, k, v = cache[name, mode["at"]]
            return own(name, cross, q, k, v)

        def eps(x, i, c, kind):
            halves = []
            for half, text in (("null", prompts["empty"]), ("text", c)):
                mode.update(kind=kind, at=(i, half))
                halves += call(one, unet, i, [(x, text)])
            return cfg(*halves)

        with hooked(one.model.unet, attend) as unet:
            for i in range(STEPS):
                eps(one.states[i], i, prompts["source"], "store")
            x = one.states[0]
            for i in range(STEPS):
                if a <= i < b:
                    noise = eps(x, i, prompts["target"], "kv")  # (13)
                    if masked:
                        inside = one.given.mask
                        noise = inside * noise + (1 - inside) * eps(x, i, prompts["source"], "qkv")  # (14)
                else:
                    noise = eps(x, i, prompts["target"], None)
                x = step(one, x, noise, i)
        return x

    changes = {} if masked else {"mask": None}
    assert_same(case, MaSaFusionNoAdapter(fuse_steps=(a, b)), algorithm_5, **changes)


def test_embctrl_is_the_sources_embeddings_with_the_new_words_in_place(case):
    def algorithm_4(one):
        prompts, x = one.given.prompts, one.states[0]
        mixed = prompts["target"].clone()
        for j, i in enumerate(REFINED[one.b]):
            if i is not None:
                mixed[:, j] = prompts["source"][:, i]  # (12)
        with hooked(one.model.unet, own) as unet:
            for i in range(STEPS):
                x = step(one, x, cfg(*call(one, unet, i, [(x, prompts["empty"]), (x, mixed)])), i)
        return x

    assert_same(case, EmbCtrl(), algorithm_4)


def test_embctrls_target_is_corrected_as_the_source_is(case):
    def corrected(one):
        prompts, x = one.given.prompts, one.states[0]
        mixed = EmbCtrl().prepare(one.model, one.given, one.schedule).prompts["target"]
        with hooked(one.model.unet, own) as unet:
            for i in range(STEPS):
                s = one.states[i]
                moved = step(one, s, cfg(*call(one, unet, i, [(s, prompts["empty"]), (s, prompts["source"])])), i)
                x = step(one, x, cfg(*call(one, unet, i, [(x, prompts["empty"]), (x, mixed)])), i)
                x = x + (one.states[i + 1] - moved)
        return x

    assert_same(case, EmbCtrl(offset_on_target=True), corrected)


def prompt_to_prompt(one, mappers, *, cross, self_until, limit, self_from=0.0, words=None, equal=None, blend=None):
    """Hertz et al.: batch [source, target] of both halves of guidance; a controller edits the second half in place.

    `mappers`: M (24, 24) and which target tokens are new; `words`: position -> last step; `blend`: tokens of source and
    target, and of what is subtracted; first step; threshold.
    """
    prompts = one.given.prompts
    M, new = mappers
    alpha = torch.zeros(STEPS + 1, 24)
    alpha[: int(cross * (STEPS + 1))] = 1
    for at, until in (words or {}).items():
        alpha[:, at] = 0
        alpha[: int(until * (STEPS + 1)), at] = 1
    equaliser = torch.ones(24)
    for at, c in (equal or {}).items():
        equaliser[at] = c
    now, store = {}, {}

    def attend(name, is_cross, q, k, v):
        p = softmax_qk(q, k)  # (4, heads, pixels, keys)
        base, edited = p[2], p[3].clone()
        if is_cross:
            followed = (torch.einsum("hpw,wn->hpn", base, M) + edited * new) * equaliser
            a = alpha[now["i"]]
            p[3] = followed * a + (1 - a) * edited
            if name.startswith(COARSE):
                store[name] = store.get(name, 0) + (torch.stack([base, edited]) if (blend or {}).get("own") else p[2:])
        elif int(STEPS * self_from) <= now["i"] < int(STEPS * self_until) and not name.startswith(limit):
            p[3] = base
        return p @ v

    x = one.states[0]
    with hooked(one.model.unet, attend) as unet:
        for i in range(STEPS):
            now["i"] = i
            null = prompts["empty"]
            s = one.states[i]
            _, null_eps, _, text_eps = call(
                one, unet, i, [(s, null), (x, null), (s, prompts["source"]), (x, prompts["target"])]
            )
            x = step(one, x, cfg(null_eps, text_eps), i)
            if blend and i >= blend["start"]:
                x = blended(one.states[i + 1], x, torch.stack(list(store.values())), blend)
    return x


def blended(source, target, maps, blend):
    """maps (layers, 2, heads, pixels, words)."""

    def mask(tokens, pool):
        out = []
        for row in range(2):
            m = maps[:, row][..., tokens[row]].sum(-1).mean((0, 1)).view(1, 1, target.shape[-2] // 4, -1)
            m = F.max_pool2d(m, 3, 1, 1) if pool else m
            m = F.interpolate(m, target.shape[-2:])
            out.append((m / m.max()) > blend["threshold"])
        return out[0] | out[1]

    on = mask(blend["tokens"], True)
    if "without" in blend:
        on &= ~mask(blend["without"], False)
    return source + on.float() * (target - source)


def refined(b, mapper=REFINED):
    M, new = torch.zeros(24, 24), torch.zeros(24)
    for j, i in enumerate(mapper[b]):
        if i is None:
            new[j] = 1
        else:
            M[i, j] = 1
    return M, new


LARGEST = ("down_blocks.0", "up_blocks.2")


def test_prompt_to_prompt_refines(case):
    assert_same(
        case,
        PromptToPrompt(),
        lambda one: prompt_to_prompt(one, refined(one.b), cross=0.8, self_until=0.5, limit=LARGEST),
    )


def test_prompt_to_prompt_reweights_words_with_windows_of_their_own(case):
    red = [3, 2]  # "cat" in the first prompt, "red" in the second
    for b, word in enumerate(("cat", "red")):
        method = PromptToPrompt(
            cross_window=(0, 0.4), cross_words={word: (0, 0.6)}, reweight={word: 4.0}, self_resolution=16
        )
        lone = only(case, b)
        got = run(lone, method)[-1].x["target"]

        def published(one):
            return prompt_to_prompt(
                one,
                refined(one.b),
                cross=0.4,
                self_until=0.5,
                limit=(*LARGEST, "down_blocks.1", "up_blocks.1"),
                words={red[one.b]: 0.6},
                equal={red[one.b]: 4.0},
            )

        want = each(case, published)[b : b + 1]
        assert (got - want).norm() <= 1e-4 * want.norm()


def only(case, b):
    """The b-th picture as a case."""
    alone, source = one(case, case.source, b)
    alone.source = source
    return alone


@pytest.mark.parametrize(("without", "maps"), [(False, "used"), (True, "used"), (True, "own")])
def test_prompt_to_prompt_blends_where_the_words_are_looked_at(case, without, maps):
    case = make(case.model, STEPS, size=(16, 24))
    tokens, off = [[[2], [3]], [[3], [3, 4, 5, 6]]], [[[5], [6]], [[5], [8]]]
    words = [(("cat",), ("cat",), ("grass",)), (("dog",), ("horse",), ("snow",))]
    for b in range(2):
        source, target, no = words[b]
        method = PromptToPrompt(
            blend_source=source,
            blend_target=target,
            blend_without=no if without else (),
            blend_threshold=0.95,
            blend_maps=maps,
        )
        got = run(only(case, b), method)[-1].x["target"]
        blend = {"tokens": tokens[b], "start": int(0.2 * STEPS), "threshold": 0.95, "own": maps == "own"}
        blend |= {"without": off[b]} if without else {}
        want = each(
            case,
            lambda one, blend=blend: prompt_to_prompt(
                one, refined(one.b), cross=0.8, self_until=0.5, limit=LARGEST, blend=blend
            ),
        )[b : b + 1]
        assert (got - want).norm() <= 1e-4 * want.norm()
        assert not torch.allclose(got, run(only(case, b), PromptToPrompt())[-1].x["target"], atol=1e-2)


@pytest.mark.parametrize("as_published", [False, True])
def test_prompt_to_prompt_refines_to_a_shorter_prompt(case, as_published):
    back = make(case.model, STEPS, source=TARGET, target=SOURCE)
    mapper = SHORTENED_AS_PUBLISHED if as_published else SHORTENED
    method = PromptToPrompt(as_published=as_published)
    kinds = {"cross": 0.8, "self_until": 0.5, "limit": LARGEST}
    assert_same(back, method, lambda one: prompt_to_prompt(one, refined(one.b, mapper), **kinds))


def replaced(b, as_published):
    """a cat sitting on grass -> a h-or-s-e sitting on snow; a red h-or-s-e in snow -> a red cat in snow."""
    M = torch.zeros(24, 24)
    if b == 0:
        pairs = [(0, 0), (1, 1), (3, 6), (4, 7), (5, 8)]
        M[2, 2:6] = 1 / 4
        pairs += [(j, j) for j in range(9, 24)] if as_published else [(j - 3, j) for j in range(9, 24)]
    else:
        pairs = [(0, 0), (1, 1), (2, 2)]
        M[3:7, 3] = 1
        pairs += [(j, j) for j in range(4, 21)] if as_published else [(min(j + 3, 23), j) for j in range(4, 24)]
    for i, j in pairs:
        M[i, j] = 1
    return M, torch.zeros(24)


@pytest.mark.parametrize("as_published", [False, True])
def test_prompt_to_prompt_replaces_word_for_word(case, as_published):
    source = ["a cat sitting on grass", "a red horse in snow"]
    other = make(case.model, STEPS, source=source, target=["a horse sitting on snow", "a red cat in snow"])
    method = PromptToPrompt(edit="replace", as_published=as_published, self_window=(0.25, 0.5), cross_window=(0, 1))

    def published(one):
        return prompt_to_prompt(
            one, replaced(one.b, as_published), cross=1, self_from=0.25, self_until=0.5, limit=LARGEST
        )

    assert_same(other, method, published)


def plug_and_play(one, rows, share=None, *, qk, feature):
    """Tumanyan et al.: rows of (latent "s" or "x", embedding); the i-th target row reads source row rows[...][2].

    The last rows are the target's under null, negative and target prompt, or negative and target prompt.
    """
    now = {}
    injected = ("up_blocks.0.attentions.1", "up_blocks.1", "up_blocks.2")
    reads = [r for _, _, r in rows]

    def attend(name, cross, q, k, v):
        if not cross and now["i"] < qk and name.startswith(injected):
            q, k = q[reads], k[reads]
        return softmax_qk(q, k) @ v

    def read_feature(y):
        return y[reads] if now["i"] < feature else y

    x = one.states[0]
    with hooked(one.model.unet, attend, ("up_blocks.0.resnets.1.conv2", read_feature)) as unet:
        for i in range(STEPS):
            now["i"] = i
            out = call(one, unet, i, [({"s": one.states[i], "x": x}[latent], text) for latent, text, _ in rows])
            if share is None:
                null, text = out[-2:]
            else:
                empty, negative, text = out[-3:]
                null = share[i] * empty + (1 - share[i]) * negative
            x = step(one, x, cfg(null, text), i)
    return x


@pytest.mark.parametrize("negative", ["", "orange hat"])
def test_plug_and_play_is_pnp_diffusers(case, negative):
    def published(one):
        prompts = one.given.prompts
        against = one.model.embed([negative])
        rows = [("s", prompts["empty"], 0), ("x", against, 0), ("x", prompts["target"], 0)]
        return plug_and_play(one, rows, qk=2, feature=3)

    assert_same(case, PlugAndPlay(negative=negative), published)


@pytest.mark.parametrize("negative", ["", "orange hat"])
def test_plug_and_play_is_the_original(case, negative):
    def published(one):
        prompts = one.given.prompts
        against = one.model.embed([negative]) if negative else prompts["source"]
        rows = [
            ("s", prompts["empty"], 0),
            ("s", prompts["source"], 1),
            ("x", prompts["empty"], 0),
            ("x", against, 0),
            ("x", prompts["target"], 1),
        ]
        return plug_and_play(one, rows, [0.75, 0.5, 0.25, 0.0], qk=3, feature=4)

    method = PlugAndPlay(variant="original", source_prompt="source", negative=negative, negative_fade=0.75)
    assert_same(case, method, published)


VARIANTS = [("plain", 0), ("union", 0), ("masked", 0), ("masked", 1), ("auto", 0)]


@pytest.mark.parametrize(("variant", "soft"), VARIANTS)
def test_masactrl_reads_keys_and_values_of_the_source(case, variant, soft):
    """Cao et al.: batch [source, target] of both halves of guidance; the adapter sees target rows alone."""
    settings, tokens = {"variant": variant, "mutual_window": (0.5, 1)}, {2: [2], 3: [2, 3]}  # by row: cat; red, cat
    if variant == "auto":
        source, target = ["a cat on grass", "a cat in snow"], ["a red cat on grass", "a red cat in snow"]
        case = make(case.model, STEPS, source=source, target=target, size=(16, 24))
        settings |= {"source_prompt": "source", "auto_source": ("cat",), "auto_target": ("red", "cat")}
        settings["auto_threshold"] = 0.2
    mask = case.given.mask * (0.4 if soft else 1)

    def published(one):
        prompts, now = one.given.prompts, {}
        said = prompts["source" if variant == "auto" else "empty"]
        region = mask[one.b : one.b + 1]

        def attend(name, cross, q, k, v):
            out = own(name, cross, q, k, v)
            if cross and name.startswith(COARSE):
                now["maps"].append(softmax_qk(q, k).mean(1))
            if cross or now["i"] < 2 or not name.startswith(("up_blocks.1", "up_blocks.2")):
                return out
            for row in (1, 3):
                s = row - 1
                if variant == "plain":
                    out[row] = softmax_qk(q[row], k[s]) @ v[s]
                elif variant == "union":
                    keys, values = torch.cat([k[s], k[row]], 1), torch.cat([v[s], v[row]], 1)
                    out[row] = softmax_qk(q[row], keys) @ values
                else:
                    scale = (region.shape[-1] * region.shape[-2] / q.shape[2]) ** 0.5
                    size = [round(side / scale) for side in region.shape[-2:]]
                    m = F.interpolate(region, size).flatten() if variant == "masked" else found(2, size)
                    n = m if variant == "masked" else found(3, size)
                    low = torch.finfo(torch.float32).min
                    background = softmax_qk(q[row], k[s], m.masked_fill(m == 1, low)) @ v[s]
                    thing = softmax_qk(q[row], k[s], m.masked_fill(m == 0, low)) @ v[s]
                    out[row] = thing * n[:, None] + background * (1 - n[:, None])
            return out

        def found(row, size):
            """In the step so far, where a row looks at its words by at least a fifth of the way to the most."""
            looks = torch.stack(now["maps"]).mean(0)[row][:, tokens[row]].sum(-1)
            looks = (looks - looks.min()) / (looks.max() - looks.min())
            return (F.interpolate(looks.view(1, 1, one.x.shape[-2] // 4, -1), size).flatten() >= 0.2).float()

        x = one.states[0]
        with hooked(one.model.unet, attend) as unet:
            for i in range(STEPS):
                now["i"], now["maps"] = i, []
                s, null = one.states[i], prompts["empty"]
                rows = [(s, null), (x, null), (s, said), (x, prompts["target"])]
                _, null_eps, _, text_eps = call(one, unet, i, rows, [False, True, False, True])
                x = step(one, x, cfg(null_eps, text_eps), i)
        return x

    assert_same(case, MasaCtrl(**settings), published, mask=mask)


@pytest.mark.parametrize("until", [0.5, 0.3])
def test_the_adapter_alone_is_guided_sampling_with_its_features(case, until):
    def published(one):
        x, prompts = one.x, one.given.prompts
        with hooked(one.model.unet, own) as unet:
            for i in range(STEPS):
                seen = STEPS - 1 - i >= int((1 - until) * STEPS)  # as its sampler counts, from the last step
                x = step(
                    one, x, cfg(*call(one, unet, i, [(x, prompts["empty"]), (x, prompts["target"])], [seen, seen])), i
                )
        return x

    assert_same(case, T2IOnly(hint_until=until), published)
