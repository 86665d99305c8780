// Draw region and sketch over a picture. The server sends {picture, put: {region, sketch}}, data: URLs of which any may
// be missing; it gets {region, sketch}, white on black, with "input" after each change, and with "upload" {uploads}.
const LIMIT = 20e6, UNDOS = 30;
const one = (selector) => element.querySelector(selector);
const all = (selector) => [...element.querySelectorAll(selector)];
const canvas = one("canvas"), view = canvas.getContext("2d"), slider = one("input[type=range]"), file = one("input[type=file]");
const INK = { region: "#eb5e28", sketch: "#10233f" };
const sizes = { region: 0.07, sketch: 0.012 };
const layers = {};
let picture = null, layer = "region", tool = "brush", past = [], last = null, corner = null;

const blank = () => Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
const many = element.closest(".many") !== null;
if (many) { file.multiple = true; one(".says").textContent = "Add pictures, or drop them here"; }

function tinted(name) {
  const copy = blank(), pen = copy.getContext("2d");
  pen.drawImage(layers[name], 0, 0);
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = INK[name];
  pen.fillRect(0, 0, copy.width, copy.height);
  return copy;
}

function show(box) {
  const drawing = layer === "sketch";
  view.globalAlpha = 1;
  view.fillStyle = "#fff";
  view.fillRect(0, 0, canvas.width, canvas.height);
  if (!picture) return;
  view.imageSmoothingQuality = "high";
  for (const [what, alpha] of [[picture, drawing ? 0.28 : 1], [tinted("region"), drawing ? 0.14 : 0.5], [tinted("sketch"), drawing ? 1 : 0.35]]) {
    view.globalAlpha = alpha;
    view.drawImage(what, 0, 0, canvas.width, canvas.height);
  }
  view.globalAlpha = 1;
  if (box) {
    view.strokeStyle = INK.region;
    view.lineWidth = canvas.width / 200;
    view.strokeRect(...box);
  }
}

function exported(name) {
  const copy = blank(), pen = copy.getContext("2d");
  pen.fillRect(0, 0, copy.width, copy.height);
  pen.drawImage(layers[name], 0, 0);
  return copy.toDataURL("image/png");
}

function commit() {
  show();
  props.value = { region: exported("region"), sketch: exported("sketch") };
  trigger("input");
}

function remember() {
  past.push(Object.values(layers).map((each) => each.getContext("2d").getImageData(0, 0, each.width, each.height)));
  if (past.length > UNDOS) past.shift();
}

function undo() {
  const before = past.pop();
  if (!before) return;
  Object.values(layers).forEach((each, k) => each.getContext("2d").putImageData(before[k], 0, 0));
  commit();
}

const decoded = async (url) => { const image = new Image(); image.src = url; await image.decode(); return image; };

async function put(name, url) {
  const pen = layers[name].getContext("2d");
  pen.clearRect(0, 0, canvas.width, canvas.height);
  if (!url) return;
  pen.drawImage(await decoded(url), 0, 0, canvas.width, canvas.height);
  const pixels = pen.getImageData(0, 0, canvas.width, canvas.height);
  for (let k = 0; k < pixels.data.length; k += 4) {
    pixels.data[k + 3] = pixels.data[k];
    pixels.data[k] = pixels.data[k + 1] = pixels.data[k + 2] = 255;
  }
  pen.putImageData(pixels, 0, 0);
}

async function take(sent) {
  if (!sent || !sent.put) return;
  if (sent.picture) {
    picture = await decoded(sent.picture);
    [canvas.width, canvas.height, past] = [picture.naturalWidth, picture.naturalHeight, []];
    canvas.style.width = `min(100%, ${64 * canvas.width / canvas.height}vh)`;
    layers.region = blank();
    layers.sketch = blank();
  } else remember();
  for (const [name, url] of Object.entries(sent.put)) await put(name, url);
  if (!sent.picture) choose("layer", Object.keys(sent.put)[0]);
  choose("layer", layer);
  commit();
}

function choose(group, value) {
  if (group === "layer") {
    layer = value;
    one("[data-tool=box]").hidden = layer === "sketch";
    if (layer === "sketch" && tool === "box") choose("tool", "brush");
    slider.value = Math.round(sizes[layer] * 640);
    one(".hint").textContent = layer === "region" ? "Paint what shall change." : "Redraw the outlines as they shall be; erase those that go.";
    show();
  } else tool = value;
  all(`[data-${group}]`).forEach((each) => each.setAttribute("aria-pressed", each.dataset[group] === value));
}

const place = (event) => {
  const seen = canvas.getBoundingClientRect();
  return [(event.clientX - seen.left) * canvas.width / seen.width, (event.clientY - seen.top) * canvas.height / seen.height];
};

function line(from, to) {
  const pen = layers[layer].getContext("2d");
  pen.globalCompositeOperation = tool === "eraser" ? "destination-out" : "source-over";
  pen.strokeStyle = "#fff";
  pen.lineCap = pen.lineJoin = "round";
  pen.lineWidth = Math.max(1, slider.value / 640 * Math.max(canvas.width, canvas.height));
  pen.beginPath();
  pen.moveTo(...from);
  pen.lineTo(...to);
  pen.stroke();
}

const between = (a, b) => [Math.min(a[0], b[0]), Math.min(a[1], b[1]), Math.abs(a[0] - b[0]), Math.abs(a[1] - b[1])];

canvas.addEventListener("pointerdown", (event) => {
  if (!picture || event.button) return;
  event.preventDefault();
  canvas.focus({ preventScroll: true });
  canvas.setPointerCapture(event.pointerId);
  remember();
  last = place(event);
  if (tool === "box") corner = last;
  else { line(last, last); show(); }
});
canvas.addEventListener("pointermove", (event) => {
  if (!last) return;
  const now = place(event);
  if (corner) show(between(corner, now));
  else { line(last, now); show(); }
  last = now;
});
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (event) => {
  if (!last) return;
  if (corner) {
    const pen = layers.region.getContext("2d");
    pen.globalCompositeOperation = "source-over";
    pen.fillStyle = "#fff";
    pen.fillRect(...between(corner, place(event)));
  }
  last = corner = null;
  commit();
});

all("[data-layer]").forEach((each) => each.addEventListener("click", () => choose("layer", each.dataset.layer)));
all("[data-tool]").forEach((each) => each.addEventListener("click", () => choose("tool", each.dataset.tool)));
one("[data-act=undo]").addEventListener("click", undo);
one("[data-act=clear]").addEventListener("click", async () => { if (picture) { remember(); await put(layer); commit(); } });
slider.addEventListener("input", () => { sizes[layer] = slider.value / 640; });
element.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z") { event.preventDefault(); undo(); }
});

async function bring(files) {
  const pictures = [...files].filter((each) => each.type.startsWith("image/")).slice(0, many ? 100 : 1);
  if (pictures.reduce((sum, each) => sum + each.size, 0) > LIMIT) { one(".hint").textContent = "More than 20 MB: too large."; return; }
  const read = (each) => new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done({ name: each.name, data: reader.result });
    reader.readAsDataURL(each);
  });
  const uploads = await Promise.all(pictures.map(read));
  if (uploads.length) { props.value = { uploads }; trigger("upload"); }
}
file.addEventListener("change", () => { bring(file.files); file.value = ""; });
element.addEventListener("dragover", (event) => event.preventDefault());
element.addEventListener("drop", (event) => { event.preventDefault(); bring(event.dataTransfer.files); });
element.addEventListener("paste", (event) => bring(event.clipboardData.files));

choose("layer", "region");
watch("value", () => take(props.value));
take(props.value);
