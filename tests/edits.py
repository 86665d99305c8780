"""Small cases to edit, and a lab with the tiny model to edit them in."""

import base64
import io

from PIL import Image, ImageDraw

from masafusion_lab import config, phases
from masafusion_lab.data.case import Case
from masafusion_lab.editor import Editor
from masafusion_lab.watch import Watch

SIZE = (48, 32)
STEPS = 3


def drawn(mode="RGB", shift=0, size=SIZE, **style):
    """A disc on a plain ground: a picture, or a mask or a sketch."""
    picture = Image.new(mode, size, "orange" if mode == "RGB" else 0)
    ImageDraw.Draw(picture).ellipse((6 + shift, 6, 26 + shift, 26), **(style or {"fill": "blue"}))
    return picture


def case(id="cat", shift=0, size=SIZE, **changes):
    """An edit of a disc within its region, along a sketch."""
    facts = {
        "id": id,
        "image": drawn(shift=shift, size=size),
        "source": "a cat on grass",
        "target": "a red dog on grass",
        "mask": drawn("L", shift, size, fill=255),
        "hints": {"sketch": drawn("L", shift + 4, size, outline=255)},
    }
    return Case(**facts | changes)


def lab(root, store, *words):
    """The lab of an experiment with the model in `root`, by key=value words."""
    usual = f"model.path={root} model.device=cpu store={store} size=48x32 steps={STEPS}"
    return phases.build(config.load(words=[*usual.split(), *words]))


def watched(lab, *cases, watch=None):
    """What an edit of the cases, as one batch, made, and what was seen of the attention of each."""
    records = {c.id: record for c, record, _ in phases.invert(lab, cases)}
    items = [phases.as_item(c, lab.prepare(c), records[c.id]) for c in cases]
    editor = Editor(lab.model, lab.method, lab.schedule)
    watching = []

    def begin(batch):
        watching.append((watch or Watch(bins=2)).begin(editor, batch))
        return watching[-1].taps

    editor.watch = begin
    edited = editor.predict_step(items)
    return edited, [w.of(b) for w in watching[-len(items) :] for b in range(len(w.batch))][-len(items) :]


def sent(region=(6, 6, 26, 26), sketch=True):
    """What the lab's page sends of a drawing over a picture of SIZE."""
    from masafusion_lab.annotate import canvas_size, to_url

    size = canvas_size(*SIZE)
    mask = Image.new("L", size)
    if region:
        mask.paste(255, tuple(side * size[0] // SIZE[0] for side in region))
    lines = drawn("L", size=size, outline=255) if sketch else Image.new("L", size)
    return {"region": to_url(mask), "sketch": to_url(lines)}


def upload(image, name="pic.png"):
    """What the lab's page sends of a picture that is brought in."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"name": name, "data": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}


class Calls:
    """Counts the UNet's calls."""

    def __init__(self, model):
        self.count = 0
        self.hook = model.unet.register_forward_pre_hook(lambda *_: setattr(self, "count", self.count + 1))
