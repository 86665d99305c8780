"""The attention processor: diffusers' own when nothing is fused, and rows that read one another when something is."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from masafusion_lab import InputError
from masafusion_lab.attention import Step, install
from masafusion_lab.fusion import Branch, Span, Take, Words
from masafusion_lab.given import Follow, Given
from masafusion_lab.sites import Site, layers


@pytest.fixture
def batch(tiny):
    g = torch.Generator().manual_seed(0)
    return torch.randn(6, 4, 16, 16, generator=g), tiny.embed(["a cat", "a dog", "a red hat", "snow", "", "grass"])


def stock(unet):
    unet = copy.deepcopy(unet)
    unet.set_attn_processor(AttnProcessor2_0())
    return unet


def step_of(i=0, taps=(), **takes):
    branches = {name: Branch("x", "source", take=take) for name, take in takes.items()}
    return Step(i, tuple((b, h) for h in ("null", "text") for b in branches), branches, taps)


@torch.no_grad()
def eps(unet, x, text, step=None):
    return unet(x, 500, text, cross_attention_kwargs={"step": step} if step else None).sample


def test_without_fusion_it_is_diffusers_own_to_the_bit(tiny, batch):
    assert torch.equal(eps(tiny.unet, *batch), eps(stock(tiny.unet), *batch))
    assert torch.equal(eps(tiny.unet, *batch, step_of(a=Take(), b=Take(), c=Take())), eps(stock(tiny.unet), *batch))


def test_installing_twice_changes_nothing(tiny):
    before = dict(tiny.unet.attn_processors)
    assert install(tiny.unet) == tiny.sites
    assert all(before[name] is p for name, p in tiny.unet.attn_processors.items())


def test_sites_are_in_running_order(tiny, batch):
    called = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in tiny.unet.named_modules()
        if name.endswith(("attn1", "attn2"))
    ]
    eps(tiny.unet, *batch)
    for hook in hooks:
        hook.remove()
    assert called == [site.name for site in tiny.sites]
    selfs = [site for site in tiny.sites if not site.cross]
    assert [site.depth for site in selfs] == list(range(len(selfs)))


def test_a_branch_is_unchanged_by_its_neighbours(tiny, batch):
    x, text = batch
    plain = eps(tiny.unet, x, text)
    fused = eps(tiny.unet, x, text, step_of(a=Take(), b=Take("a", "a", None), c=Take("a", "a", "a")))
    for row in (0, 3):  # a, null and text
        torch.testing.assert_close(fused[row], plain[row], rtol=1e-4, atol=1e-5)
    for row in (1, 2, 4, 5):
        assert not torch.allclose(fused[row], plain[row], atol=1e-3)


def test_rules_never_chain(tiny, batch):
    """c reads b's own Q and K, whatever b itself reads."""
    x, text = batch
    chained = eps(tiny.unet, x, text, step_of(a=Take(), b=Take("a", "a", "a"), c=Take("b", "b", layers=Span(0, 1))))
    alone = eps(tiny.unet, x, text, step_of(a=Take(), b=Take(layers=Span(9, 9)), c=Take("b", "b", layers=Span(0, 1))))
    torch.testing.assert_close(chained[2], alone[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "off",
    [Take("a", "a", "a", steps=Span(1)), Take("a", "a", "a", layers=Span(99)), Take("a", "a", "a", halves=())],
    ids=["step", "layer", "half"],
)
def test_a_rule_outside_its_window_does_nothing(tiny, batch, off):
    x, text = batch
    torch.testing.assert_close(
        eps(tiny.unet, x, text, step_of(a=Take(), b=off, c=Take())), eps(tiny.unet, x, text), rtol=1e-5, atol=1e-6
    )


def test_a_row_that_reads_everything_costs_no_projection_and_no_attention(tiny):
    """One layer, three branches of which two read all of the first: one row a half is projected."""
    attn = tiny.unet.get_submodule(tiny.sites[0].name)
    seen = []
    hooks = [layer.register_forward_hook(lambda _, x, __: seen.append(len(x[0]))) for layer in (attn.to_q, attn.to_v)]
    hidden = torch.randn(6, 256, attn.query_dim)
    out = attn.processor(attn, hidden, step=step_of(a=Take(), b=Take("a", "a", "a"), c=Take("a", "a", "a")))
    for hook in hooks:
        hook.remove()
    assert seen == [2, 2]
    assert torch.equal(out[0], out[1])
    assert torch.equal(out[3], out[5])


@pytest.mark.parametrize("read", [None, "a"], ids=["apart", "one reads the other"])
def test_a_mask_of_tokens_is_refused(tiny, batch, read):
    """Rows that are computed once for two would be masked as the first of them."""
    x, text = batch
    step, mask = step_of(a=Take(), b=Take(read, read, read), c=Take()), torch.ones(6, text.shape[1])
    for kwargs in ({"cross_attention_kwargs": {"step": step}}, {}):
        with pytest.raises(InputError, match="attention_mask: is not supported; leave it out"):
            tiny.unet(x, 500, text, encoder_attention_mask=mask, **kwargs)


class Watch:
    """Keeps all it is shown of the layers of a depth, chunk by chunk."""

    def __init__(self, rows=None, own=False, depth=1):
        self.rows, self.own, self.depth, self.seen = rows, own, depth, []

    def wants(self, site, i, row):
        return site.depth in (self.depth, None) and (self.rows is None or row in self.rows)

    def see(self, sight):
        self.seen.append(sight)

    def whole(self, row, cross=False):
        chunks = [sight for sight in self.seen if sight.site.cross == cross]
        assert [s.first for s in chunks] == [0, *torch.tensor([s.p[row].shape[2] for s in chunks]).cumsum(0)[:-1]]
        return torch.cat([sight.p[row] for sight in chunks], 2)


TAKES = {"a": Take(), "b": Take("a", "a", None), "c": Take("a", "a", "a")}


def watched(tiny, batch, *taps):
    return eps(tiny.unet, *batch, replace(step_of(3, taps, **TAKES), grid=batch[0].shape[-2:]))


def test_watching_changes_nothing_and_sees_weights_that_sum_to_one(tiny, batch):
    watch = Watch()
    assert torch.equal(watched(tiny, batch, watch), watched(tiny, batch))
    assert [(s.site.cross, s.site.depth, s.step.i, s.grid) for s in watch.seen] == [
        (False, 1, 3, (8, 8)),
        (True, 1, 3, (8, 8)),
    ]
    own, words = (sight.p for sight in watch.seen)
    assert set(own) == {(b, h) for b in "abc" for h in ("null", "text")}
    for p in (own, words):
        torch.testing.assert_close(p["b", "text"].sum(-1), torch.ones(p["b", "text"].shape[:-1]))
    assert torch.equal(own["b", "null"], own["a", "null"])  # b attends with a's map


def test_a_tap_is_shown_only_the_rows_that_it_wants(tiny, batch):
    watch, other = Watch({("c", "text")}), Watch({("a", "null")})
    watched(tiny, batch, watch, other)
    assert {row for sight in watch.seen for row in sight.p} == {("c", "text")}
    assert {row for sight in other.seen for row in sight.p} == {("a", "null")}


def test_what_a_branch_attends_to_by_itself_is_there_whatever_it_takes(tiny, batch):
    used, own, alone = Watch(), Watch(own=True), Watch()
    watched(tiny, batch, used, own)
    eps(tiny.unet, *batch, replace(step_of(3, [alone], **{**TAKES, "b": Take(layers=Span(0, 1))}), grid=(16, 16)))
    assert torch.equal(own.whole(("a", "text")), used.whole(("a", "text")))
    assert not torch.allclose(own.whole(("b", "text")), used.whole(("b", "text")), atol=1e-3)


def test_weights_come_in_chunks_of_bounded_size_that_make_up_the_whole(tiny, batch, monkeypatch):
    whole, chunked = Watch(depth=0), Watch(depth=0)
    plain = watched(tiny, batch, whole)
    monkeypatch.setattr("masafusion_lab.attention.CHUNK", 20_000)
    assert torch.equal(watched(tiny, batch, chunked), plain)
    assert len(chunked.seen) > 5
    for sight in chunked.seen:
        assert sum({id(p): p.numel() for p in sight.p.values()}.values()) <= 20_000
    for cross in (False, True):
        assert torch.equal(chunked.whole(("b", "text"), cross), whole.whole(("b", "text"), cross))


def test_the_grid_of_every_layer_is_known_for_any_aspect_ratio(tiny, batch):
    seen = []
    watch = SimpleNamespace(own=False, wants=lambda *_: True, see=seen.append)
    x = torch.randn(6, 4, 10, 28, generator=torch.Generator().manual_seed(0))
    watched(tiny, (x, batch[1]), watch)
    grids = {s.site.name.split(".attentions")[0]: s.grid for s in seen}
    assert grids == {
        **{"down_blocks.0": (10, 28), "down_blocks.1": (5, 14), "down_blocks.2": (3, 7), "mid_block": (3, 7)},
        **{"up_blocks.0": (3, 7), "up_blocks.1": (5, 14), "up_blocks.2": (10, 28)},
    }


def test_the_processor_reads_rows_by_name_not_by_place():
    site = Site("down_blocks.0.x.attn1", 0, False)
    branches = {"a": Branch("x", "s"), "b": Branch("x", "s", take=Take(q="a"))}
    rows = (("b", "text"), ("a", "null"), ("a", "text"), ("b", "null"))
    assert Step(0, rows, branches).route(site).triples == ((2, 0, 0), (1, 1, 1), (2, 2, 2), (1, 3, 3))


@pytest.fixture
def four(tiny):
    """Two pictures of each of two branches."""
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x, tiny.embed(["a cat", "a", "snow", ""])


def follow(taps, **rules):
    """A step in which b follows a's words or shares its keys, for two pictures."""
    branches = {"a": Branch("x", "source"), "b": Branch("x", "target", **rules)}
    theirs = torch.zeros(1, 2, 24, 24)
    theirs[0, 0], theirs[0, 1, 3:, 3:] = torch.eye(24), torch.eye(21)
    mask = torch.zeros(2, 1, 8, 8)
    mask[0, :, :4], mask[1, :, 2:7, 1:3] = 1, 1
    given = Given({}, mask, words=Follow(theirs, 1 - theirs.sum(2)))
    return Step(0, (("a", "text"), ("b", "text")), branches, taps, (8, 8), given)


RULES = [
    {"words": Words("a")},
    {"take": Take(None, "a", "a", keys="union")},
    {"take": Take("a", "a", "a", keys="masked")},
]


@pytest.mark.parametrize("rule", RULES)
def test_a_row_that_joins_others_is_watched_as_it_attends_and_changes_no_neighbour(tiny, four, rule):
    x, text = four
    watch = Watch()
    out = eps(tiny.unet, x, text, follow([watch], **rule))
    assert torch.equal(out, eps(tiny.unet, x, text, follow([], **rule)))
    plain = eps(tiny.unet, x, text)
    torch.testing.assert_close(out[:2], plain[:2], rtol=1e-4, atol=1e-5)
    assert (out[2:] - plain[2:]).abs().amax((1, 2, 3)).min() > 1e-3
    if "take" in rule:  # followed words need not sum to one
        for sight in watch.seen:
            torch.testing.assert_close(sight.p["b", "text"].sum(-1), torch.ones(sight.p["b", "text"].shape[:-1]))


def test_words_are_followed_token_by_token(tiny, four):
    """The first picture's map is a's, the second's own for its first three words and a's for the others."""
    site = next(site for site in tiny.sites if site.cross)
    attn, watch = tiny.unet.get_submodule(site.name), Watch(depth=site.depth)
    hidden = torch.randn(4, 64, attn.query_dim, generator=torch.Generator().manual_seed(0))
    attn.processor(attn, hidden, four[1], step=follow([watch], words=Words("a")))
    attn.processor(attn, hidden, four[1], step=follow([watch]))
    followed, own = (sight.p for sight in watch.seen)
    b, base, alone = followed["b", "text"], own["a", "text"], own["b", "text"]
    torch.testing.assert_close(b[0], base[0])
    torch.testing.assert_close(b[1], torch.cat([alone[1, ..., :3], base[1, ..., 3:]], -1))


def test_where_a_region_is_empty_in_a_layer_attention_is_that_of_the_rest(tiny, four):
    x, text = four
    step, plain = (follow([], take=Take(None, "a", "a", keys=keys)) for keys in ("masked", "plain"))
    for whole in (0.0, 1.0):
        step.given.mask.fill_(whole)
        torch.testing.assert_close(eps(tiny.unet, x, text, step), eps(tiny.unet, x, text, plain), rtol=1e-4, atol=1e-5)


def test_layers_are_named_as_deep_as_in_another_model(tiny):
    """10 of 16, where MasaCtrl begins, is the first layer of the decoder's second block in both."""
    of_sd = [Site(f"up_blocks.{d}", d, False) for d in range(16)]
    assert [d for d in range(16) if d in layers("10/16:", of_sd)] == [*range(10, 16)]
    own = [site for site in tiny.sites if not site.cross and site.depth in layers("10/16:", tiny.sites)]
    assert {site.name[:11] for site in own} == {"up_blocks.1", "up_blocks.2"}
    assert [site.level for site in own] == [1, 1, 0, 0]
    assert layers("8/16", of_sd) == {8}
    for wrong in ("10/0:", "1/2/3", "/16", "-3:", "-1"):
        with pytest.raises(InputError, match="names no layers"):
            layers(wrong, of_sd)
