// Draw region and sketch over a picture. The server sends {picture, put: {region, sketch, pose}, said, pose}: data: URLs,
// of which any may be missing; a text; whether poses are of use. It gets {region, sketch, pose, touched}, drawings on
// black and the layers that a person changed, with "input" after each change; with "upload" {uploads}, pictures that
// were brought in, or {uploads, as}, one for a layer.
const LIMIT = 20e6, UNDOS = 30;
const one = (selector) => element.querySelector(selector);
const all = (selector) => [...element.querySelectorAll(selector)];
const canvas = one("canvas"), view = canvas.getContext("2d"), slider = one("input[type=range]"), file = one(".picture input"), of = one(".layer input");
const LAYERS = ["region", "sketch", "pose"], INK = { region: "#eb5e28", sketch: "#10233f" };
const HINTS = {
  region: "Paint what shall change.",
  sketch: "Redraw the outlines as they shall be; erase those that go.",
  pose: "Load the pose that it shall have, in openpose's colours.",
};
const sizes = { region: 0.07, sketch: 0.012, pose: 0.07 };
const layers = {}, touched = new Set();
let picture = null, layer = "region", tool = "brush", past = [], last = null, corner = null;

const blank = () => Object.assign(document.createElement("canvas"), { width: canvas.width, height: canvas.height });
const many = element.closest(".many") !== null;
if (many) { file.multiple = true; one(".picture span").textContent = "Add pictures, or drop them here"; }

function tinted(name) {
  const copy = blank(), pen = copy.getContext("2d");
  pen.drawImage(layers[name], 0, 0);
  pen.globalCompositeOperation = "source-in";
  pen.fillStyle = INK[name];
  pen.fillRect(0, 0, copy.width, copy.height);
  return copy;
}

function show(box) {
  const drawing = layer !== "region";
  view.globalAlpha = 1;
  view.fillStyle = "#fff";
  view.fillRect(0, 0, canvas.width, canvas.height);
  if (!picture) return;
  view.imageSmoothingQuality = "high";
  const shown = [[picture, drawing ? 0.28 : 1], [tinted("region"), drawing ? 0.14 : 0.5],
    [tinted("sketch"), layer === "sketch" ? 1 : 0.35], [layers.pose, layer === "pose" ? 1 : 0.35]];
  for (const [what, alpha] of shown) {
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

const drawn = () => ({ ...Object.fromEntries(LAYERS.map((name) => [name, exported(name)])), touched: [...touched] });

function commit() {
  show();
  props.value = drawn();
  trigger("input");
}

function remember(...names) {
  past.push(names.map((name) => [name, layers[name].getContext("2d").getImageData(0, 0, canvas.width, canvas.height)]));
  names.forEach((name) => touched.add(name));
  if (past.length > UNDOS) past.shift();
}

function undo() {
  const before = past.pop();
  if (!before) return;
  for (const [name, image] of before) layers[name].getContext("2d").putImageData(image, 0, 0);
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
    const light = Math.max(pixels.data[k], pixels.data[k + 1], pixels.data[k + 2]);
    if (name === "pose") pixels.data[k + 3] = light && 255;
    else pixels.data.set([255, 255, 255, light], k);
  }
  pen.putImageData(pixels, 0, 0);
}

async function take(sent) {
  if (!sent || !sent.put) return;
  if (sent.pose !== undefined) one("[data-layer=pose]").hidden = !sent.pose;
  if (sent.picture) {
    picture = await decoded(sent.picture);
    [canvas.width, canvas.height, past] = [picture.naturalWidth, picture.naturalHeight, []];
    canvas.style.width = `min(100%, ${64 * canvas.width / canvas.height}vh)`;
    one(".draw").classList.remove("empty");
    LAYERS.forEach((name) => { layers[name] = blank(); });
    touched.clear();
  }
  if (!picture) return;
  const names = Object.keys(sent.put);
  if (!sent.picture && names.length) remember(...names);
  for (const name of names) await put(name, sent.put[name]);
  if (sent.picture || names.length) choose("layer", sent.picture ? layer : names[0]);
  if (sent.said) one(".hint").textContent = sent.said;
  commit();
}

function choose(group, value) {
  if (group === "layer") {
    layer = value;
    one("[data-tool=box]").hidden = layer !== "region";
    one("[data-tool=brush]").hidden = layer === "pose";
    if (layer === "pose") choose("tool", "eraser");
    else if (layer === "sketch" && tool === "box") choose("tool", "brush");
    slider.value = Math.round(sizes[layer] * 640);
    one(".hint").textContent = HINTS[layer];
    one(".layer span").textContent = `${layer[0].toUpperCase()}${layer.slice(1)} from a file`;
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
  remember(layer);
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
one("[data-act=clear]").addEventListener("click", async () => {
  if (!picture) return;
  remember(layer);
  await put(layer);
  commit();
});
slider.addEventListener("input", () => { sizes[layer] = slider.value / 640; });
element.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && event.key === "z") { event.preventDefault(); undo(); }
});

async function bring(files, as) {
  const pictures = [...files].filter((each) => each.type.startsWith("image/")).slice(0, many && !as ? 100 : 1);
  if (pictures.reduce((sum, each) => sum + each.size, 0) > LIMIT) { one(".hint").textContent = "More than 20 MB: too large."; return; }
  const read = (each) => new Promise((done) => {
    const reader = new FileReader();
    reader.onload = () => done({ name: each.name, data: reader.result });
    reader.readAsDataURL(each);
  });
  const uploads = await Promise.all(pictures.map(read));
  if (!uploads.length) return;
  props.value = { ...(picture ? drawn() : {}), uploads, as };
  trigger("upload");
}
file.addEventListener("change", () => { bring(file.files); file.value = ""; });
of.addEventListener("change", () => { if (picture) bring(of.files, layer); of.value = ""; });
element.addEventListener("dragover", (event) => event.preventDefault());
element.addEventListener("drop", (event) => { event.preventDefault(); bring(event.dataTransfer.files); });
element.addEventListener("paste", (event) => bring(event.clipboardData.files));

choose("layer", "region");
watch("value", () => take(props.value));
take(props.value);
