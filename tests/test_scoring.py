"""A score is of the same region as the edit."""

import json

import numpy as np
import pytest
from PIL import Image

from masafusion_lab.data.case import Case
from masafusion_lab.protocol import Protocol
from masafusion_lab.scoring import Scorer

SIZE = (32, 24)
LEFT = np.arange(SIZE[0]) < 16
EDITED = np.uint8([20, 200])[np.broadcast_to(LEFT, SIZE[::-1]).astype(int)]
GREEN = (0, 160, 60)


def drawn(inside, outside):
    return Image.fromarray(np.where(LEFT[None, :, None], np.uint8(inside), np.uint8(outside)).repeat(SIZE[1], 0))


@pytest.mark.parametrize(
    ("mask", "changed"),
    [
        (drawn([255] * 3, [0] * 3), {}),
        (drawn([0] * 3, [255] * 3), {"region.by": "dark"}),
        (drawn([255, 0, 0], GREEN), {"region.by": "colour:#ff0000"}),
        (drawn([150] * 3, [90] * 3), {"region.soft": True}),
    ],
    ids=["white", "dark", "colour", "soft"],
)
def test_a_score_reads_the_mask_as_its_edit_did(tmp_path, mask, changed):
    Image.fromarray(EDITED).save(tmp_path / "target.png")
    (tmp_path / "result.json").write_text(json.dumps({"key": "a", "changed": changed}))
    case = Case("x", Image.new("L", SIZE, 20), "a cat", "a dog", mask=mask)
    scorer = Scorer.of(Protocol("test", ("mse_area",), ("mse_area",), {}, {}), {})
    assert scorer.score(case, tmp_path) == ({"mse_area": 0}, {})
    (tmp_path / "result.json").write_text(json.dumps({"key": "a", "changed": {"region.by": "colour:#123456"}}))
    assert "nothing of it is of that value" in scorer.score(case, tmp_path)[1]["mse_area"]


def test_a_sets_own_scored_region_is_read_as_the_set_draws_it(tmp_path):
    """PIE-Bench's is white, however the mask that an edit was told to read."""
    Image.fromarray(EDITED).save(tmp_path / "target.png")
    (tmp_path / "result.json").write_text(json.dumps({"key": "a", "changed": {"region.by": "dark"}}))
    mask, scored = drawn([0] * 3, [255] * 3), drawn([255] * 3, [0] * 3)
    case = Case("x", Image.new("L", SIZE, 20), "a cat", "a dog", mask=mask, scored=scored)
    scorer = Scorer.of(Protocol("test", ("mse_area",), ("mse_area",), {}, {}), {})
    assert scorer.score(case, tmp_path) == ({"mse_area": 0}, {})
