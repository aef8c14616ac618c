// The viewer: slices and surfaces by NiiVue, the controls beside them. What it shows is in the page's data elements.
"use strict";

const CASE = JSON.parse(document.getElementById("case").textContent);
const WINDOWS_HU = {"Soft tissue": [-160, 240], "Liver": [-15, 135], "Bone": [-450, 1050], "Lung": [-1350, 150]};
const FROM_THE_FRONT = [180, 10]; // degrees: azimuth and elevation of NiiVue's camera
const STEP_DEGREES = 10;
const THICK = 2; // slices are, when they lie so many times farther apart than the voxels in them
const ARROWS = {ArrowLeft: [1, 0, 0], ArrowRight: [-1, 0, 0], ArrowUp: [0, 1, 0], ArrowDown: [0, -1, 0],
  PageUp: [0, 0, 1], PageDown: [0, 0, -1]}; // mm to the patient's right, front and head, in voxels of the finest axis
const TURNS = {ArrowLeft: [-STEP_DEGREES, 0], ArrowRight: [STEP_DEGREES, 0], ArrowUp: [0, STEP_DEGREES],
  ArrowDown: [0, -STEP_DEGREES]};

const shown = new Set(CASE.organs.map((organ) => organ.id));
let source = 0; // which of CASE.sources is shown
const whole = []; // ids of each source's voxels, x fastest
const edges = []; // the same, but for what lies within an organ; made when first asked for
const slices = new niivue.Niivue({
  backColor: [0, 0, 0, 1], crosshairColor: [1, 1, 1, 0.6], crosshairWidth: 0.35, crosshairWidthUnit: "percent", crosshairGap: 3,
  showAllOrientationMarkers: true, fontMinPx: 15,
  isRadiologicalConvention: true, sagittalNoseLeft: true, multiplanarLayout: niivue.MULTIPLANAR_TYPE.GRID,
  multiplanarShowRender: niivue.SHOW_RENDER.NEVER, isRuler: true, dragAndDropEnabled: false, logLevel: "error",
});
const surfaces = new niivue.Niivue({
  backColor: [0.07, 0.07, 0.07, 1], show3Dcrosshair: false, isOrientCube: true, dragAndDropEnabled: false,
  sliceType: niivue.SLICE_TYPE.RENDER, logLevel: "error",
});

function element(id) {
  return document.getElementById(id);
}

async function unpacked(id) {
  const packed = Uint8Array.from(atob(element(id).textContent), (letter) => letter.charCodeAt(0));
  element(id).remove(); // a copy of it is all that is needed
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// ---- What is shown --------------------------------------------------------------------------------------------------

function colours() {
  const table = {R: [0], G: [0], B: [0], A: [0], I: [0], labels: ["background"]};
  for (const organ of CASE.organs) {
    table.R.push(organ.colour[0]);
    table.G.push(organ.colour[1]);
    table.B.push(organ.colour[2]);
    table.A.push(shown.has(organ.id) ? 255 : 0);
    table.I.push(organ.id);
    table.labels.push(organ.name);
  }
  return table;
}

function update() {
  const outlines = element("outlines").checked;
  CASE.sources.forEach((_, number) => {
    const volume = slices.volumes[1 + number];
    volume.img = outlines ? (edges[number] ??= edgesOf(whole[number], volume.hdr.dims)) : whole[number];
    volume.setColormapLabel(colours());
    volume.opacity = number === source ? (outlines ? 1 : Number(element("opacity").value)) : 0;
  });
  slices.updateGLVolume();
  for (const mesh of surfaces.meshes) {
    mesh.visible = mesh.source === source && shown.has(mesh.organ);
  }
  surfaces.drawScene();
  for (const organ of CASE.organs) {
    element(`show-${organ.id}`).checked = shown.has(organ.id);
    const there = organ.sources[source];
    element(`ml-${organ.id}`).textContent = there ? there.ml.toFixed(there.ml < 10 ? 1 : 0) : "none";
    element(`go-${organ.id}`).disabled = !there;
  }
}

// Ids where a neighbour has another, else 0. Where slices are thick, only those within a slice count: else the outline of
// a thin organ would be all of it.
function edgesOf(ids, [, nx, ny, nz]) {
  const [dx, dy, dz] = CASE.step_mm;
  const isThick = dz > THICK * Math.min(dx, dy);
  return ids.map((id, place) => {
    const x = place % nx, y = Math.floor(place / nx) % ny, z = Math.floor(place / (nx * ny));
    const atEdge = id &&
      (x === 0 || ids[place - 1] !== id || x === nx - 1 || ids[place + 1] !== id ||
       y === 0 || ids[place - nx] !== id || y === ny - 1 || ids[place + nx] !== id ||
       (!isThick && (z === 0 || ids[place - nx * ny] !== id || z === nz - 1 || ids[place + nx * ny] !== id)));
    return atEdge ? id : 0;
  });
}

function setWindow(name) {
  [slices.volumes[0].cal_min, slices.volumes[0].cal_max] = WINDOWS_HU[name];
  slices.updateGLVolume();
}

function goTo(mm) {
  slices.scene.crosshairPos = slices.mm2frac(mm);
  slices.createOnLocationChange();
  slices.drawScene();
}

function readOut(location) {
  const [x, y, z] = location.mm;
  const hu = Math.round(location.values[0].value);
  const [i, j, k] = location.vox;
  const [, nx, ny] = slices.volumes[0].hdr.dims;
  const id = whole[source][Math.round(i) + nx * (Math.round(j) + ny * Math.round(k))];
  const organ = CASE.organs.find((candidate) => candidate.id === id);
  const side = (mm, plus, minus) => `${Math.abs(mm).toFixed(0)} mm ${mm < 0 ? minus : plus}`;
  element("readout").textContent =
    `${side(x, "R", "L")}, ${side(y, "A", "P")}, ${side(z, "S", "I")}  ·  ${hu} HU  ·  ${organ ? organ.name : "no organ"}`;
}

// ---- Controls -------------------------------------------------------------------------------------------------------

function addChoice(parent, group, text, checked, choose) {
  const label = document.createElement("label");
  const input = document.createElement("input");
  input.type = "radio";
  input.name = group;
  input.checked = checked;
  input.addEventListener("change", choose);
  label.className = "row";
  label.append(input, ` ${text}`);
  parent.append(label);
}

function addOrgan(organ) {
  const row = element("organs").tBodies[0].insertRow();
  const label = document.createElement("label");
  const input = document.createElement("input");
  const swatch = document.createElement("span");
  input.type = "checkbox";
  input.id = `show-${organ.id}`;
  input.addEventListener("change", () => {
    shown[input.checked ? "add" : "delete"](organ.id);
    update();
  });
  swatch.className = "swatch";
  swatch.style.background = `rgb(${organ.colour.join(",")})`;
  label.append(input, swatch, organ.name);
  const go = document.createElement("button");
  go.type = "button";
  go.id = `go-${organ.id}`;
  go.textContent = "Go to";
  go.setAttribute("aria-label", `Go to ${organ.name}`);
  go.addEventListener("click", () => goTo(organ.sources[source].mm));
  row.insertCell().append(label);
  row.insertCell().id = `ml-${organ.id}`;
  row.insertCell().append(go);
}

function showOnly(ids) {
  shown.clear();
  ids.forEach((id) => shown.add(id));
  update();
}

function addControls() {
  CASE.sources.forEach((name, number) => addChoice(element("sources"), "source", name, number === 0, () => {
    source = number;
    update();
  }));
  element("sources").hidden = CASE.sources.length < 2;
  Object.keys(WINDOWS_HU).forEach((name, number) =>
    addChoice(element("windows"), "window", name, number === 0, () => setWindow(name)));
  CASE.organs.forEach(addOrgan);
  element("opacity").addEventListener("input", update);
  element("outlines").addEventListener("change", update);
  element("show-all").addEventListener("click", () => showOnly(CASE.organs.map((organ) => organ.id)));
  element("hide-all").addEventListener("click", () => showOnly([]));
  document.addEventListener("keydown", pressed, true);
}

function pressed(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) {
    return;
  }
  const choose = (group, number) => document.querySelectorAll(`input[name=${group}]`)[number]?.click();
  const key = event.key.toLowerCase();
  if (event.target.id === "slices" && ARROWS[event.key]) {
    const [right, front, head] = ARROWS[event.key];
    const [x, y, z] = slices.frac2mm(slices.scene.crosshairPos);
    const [dx, dy, dz] = CASE.step_mm;
    goTo([x + right * dx, y + front * dy, z + head * dz]);
  } else if (event.target.id === "surfaces" && TURNS[event.key]) {
    const [around, up] = TURNS[event.key];
    surfaces.setRenderAzimuthElevation(surfaces.scene.renderAzimuth + around, surfaces.scene.renderElevation + up);
  } else if (/^[1-4]$/.test(key)) {
    choose("window", Number(key) - 1);
  } else if (key === "o") {
    element("outlines").click();
  } else if (key === "t") {
    choose("source", (source + 1) % CASE.sources.length);
  } else {
    return;
  }
  event.preventDefault();
  event.stopPropagation(); // NiiVue has keys of its own
}

// ---- Start ----------------------------------------------------------------------------------------------------------

async function volume(id, name) {
  return niivue.NVImage.new(await unpacked(id), `${name}.nii`);
}

async function addSurfaces() {
  const bytes = await unpacked("surfaces-data");
  for (const part of CASE.surfaces) {
    const steps = new Uint16Array(bytes, part.start, 3 * part.vertices);
    const points = Float32Array.from(steps, (value, place) => part.low[place % 3] + value * part.step[place % 3]);
    const faces = new Uint32Array(bytes, part.faces_start, 3 * part.faces);
    const organ = CASE.organs.find((candidate) => candidate.id === part.organ);
    const colour = new Uint8Array([...organ.colour, 255]);
    const mesh = new niivue.NVMesh(points, faces, organ.name, colour, 1, true, surfaces.gl);
    mesh.organ = part.organ;
    mesh.source = part.source;
    surfaces.addMesh(mesh);
  }
}

async function start() {
  if (!document.createElement("canvas").getContext("webgl2")) {
    element("why").textContent = "This browser has no WebGL 2, so here are still pictures instead.";
    return;
  }
  element("viewer").hidden = false;
  element("stills").hidden = true;
  await slices.attachToCanvas(element("slices"));
  await surfaces.attachToCanvas(element("surfaces"));
  slices.addVolume(await volume("scan", "scan"));
  for (let number = 0; number < CASE.sources.length; number++) {
    slices.addVolume(await volume(`labels-${number}`, CASE.sources[number]));
    whole.push(slices.volumes[1 + number].img);
  }
  slices.setSliceType(niivue.SLICE_TYPE.MULTIPLANAR);
  await addSurfaces();
  surfaces.setRenderAzimuthElevation(...FROM_THE_FRONT);
  addControls();
  slices.onLocationChange = readOut;
  setWindow("Soft tissue");
  update();
  goTo(CASE.start_mm);
  document.body.dataset.ready = "yes";
}

window.viewer = {slices, surfaces, shown, update}; // for the console
start();
