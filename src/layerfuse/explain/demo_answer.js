// One model's column. The value of the component is a column of layerfuse.explain.demo_answers.
const STATES = {
  idle: "Not asked yet.",
  waiting: "Waiting for its turn …",
  writing: "Writing …",
  explaining: "Looking at what the answer rests on …",
  done: "",
  stopped: "Stopped.",
};
const part = (name) => element.querySelector(`[data-part="${name}"]`);
const text = part("text");
const state = part("state");
const seenBox = part("seen");
const canvas = part("attention");
const slider = part("slider");
let last = {}; // what was shown last
let written = null; // what the words were last made of
let mapped = null; // whose maps the slider shows
let pinned = null; // the word whose attention stays

function make(tag, content, name) {
  const made = document.createElement(tag);
  if (content !== undefined) made.textContent = content;
  if (name) made.className = name;
  return made;
}

function spotlight(word, grid) {
  // A veil over the picture, thin where most attention went. Smoothed by scaling up.
  const [rows, columns] = grid;
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(columns, rows);
  const cells = atob(word.cells);
  for (let cell = 0; cell < cells.length; cell++) {
    pixels.data[4 * cell + 3] = Math.round(0.86 * (255 - cells.charCodeAt(cell)));
  }
  context.putImageData(pixels, 0, 0);
}

function showWord(word, grid, button) {
  for (const other of text.querySelectorAll(".shown")) other.classList.remove("shown");
  const said = part("looked");
  said.replaceChildren();
  if (!word) {
    canvas.style.opacity = "0";
    said.textContent = "Point at a word, tap it or reach it with the Tab key to see where the model looked.";
    return;
  }
  button.classList.add("shown");
  spotlight(word, grid);
  canvas.style.opacity = "1";
  const share = (100 * word.share).toFixed(1);
  said.append(make("b", `“${word.text.trim()}”`));
  said.append(` gave ${share} % of its attention to the picture; bright is where most of it went.`);
}

function writeWords(seen) {
  text.replaceChildren();
  pinned = null;
  const back = () => {
    if (pinned) showWord(pinned.word, seen.grid, pinned.button);
    else showWord(null);
  };
  for (const word of seen.words) {
    const bare = word.text.trim();
    if (!bare || word.cells === null) {
      text.append(word.text);
      continue;
    }
    // Spaces stand outside, so that only the word is a button.
    const [before, after] = word.text.split(bare);
    const button = make("button", bare, "lf-word");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("pointerenter", () => showWord(word, seen.grid, button));
    button.addEventListener("pointerleave", back);
    button.addEventListener("focus", () => showWord(word, seen.grid, button));
    button.addEventListener("blur", back);
    button.addEventListener("click", () => {
      const again = pinned?.button === button;
      for (const other of text.querySelectorAll("[aria-pressed='true']")) other.setAttribute("aria-pressed", "false");
      pinned = again ? null : { word, button };
      button.setAttribute("aria-pressed", String(!again));
      showWord(word, seen.grid, button);
    });
    text.append(before ?? "", button, after ?? "");
  }
  const picture = part("picture");
  picture.src = seen.picture;
  showWord(null);
}

function showMap(maps) {
  const map = maps[Number(slider.value)];
  part("map").src = map.address;
  part("map").alt = `Feature map of ${map.name}: equal colours are equal features`;
  part("layer").textContent = map.name;
  slider.setAttribute("aria-valuetext", map.name);
}

function rangeOf(bars) {
  const values = bars.map((bar) => bar.value);
  return { lowest: Math.min(0, ...values), highest: Math.max(0, ...values) };
}

function sharedRange() {
  // Bars side by side are compared: the columns of one question have one scale. A nat is its least
  // length, or differences of nothing would fill it.
  const asked = last.question;
  const own = rangeOf(last.seen.contributions);
  for (const other of document.querySelectorAll(".lf-column[data-range]")) {
    const range = JSON.parse(other.dataset.range);
    if (range.question !== asked) continue;
    own.lowest = Math.min(own.lowest, range.lowest);
    own.highest = Math.max(own.highest, range.highest);
  }
  own.highest = Math.max(own.highest, own.lowest + 1);
  return own;
}

function shareRange(column) {
  // Told to all columns, this one among them, whenever it changes.
  const article = element.querySelector(".lf-column");
  const bars = column.seen?.contributions;
  const range = bars ? JSON.stringify({ question: column.question, ...rangeOf(bars) }) : undefined;
  if (article.dataset.range === range) return;
  if (range) article.dataset.range = range;
  else delete article.dataset.range;
  document.dispatchEvent(new Event("lf-range"));
}

function drawContributions() {
  if (last.seen?.contributions) drawBars(part("contributions"), last.seen.contributions, sharedRange());
}

function drawBars(box, bars, range) {
  const table = box.querySelector("table");
  table.replaceChildren();
  const { lowest, highest } = range;
  const room = highest - lowest || 1;
  for (const bar of bars) {
    const row = table.insertRow();
    const name = make("th", bar.name);
    name.scope = "row";
    const track = make("span", undefined, "lf-bar");
    const fill = make("i", undefined, bar.value < 0 ? "less" : "");
    fill.style.left = `${(100 * (Math.min(0, bar.value) - lowest)) / room}%`;
    fill.style.width = `${(100 * Math.abs(bar.value)) / room}%`;
    track.append(fill);
    row.append(name);
    row.insertCell().append(track);
    const number = row.insertCell();
    number.className = "number";
    number.textContent = bar.written;
  }
}

function render() {
  let column = props.value;
  if (!column?.state) return;
  if (column.state === "refused") {
    // Gradio says the same of an answer that broke off, whose words stay as they are.
    if (last.state !== "waiting") return;
    column = { ...last, state: "error", error: column.error };
  }
  last = column;
  const seen = column.seen ?? {};
  part("asked").textContent = column.question;
  element.firstElementChild.setAttribute("aria-busy", String(["waiting", "writing"].includes(column.state)));
  text.classList.toggle("writing", column.state === "writing");
  state.classList.toggle("error", column.state === "error");
  let told = column.state === "error" ? column.error : STATES[column.state];
  if (column.state === "done") {
    told = `${column.text ? "Answered" : "It said nothing,"} in ${seen.seconds} s.`;
  }
  if (state.textContent !== told) state.textContent = told;

  // Words are made once for an answer, or a pointer on one would lose it.
  // By all that they show: another picture may get the same answer in the same time.
  const key = seen.words ? JSON.stringify([column.question, column.text, seen.words]) : null;
  if (key === null) {
    text.textContent = column.text;
    written = null;
  } else if (key !== written) {
    written = key;
    writeWords(seen);
  }
  seenBox.hidden = !seen.words;
  part("mapped").hidden = !seen.maps;
  const maps = seen.maps ? JSON.stringify(seen.maps) : null;
  if (seen.maps && mapped !== maps) {
    mapped = maps;
    slider.max = String(seen.maps.length - 1);
    slider.value = "0";
    part("map").style.setProperty("--shape", `${seen.grid[1]} / ${seen.grid[0]}`);
    slider.oninput = () => showMap(seen.maps);
    showMap(seen.maps);
  }
  part("weights").hidden = !seen.weights?.length;
  if (seen.weights?.length) drawBars(part("weights"), seen.weights, rangeOf(seen.weights));
  part("contributions").hidden = !seen.contributions;
  if (seen.contributions) {
    part("means").textContent = `How much less likely the answer is, in nats, with the mean of ${seen.means} in the layer's place.`;
    drawContributions();
  }
  shareRange(column);
}

element.addEventListener("keydown", (event) => {
  if (event.key === "Escape") {
    pinned = null;
    for (const word of text.querySelectorAll("[aria-pressed='true']")) word.setAttribute("aria-pressed", "false");
    showWord(null);
  }
});
document.addEventListener("lf-range", drawContributions);
watch("value", render);
render();
