// All that is drawn comes from the page itself.
const seen = JSON.parse(document.getElementById("inspection").textContent);
const [rows, columns] = seen.grid;
const cells = rows * columns;

function bytesOf(text) {
  return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
}

function shade(share) {
  const place = Math.min(Math.max(share, 0), 1) * (seen.shades.length - 1);
  const below = Math.min(Math.floor(place), seen.shades.length - 2);
  const part = place - below;
  return [0, 1, 2].map((channel) =>
    Math.round((1 - part) * seen.shades[below][channel] + part * seen.shades[below + 1][channel]));
}

// A canvas of one pixel a cell; colourOf gives red, green and blue of a cell.
function cellsCanvas(gridRows, gridColumns, colourOf) {
  const small = document.createElement("canvas");
  small.width = gridColumns;
  small.height = gridRows;
  const context = small.getContext("2d");
  const pixels = context.createImageData(gridColumns, gridRows);
  for (let cell = 0; cell < gridRows * gridColumns; cell++) {
    const [red, green, blue] = colourOf(cell);
    pixels.data.set([red, green, blue, 255], 4 * cell);
  }
  context.putImageData(pixels, 0, 0);
  return small;
}

function placeName(cell, gridColumns) {
  return `row ${Math.floor(cell / gridColumns) + 1}, column ${(cell % gridColumns) + 1}`;
}

function percent(share) {
  return `${(100 * share).toFixed(1)} %`;
}

// Where the words looked

function showAttention(picture) {
  const canvas = document.getElementById("looked");
  if (!canvas) return;
  const slider = document.getElementById("block");
  const sinks = document.getElementById("sinks");
  const kept = { ...seen.attention, bytes: bytesOf(seen.attention.cells) };
  const cleaned = { ...seen.attentionWithoutSinks, bytes: bytesOf(seen.attentionWithoutSinks.cells) };
  const buttons = [];
  const names = seen.pieces.map((piece) => piece.trim() || "␣");
  // A token of spaces alone says little.
  let word = Math.max(0, seen.pieces.findIndex((piece) => piece.trim() !== ""));

  function draw() {
    const block = Number(slider.value);
    const attention = sinks?.checked ? cleaned : kept;
    const start = (word * (seen.blocks + 1) + block) * cells;
    const heat = cellsCanvas(rows, columns, (cell) => shade(attention.bytes[start + cell] / 255));
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.filter = "grayscale(1)";
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    context.filter = "none";
    context.globalAlpha = 0.6;
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(heat, 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    const shares = attention.bytes.slice(start, start + cells);
    const most = shares.indexOf(Math.max(...shares));
    const name = block === 0 ? "mean of all" : String(block - 1);
    document.getElementById("block-name").textContent = name;
    slider.setAttribute("aria-valuetext", name);
    const text = `“${names[word]}”: ${percent(attention.total[word][block])} of its attention went to the picture, most to ${placeName(most, columns)} (${percent(attention.largest[word][block])}).`;
    document.getElementById("looked-text").textContent = text;
    canvas.setAttribute("aria-label", text);
    buttons.forEach((button, index) => button.setAttribute("aria-pressed", String(index === word)));
  }

  names.forEach((name, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    const choose = () => { word = index; draw(); };
    for (const event of ["click", "focus", "mouseenter"]) button.addEventListener(event, choose);
    buttons.push(button);
    document.getElementById("words").append(button);
  });
  slider.addEventListener("input", draw);
  sinks?.addEventListener("change", draw);
  draw();
}

// What the layers show

let patch = seen.start;
const listeners = [];

function choosePatch(cell) {
  patch = cell;
  for (const listener of listeners) listener();
}

// Arrow keys move the chosen patch, a click chooses the patch below it.
function letChoose(canvas) {
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    const row = Math.floor((rows * (event.clientY - box.top)) / box.height);
    const column = Math.floor((columns * (event.clientX - box.left)) / box.width);
    choosePatch(Math.min(row, rows - 1) * columns + Math.min(column, columns - 1));
  });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const row = Math.min(Math.max(Math.floor(patch / columns) + step[0], 0), rows - 1);
    const column = Math.min(Math.max((patch % columns) + step[1], 0), columns - 1);
    choosePatch(row * columns + column);
  });
}

function frame(context, side, line) {
  const width = side / columns;
  const height = side / rows;
  context.lineWidth = line;
  for (const [colour, inset] of [["#000", 0], ["#fff", line]]) {
    context.strokeStyle = colour;
    context.strokeRect((patch % columns) * width + inset, Math.floor(patch / columns) * height + inset, width - 2 * inset, height - 2 * inset);
  }
}

function showMaps() {
  const side = 192;
  const [comparedRows, comparedColumns] = seen.comparedGrid;
  const compared = comparedRows * comparedColumns;
  const shared = bytesOf(seen.shared);
  const own = bytesOf(seen.own);
  const norms = bytesOf(seen.norms.cells);
  const cosines = bytesOf(seen.cosines);
  // The picture itself, to compare with.
  const whole = document.createElement("figure");
  const shown = document.createElement("img");
  shown.src = `data:image/png;base64,${seen.picture}`;
  shown.alt = "The picture as the encoder saw it";
  const title = document.createElement("figcaption");
  title.textContent = "the picture";
  whole.append(shown, title);
  document.getElementById("grid-maps").append(whole);
  const figures = seen.maps.map((name) => {
    const figure = document.createElement("figure");
    const canvas = document.createElement("canvas");
    canvas.width = side;
    canvas.height = side;
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `Map of ${name}; arrow keys choose a patch`);
    const caption = document.createElement("figcaption");
    figure.append(canvas, caption);
    document.getElementById("grid-maps").append(figure);
    letChoose(canvas);
    return { name, figure, canvas, caption };
  });

  function comparedCell() {
    const row = Math.floor((Math.floor(patch / columns) * comparedRows) / rows);
    const column = Math.floor(((patch % columns) * comparedColumns) / columns);
    return row * comparedColumns + column;
  }

  function draw() {
    const view = document.querySelector("input[name=view]:checked").value;
    figures.forEach(({ name, figure, canvas, caption }, index) => {
      // Only layers share a basis.
      figure.hidden = view === "shared" && index >= seen.layers;
      const context = canvas.getContext("2d");
      context.imageSmoothingEnabled = false;
      let small;
      let extra = "";
      if (view === "cosines") {
        const start = index * compared * compared + comparedCell() * compared;
        small = cellsCanvas(comparedRows, comparedColumns, (cell) => shade((2 * cosines[start + cell]) / 255 - 1));
      } else if (view === "norms") {
        small = cellsCanvas(rows, columns, (cell) => shade(norms[index * cells + cell] / 255));
        extra = `: ${seen.norms.smallest[index].toPrecision(3)} to ${seen.norms.largest[index].toPrecision(3)}`;
      } else {
        const colours = view === "shared" ? shared : own;
        small = cellsCanvas(rows, columns, (cell) => colours.slice(3 * (index * cells + cell), 3 * (index * cells + cell) + 3));
      }
      context.drawImage(small, 0, 0, side, side);
      frame(context, side, 1.5);
      caption.textContent = name + extra;
    });
    document.getElementById("chosen").textContent = `Chosen patch: ${placeName(patch, columns)}.`;
  }

  for (const radio of document.querySelectorAll("input[name=view]")) radio.addEventListener("change", draw);
  listeners.push(draw);
  draw();
}

// Where detail was looked up

function showSampling(picture) {
  const canvas = document.getElementById("sampled");
  if (!canvas) return;
  const { count, fractions } = seen.points;
  const places = new Int16Array(bytesOf(seen.points.places).buffer);
  const weights = bytesOf(seen.points.weights);
  const levels = bytesOf(seen.points.levels);

  function draw() {
    const context = canvas.getContext("2d");
    const side = canvas.width;
    context.clearRect(0, 0, side, side);
    context.globalAlpha = 0.75;
    context.drawImage(picture, 0, 0, side, side);
    for (let point = 0; point < count; point++) {
      const index = patch * count + point;
      context.fillStyle = seen.levelColours[levels[index]];
      context.beginPath();
      context.arc((side * places[2 * index]) / fractions, (side * places[2 * index + 1]) / fractions, 2 + 8 * Math.sqrt(weights[index] / 255), 0, 2 * Math.PI);
      context.fill();
    }
    context.globalAlpha = 1;
    frame(context, side, 2);
    const list = document.getElementById("levels");
    list.replaceChildren();
    seen.levels.forEach((name, level) => {
      const share = seen.points.byLevel[level][patch];
      const item = document.createElement("li");
      const bar = document.createElement("span");
      bar.className = "bar";
      bar.style.setProperty("--share", percent(share).replace(" ", ""));
      bar.style.setProperty("--colour", seen.levelColours[level]);
      const label = document.createElement("span");
      label.textContent = name;
      const number = document.createElement("span");
      number.textContent = percent(share);
      item.append(label, bar, number);
      list.append(item);
    });
  }

  letChoose(canvas);
  listeners.push(draw);
  draw();
}

showMaps();
const picture = new Image();
picture.addEventListener("load", () => {
  showAttention(picture);
  showSampling(picture);
});
picture.src = `data:image/png;base64,${seen.picture}`;
