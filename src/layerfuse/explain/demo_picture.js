// The picture of the page: a sample or an upload. The value of the component is its token.
const main = element.querySelector("figure");
const image = main.querySelector("img");
const caption = main.querySelector("figcaption");
const drop = element.querySelector(".lf-drop");
const input = drop.querySelector("input");
const wrong = element.querySelector(".lf-wrong");
const list = element.querySelector(".lf-samples");

function show(picture) {
  image.src = `picture/${picture.token}/large`;
  image.alt = picture.words;
  caption.textContent = picture.words;
  for (const button of list.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.token === picture.token));
  }
  wrong.textContent = "";
  props.value = picture.token;
}

for (const sample of props.samples) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const small = document.createElement("img");
  button.type = "button";
  button.dataset.token = sample.token;
  button.setAttribute("aria-pressed", "false");
  small.src = `picture/${sample.token}/small`;
  small.alt = sample.words;
  button.append(small);
  button.addEventListener("click", () => show(sample));
  item.append(button);
  list.append(item);
}

async function send(file) {
  if (!file) return;
  // Said before it is sent: the server would read all of it to refuse it.
  if (file.size > props.most_bytes) {
    wrong.textContent = `${file.name} is larger than ${Math.floor(props.most_bytes / 1e6)} MB: save it smaller.`;
    return;
  }
  drop.setAttribute("aria-busy", "true");
  wrong.textContent = "";
  try {
    const answer = await fetch("picture", {
      method: "POST",
      headers: { "content-type": "application/octet-stream", "x-name": encodeURIComponent(file.name) },
      body: file,
    });
    const told = await answer.json();
    if (told.error) wrong.textContent = told.error;
    else show(told);
  } catch {
    wrong.textContent = "The picture could not be sent: is layerfuse demo still running?";
  } finally {
    drop.removeAttribute("aria-busy");
    // So that the same file can be chosen again.
    input.value = "";
  }
}

input.addEventListener("change", () => send(input.files[0]));
for (const kind of ["dragover", "dragleave", "drop"]) {
  element.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") send(event.dataTransfer.files[0]);
  });
}
document.addEventListener("paste", (event) => {
  const file = event.clipboardData?.files[0];
  if (file?.type.startsWith("image/")) send(file);
});
const first = props.samples.find((sample) => sample.token === props.value);
if (first) show(first);
