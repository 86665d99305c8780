"""Taps: DAAM as it was published, the analytic cases of the interference meter, and sums that no chunking changes."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from masafusion_lab import phases
from masafusion_lab.attention import Sight
from masafusion_lab.methods import Plain
from masafusion_lab.sites import Site
from masafusion_lab.taps import DistanceTap, FlowTap, PixelTap, WordTap, bins, pooled
from masafusion_lab.watch import Watch
from tests.edits import STEPS, case, watched
from tests.edits import lab as make_lab

BRANCHES = {name: SimpleNamespace(x="target", prompt="target") for name in "ab"}
BRANCHES["S"] = SimpleNamespace(x="source", prompt="source")


@pytest.fixture
def lab(tiny_root, tmp_path):
    return make_lab(tiny_root, tmp_path / "store")


def sights(p, grid, *, cross=False, chunks=1, i=0, heads=1, values=None):
    """The weights of each branch (B, heads, queries, keys), as a tap is shown them in so many chunks.

    `values`: the branches whose values they read, if not each its own.
    """
    site = Site("down_blocks.0.attn", 0, cross, heads)
    size = math.ceil(grid[0] * grid[1] / chunks)
    for first in range(0, grid[0] * grid[1], size):
        part = {(b, "text"): x[:, :, first : first + size] for b, x in p.items()}
        read = {(b, "text"): values or (b,) for b in p}
        yield Sight(site, SimpleNamespace(i=i, branches=BRANCHES), grid, first, part, read)


def shown(tap, *args, **options):
    for sight in sights(*args, **options):
        tap.see(sight)
    return tap.sums


def random_weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul(3).softmax(-1)


class Daam:
    """The published accumulation (daam/trace.py): probabilities of up and down blocks, the second half of the rows."""

    def __init__(self, unet):
        self.sums = {}
        for name, module in unet.named_modules():
            if name.endswith("attn2") and not name.startswith("mid"):
                module.processor = self.processor(name, module.processor)

    def processor(self, name, stock):
        def attend(attn, hidden_states, encoder_hidden_states=None, step=None, **options):
            q = attn.head_to_batch_dim(attn.to_q(hidden_states))
            k = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
            probs = attn.get_attention_scores(q, k)
            probs = probs[len(probs) // 2 :]
            self.sums[name] = self.sums.get(name, 0) + probs
            return stock(attn, hidden_states, encoder_hidden_states, step=step, **options)

        return attend

    def word(self, places, grid):
        maps = []
        for probs in self.sums.values():
            level = next(g for g in ((8, 12), (4, 6), (2, 3)) if g[0] * g[1] == probs.shape[1])
            for head in probs:
                image = head.T.unflatten(1, level)[:, None]
                maps.append(F.interpolate(image, grid, mode="bicubic").clamp(min=0)[:, 0])
        return torch.stack(maps).mean(0)[places].mean(0)


def test_word_maps_are_those_of_daam(lab):
    lab.method = Plain()
    edited = case(target="a red dog on red grass")
    _, (attention,) = watched(lab, edited, watch=Watch(bins=1))
    daam = Daam(lab.model.unet)
    watched(lab, edited, watch=Watch(bins=1))
    maps = attention.words("T")
    for word, places in (("dog", [3]), ("red", [2, 5]), ("red dog", [2, 3]), ("⟨start⟩", [0]), ("⟨end⟩", [7])):
        torch.testing.assert_close(maps.word(word).values, daam.word(places, (8, 12)), rtol=0, atol=1e-5)


def test_the_tokens_of_every_raw_map_sum_to_the_number_of_steps(lab):
    _, (attention,) = watched(lab, case(), watch=Watch(bins=2))
    words = [maps for name, maps in attention.tensors.items() if name.startswith("words/")]
    assert len(words) == 5 * sum(site.cross for site in lab.model.sites)
    for maps in words:
        torch.testing.assert_close(maps.sum((0, 2)), torch.full_like(maps[0, :, 0], STEPS))


def test_watching_an_edit_changes_no_bit_of_any_picture(lab):
    c = case()
    (_, record, _) = next(phases.invert(lab, [c]))
    plain = phases.Editor(lab.model, lab.method, lab.schedule).predict_step([phases.as_item(c, lab.prepare(c), record)])
    edited, _ = watched(lab, c)
    for name, picture in plain[0].pictures.items():
        assert torch.equal(picture, edited[0].pictures[name])


def test_what_is_seen_of_a_batch_is_what_is_seen_of_its_cases(lab):
    cases = [case("a"), case("b", target="a dog", shift=5)]
    _, together = watched(lab, *cases)
    for c, both in zip(cases, together, strict=True):
        _, (alone,) = watched(lab, c)
        assert both.facts == alone.facts
        assert both.tensors.keys() == alone.tensors.keys()
        for name, x in alone.tensors.items():
            torch.testing.assert_close(both.tensors[name], x, rtol=0, atol=2e-3, equal_nan=True)


def region(*rows):
    return torch.tensor(rows, dtype=torch.float32)[None, None]


def test_attention_that_stays_on_its_side_of_the_border_does_not_interfere():
    mask = region([1, 1, 0], [1, 1, 0])
    inside = mask.flatten().bool()
    p = random_weights(1, 2, 6, 6) * (inside[:, None] == inside[None])
    sums = shown(FlowTap(mask, 3, {}), {"a": p / p.sum(-1, keepdim=True)}, (2, 3))
    for kind in ("flow", "mixed"):
        assert sums[f"{kind}/a/text/0"][:, 0].abs().max() < 1e-6
        assert sums[f"{kind}/a/text/0"][:, 1:].isnan().all()  # of the other steps nothing was seen


def test_even_attention_crosses_the_border_by_the_areas():
    mask = region([1, 1, 1, 0], [1, 1, 1, 0])
    sums = shown(FlowTap(mask, 1, {}), {"a": torch.full((1, 1, 8, 8), 1 / 8)}, (2, 4))
    torch.testing.assert_close(sums["flow/a/text/0"], torch.tensor([0.25, 0.75]).expand(1, 1, 1, 2))


def test_attention_that_all_leaves_and_all_enters_crosses_wholly():
    mask = region([1, 0])
    sums = shown(FlowTap(mask, 1, {}), {"a": torch.eye(2).flip(0)[None, None]}, (1, 2))
    torch.testing.assert_close(sums["flow/a/text/0"], torch.ones(1, 1, 1, 2))


def test_a_layer_too_coarse_for_the_region_says_nothing_of_it():
    mask, edited = region([0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]), {"target": torch.tensor([[0.0, 1.0]])}
    tap = FlowTap(mask, 1, edited)
    shown(tap, {"a": random_weights(1, 2, 4, 4)}, (2, 2))
    shown(tap, {"a": random_weights(1, 2, 4, 2)}, (2, 2), cross=True)
    assert set(tap.sums) == {"flow/a/text/0", "mixed/a/text/0", "spill/a/text/0"}
    assert all(sums.isnan().all() for sums in tap.sums.values())


def test_keys_of_two_branches_side_by_side_count_by_their_place_and_by_whose_they_are():
    mask, p = region([1, 0]), torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]])[None, None]
    sums = shown(FlowTap(mask, 1, {}), {"a": p}, (1, 2), values=("S", "a"))
    torch.testing.assert_close(sums["flow/a/text/0"], torch.tensor([0.3, 0.4]).expand(1, 1, 1, 2))
    torch.testing.assert_close(sums["mixed/a/text/0"], torch.tensor([0.7, 0.3]).expand(1, 1, 1, 2))


@pytest.mark.parametrize(("values", "mixed"), [("S", (1.0, 0.0)), ("b", (0.2, 0.3)), ("a", (0.2, 0.3))])
def test_what_is_read_of_the_source_is_kept_wherever_it_lies(values, mixed):
    """So with (13) all that pixels inside A read is kept; with another branch's Q and K their own values count."""
    mask, p = region([1, 0]), torch.tensor([[0.8, 0.2], [0.3, 0.7]])[None, None]
    sums = shown(FlowTap(mask, 1, {}), {"a": p}, (1, 2), values=(values,))
    torch.testing.assert_close(sums["flow/a/text/0"], torch.tensor([0.2, 0.3]).expand(1, 1, 1, 2))
    torch.testing.assert_close(sums["mixed/a/text/0"], torch.tensor(mixed).expand(1, 1, 1, 2))


def test_a_pixel_of_a_coarse_layer_is_inside_if_half_of_it_is():
    mask, own = region([1, 1, 0, 0], [0, 0, 0, 1]), torch.eye(2)[None, None]  # halves, and a quarter
    sums = shown(FlowTap(mask, 1, {}), {"a": own.flip(-1)}, (1, 2))
    torch.testing.assert_close(sums["flow/a/text/0"], torch.ones(1, 1, 1, 2))


def test_the_mass_of_edited_words_is_told_apart_by_the_border():
    mask, p = region([1, 0]), torch.tensor([[0.2, 0.8, 0], [0.9, 0.1, 0]])[None, None]
    sums = shown(FlowTap(mask, 1, {"target": torch.tensor([[0.0, 1, 0]])}), {"a": p}, (1, 2), cross=True)
    torch.testing.assert_close(sums["spill/a/text/0"], torch.tensor([0.8, 0.1]).expand(1, 1, 1, 2))


def test_equal_maps_are_no_distance_apart_and_disjoint_ones_as_far_as_can_be():
    mask, ones = region([1, 0]), torch.eye(2)[None, None]
    half = torch.stack([ones[0, 0, 0], ones[0, 0, 0]])[None, None]  # equal in the first pixel, disjoint in the second
    sums = shown(DistanceTap(mask, 1, [("a", "b")]), {"a": ones, "b": half}, (1, 2))
    torch.testing.assert_close(sums["distance/a:b/text/0"], torch.tensor([0.0, 1]).expand(1, 1, 1, 2))


def test_self_attention_is_pooled_to_cells_whose_mass_is_kept():
    grid = (20, 40)
    p = random_weights(1, 2, 800, 800)
    its = shown(PixelTap([range(1)]), {"a": p}, grid, heads=2)["pixels/a/text/0"][0, 0]
    assert pooled(grid, 16) == (3, 7, 14)
    assert its.shape == (7, 14, 10, 20)
    torch.testing.assert_close(its.sum((2, 3)), torch.ones(7, 14))
    p = p.mean(1)[0].unflatten(0, grid).unflatten(-1, grid)
    want = p[3:6, 6:9].mean((0, 1))[4:6, 10:12].sum()  # from the cell (1, 2) to the cell (2, 5)
    torch.testing.assert_close(its[1, 2, 2, 5], want)
    corner = p[18:, 39:].mean((0, 1))[:2, :2].sum()  # a cell that the rim cuts
    torch.testing.assert_close(its[6, 13, 0, 0], corner)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_no_chunking_changes_what_is_summed(cross):
    grid, mask = (6, 20), torch.zeros(2, 1, 6, 20)
    mask[:, :, 2:5, 3:9] = 1
    p = {b: random_weights(2, 3, 120, 24 if cross else 120, seed=seed) for seed, b in enumerate("ab")}

    def taps():
        words = {"target": torch.eye(24)[:2]}
        self_taps = [PixelTap([range(1)]), DistanceTap(mask, 1, [("a", "b")])]
        return [FlowTap(mask, 1, words), *([WordTap([range(1)], 5)] if cross else self_taps)]

    for one, many in zip(taps(), taps(), strict=True):
        for name, sums in shown(one, p, grid, cross=cross, heads=3).items():
            torch.testing.assert_close(shown(many, p, grid, cross=cross, heads=3, chunks=7)[name], sums)
            many.sums.clear()


def test_steps_fall_into_bins_as_equal_as_can_be():
    assert [list(b) for b in bins(7, 3)] == [[0, 1], [2, 3, 4], [5, 6]]
    assert bins(2, 5) == [range(0, 1), range(1, 2)]
