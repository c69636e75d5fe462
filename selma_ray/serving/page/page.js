// The playground: draws one prompt with two models from one seed, shows both while they form, and asks the judge about both.
"use strict";

const PREVIEWS = 6;
const MIX = "mix of experts";
const SMALL_PX = 160;
const REMEMBERED = 24;
const FIELDS = ["prompt", "negative", "size"];
const NUMBER_FIELDS = ["seed", "steps", "guidance", "count", "best"];

const element = (id) => document.getElementById(id);
const frames = ["left", "right"].map((id) => {
  const root = element(id);
  return {
    root,
    model: root.querySelector("select"),
    image: root.querySelector("img"),
    empty: root.querySelector(".empty"),
    latency: root.querySelector(".latency"),
    progress: root.querySelector("progress"),
    verdict: root.querySelector(".verdict"),
    strip: root.querySelector(".strip"),
    download: root.querySelector(".download"),
    results: [],
  };
});
let running = null;
let linked = location.hash;

class Refusal extends Error {
  constructor(status, error, retryAfter) {
    const wait = retryAfter ? ` Try again in ${retryAfter} s.` : "";
    super(`${error.message}.${wait} (${status} ${error.code})`);
    this.status = status;
    this.code = error.code;
  }
}

async function ask(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = element("key").value.trim();
  // A browser sends no header with other characters, and says of it what it says of a service that is down.
  if (!/^[\x21-\x7e]*$/.test(key)) {
    throw new Refusal(401, { message: "The API key has a character that no key has; copy it again", code: "invalid_api_key" });
  }
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = body ? { method: "POST", body: JSON.stringify(body), headers, signal } : { headers, signal };
  const response = await fetch(path, options);
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const error = answer?.error ?? { message: response.statusText || "no reason given", code: "unknown" };
  throw new Refusal(response.status, error, response.headers.get("Retry-After"));
}

async function* serverSentEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) yield JSON.parse(block.slice(block.indexOf("data: ") + 6));
  }
}

function mixWeights() {
  const sliders = [...element("sliders").querySelectorAll("input")];
  return Object.fromEntries(sliders.map((slider) => [slider.name, Number(slider.value)]));
}

function settings() {
  const values = { left: frames[0].model.value, right: frames[1].model.value, mix: mixWeights() };
  for (const name of FIELDS) values[name] = element(name).value.trim();
  for (const name of NUMBER_FIELDS) values[name] = element(name).value === "" ? null : Number(element(name).value);
  return values;
}

function restore(values) {
  for (const name of [...FIELDS, ...NUMBER_FIELDS]) if (values[name] !== undefined) element(name).value = values[name] ?? "";
  frames.forEach((frame, index) => {
    const model = index ? values.right : values.left;
    if (model === frame.model.value || ![...frame.model.options].some((option) => option.value === model)) return;
    running?.abort();
    frame.model.value = model;
    forget(frame);
  });
  for (const slider of element("sliders").querySelectorAll("input")) {
    const weight = values.mix?.[slider.name];
    if (weight === undefined) continue;
    slider.value = weight;
    slider.dispatchEvent(new Event("input"));
  }
  toggleMix();
  showRequest();
}

function modelOf(frame) {
  return frame.model.value === MIX ? mixWeights() : frame.model.value;
}

function showRequest() {
  const withKey = !element("key-field").hidden;
  const body = bodyOf(settings(), modelOf(frames[1]));
  element("link").href = toHash(settings());
  element("curl").textContent = asCurl(location.origin, body, withKey);
  element("python").textContent = asPython(location.origin, body, withKey);
}

// `index` counts the images of one request; the one that is looked at is shown large.
function show(frame, index, file, size, seed) {
  const source = `data:image/${file.format};base64,${file.b64_json}`;
  frame.results[index] = { source, seed, size };
  if (frame.results.length > 1) showStrip(frame);
  if (index === frame.chosen) showLarge(frame);
}

function showLarge(frame) {
  const { source, seed, size } = frame.results[frame.chosen];
  frame.image.src = source;
  frame.image.classList.toggle("small", Math.max(...size.split("x").map(Number)) <= SMALL_PX);
  frame.image.hidden = false;
  frame.empty.hidden = true;
  frame.download.href = source;
  frame.download.download = fileName(frame.prompt, frame.model.value, seed);
  frame.download.textContent = `Download, seed ${seed}`;
  frame.download.hidden = false;
}

function showStrip(frame) {
  const thumbnails = [...frame.results.keys()].filter((index) => frame.results[index]).map((index) => {
    const { source, seed } = frame.results[index];
    const label = `Image ${index + 1}, seed ${seed}`;
    return thumbnail(source, label, () => {
      frame.chosen = index;
      showLarge(frame);
      showScores();
    });
  });
  frame.strip.replaceChildren(...thumbnails);
}

function thumbnail(source, label, choose) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "thumbnail", title: label });
  button.append(Object.assign(document.createElement("img"), { src: source, alt: label }));
  button.addEventListener("click", choose);
  return button;
}

async function draw(frame, body, signal) {
  const startedMs = performance.now();
  const tick = () => (frame.latency.value = `${((performance.now() - startedMs) / 1000).toFixed(2)} s`);
  const images = body.best_of === undefined ? await drawStream(frame, body, signal, tick) : await drawBest(frame, body, signal);
  tick();
  frame.progress.value = 1;
  frame.image.alt = `${body.prompt}, drawn by ${frame.model.value} from seed ${frame.results[frame.chosen].seed}`;
  return images;
}

async function drawStream(frame, body, signal, tick) {
  const count = body.n ?? 1;
  const response = await ask("v1/images/generations", { ...body, stream: true, partial_images: PREVIEWS }, signal);
  const finished = [];
  for await (const event of serverSentEvents(response)) {
    if (event.type === "error") throw new Refusal("stream", event.error);
    show(frame, event.image_index, { format: event.output_format, b64_json: event.b64_json }, event.size, event.seed);
    tick();
    if (event.type === "image_generation.completed") {
      finished[event.image_index] = event.b64_json;
      frame.progress.value = finished.filter(Boolean).length / count;
    } else if (count === 1) {
      frame.progress.value = (event.partial_image_index + 1) / (PREVIEWS + 1);
    }
  }
  if (finished.filter(Boolean).length === count) return finished;
  throw new Refusal("stream", { message: "The answer ended before the image was finished", code: "incomplete" });
}

// The best are known when all are drawn, so that there is nothing to stream.
async function drawBest(frame, body, signal) {
  const answer = await (await ask("v1/images/generations", body, signal)).json();
  answer.data.forEach((image, index) =>
    show(frame, index, { format: answer.output_format, b64_json: image.b64_json }, answer.size, image.seed),
  );
  return answer.data.map((image) => image.b64_json);
}

function remember(values) {
  const [left, right] = frames.map((frame) => frame.results[0].source);
  const entry = document.createElement("div");
  const label = `${values.prompt}, seed ${values.seed}`;
  entry.append(thumbnail(left, `${label}, ${values.left}`, () => restore(values)));
  entry.append(thumbnail(right, `${label}, ${values.right}`, () => restore(values)));
  entry.append(Object.assign(document.createElement("p"), { textContent: label }));
  element("history").prepend(entry);
  while (element("history").children.length > REMEMBERED) element("history").lastElementChild.remove();
  element("no-history").hidden = true;
}

function clear() {
  element("error").hidden = true;
  element("answers").hidden = true;
  element("judge-note").textContent = "The judge is asked when both images are finished.";
  for (const frame of frames) {
    frame.progress.value = 0;
    frame.latency.value = "";
    frame.verdict.replaceChildren();
    frame.strip.replaceChildren();
    frame.results = [];
    frame.chosen = 0;
    frame.prompt = element("prompt").value.trim();
  }
}

function reseed() {
  element("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  showRequest();
}

function fail(error) {
  if (error.name === "AbortError") {
    element("status").textContent = "Stopped";
    return;
  }
  if (error.status === 401) {
    element("key-field").hidden = false;
    element("key").focus();
  }
  const unreachable = error instanceof TypeError;
  element("error").textContent = unreachable ? "The service cannot be reached. Is it still running?" : error.message;
  element("error").hidden = false;
  element("status").textContent = "Not drawn";
}

async function generate() {
  if (running || !element("form").reportValidity()) return;
  if (element("fresh").checked) reseed();
  clear();
  const values = settings();
  history.replaceState(null, "", toHash(values));
  const controller = new AbortController();
  running = controller;
  element("generate").hidden = true;
  element("stop").hidden = false;
  element("status").textContent = "Drawing";
  try {
    const images = await Promise.all(frames.map((frame) => draw(frame, bodyOf(values, modelOf(frame)), controller.signal)));
    remember(values);
    await judge(images, controller.signal);
  } catch (error) {
    controller.abort();
    fail(error);
  } finally {
    running = null;
    element("generate").hidden = false;
    element("stop").hidden = true;
  }
}

async function judge(images, signal) {
  element("status").textContent = "Asking the judge";
  try {
    const answers = await Promise.all(frames.map((frame, index) => scored(frame.prompt, images[index], signal)));
    answers.forEach(({ judge, data }, index) => data.forEach((each, image) => Object.assign(frames[index].results[image], { judge, scored: each })));
    showScores();
    element("status").textContent = "Done";
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // The images are there, whatever becomes of their scores.
    element("judge-note").textContent = whyNoScore(error);
    element("status").textContent = "Drawn, not scored";
  }
}

async function scored(prompt, images, signal) {
  return (await ask("v1/scores", { prompt, images, metrics: ["dsg"] }, signal)).json();
}

// The scores of the two images that are looked at.
function showScores() {
  const chosen = frames.map((frame) => frame.results[frame.chosen]);
  if (!chosen.every((each) => each?.scored)) return;
  chosen.forEach((each, index) => showVerdict(frames[index], each.scored));
  showAnswers(chosen.map((each) => each.scored), frames.map((frame) => frame.model.value));
  const differing = element("answers").querySelectorAll("tr.differs").length;
  const differences = differing === 1 ? "1 answer differs" : `${differing || "No"} answers differ`;
  element("judge-note").textContent = `${differences}. Answers are those of ${chosen[0].judge}.`;
}

function whyNoScore(error) {
  return error.code === "unsupported_caption"
    ? "No score: the judge has questions about scenes of its own world alone, and none about this prompt."
    : `No score for this prompt: ${error.message}`;
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new Refusal("file", { message: "The file cannot be read", code: "unreadable" })));
    reader.readAsDataURL(file);
  });
}

async function scoreOwn(file) {
  if (!file) return;
  if (running) {
    element("judge-note").textContent = `${file.name} is not scored: wait until the images are finished, or stop them.`;
    return;
  }
  element("error").hidden = true;
  element("status").textContent = "Asking the judge";
  try {
    const { judge, data } = await scored(element("prompt").value.trim(), [await read(file)]);
    const dsg = data[0].scores.dsg;
    showAnswers(data, [file.name]);
    element("judge-note").textContent = `${file.name}: ${dsg === null ? "no score" : `${Math.round(100 * dsg)}%`} by ${judge}.`;
    element("status").textContent = "Done";
  } catch (error) {
    if (error.code === "unsupported_caption") element("judge-note").textContent = whyNoScore(error);
    else fail(error);
    element("status").textContent = "Not scored";
  }
}

// Text that is dragged into a field goes its own way.
function holdsFiles(event) {
  return event.dataTransfer?.types.includes("Files") ?? false;
}

function showDropping(shown) {
  document.body.classList.toggle("dropping", shown);
}

function dragOver(event) {
  if (!holdsFiles(event)) return;
  event.preventDefault(); // or the browser opens the file in the place of the page
  event.dataTransfer.dropEffect = "copy";
  showDropping(true);
}

function drop(event) {
  showDropping(false);
  if (!holdsFiles(event)) return;
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  const accepted = element("own").accept.split(",");
  if (!file || accepted.includes(file.type)) scoreOwn(file);
  else element("judge-note").textContent = `${file.name} is not scored: it must be a PNG, JPEG or WebP image.`;
}

function showVerdict(frame, scored) {
  const score = document.createElement("strong");
  score.textContent = scored.scores.dsg === null ? "no score" : `${Math.round(100 * scored.scores.dsg)}%`;
  const held = scored.questions.filter((question) => question.counted).length;
  frame.verdict.replaceChildren(score, `DSG, ${held} of ${scored.questions.length} questions hold`);
}

function showAnswers(data, names) {
  const headings = element("answers").querySelectorAll("thead .answer");
  headings.forEach((heading, index) => {
    heading.textContent = names[index] ?? "";
    heading.hidden = index >= names.length;
  });
  const rows = data[0].questions.map((question, index) => {
    const row = document.createElement("tr");
    const heading = document.createElement("th");
    heading.scope = "row";
    heading.textContent = question.question;
    const answers = data.map((scored) => scored.questions[index]);
    row.classList.toggle("differs", answers.some((answer) => answer.counted !== answers[0].counted));
    row.append(heading, ...answers.map(answerCell));
    return row;
  });
  element("answers").querySelector("tbody").replaceChildren(...rows);
  element("answers").hidden = false;
}

function answerCell(answer) {
  const cell = document.createElement("td");
  cell.className = answer.counted ? "held" : "missed";
  cell.textContent = answer.answer ?? "unreadable";
  if (answer.answer === "yes" && !answer.counted) cell.textContent = "yes, but of nothing there";
  if (answer.p_yes !== null) {
    const chance = document.createElement("small");
    chance.textContent = `P(yes) ${answer.p_yes.toFixed(2)}`;
    cell.append(chance);
  }
  return cell;
}

function addSlider(name, index, count) {
  const row = document.createElement("div");
  row.className = "slider";
  const label = Object.assign(document.createElement("label"), { htmlFor: `mix-${index}`, textContent: name, title: name });
  const value = (1 / count).toFixed(2);
  const input = Object.assign(document.createElement("input"), {
    type: "range", id: `mix-${index}`, name, min: "0", max: "1", step: "0.05",
  });
  input.value = value;
  const output = document.createElement("output");
  output.value = Number(input.value).toFixed(2);
  input.addEventListener("input", () => {
    output.value = Number(input.value).toFixed(2);
    showRequest();
  });
  row.append(label, input, output);
  element("sliders").append(row);
}

function offerModels(models) {
  // Of several runs' experts those of the service's own are mixed; a mix has the experts of one run.
  const experts = models.map((model) => model.id).filter((name, index) => models[index].kind === "expert" && !name.includes("/"));
  const names = [...models.map((model) => model.id), ...(experts.length ? [MIX] : [])];
  for (const frame of frames) frame.model.replaceChildren(...names.map((name) => new Option(name, name)));
  const merged = models.find((model) => model.kind === "merged").id;
  frames[0].model.value = names.includes("base") ? "base" : merged;
  frames[1].model.value = merged;
  element("sliders").replaceChildren();
  experts.forEach((name, index) => addSlider(name, index, experts.length));
}

// What is shown was drawn by the model that was chosen before.
function forget(frame) {
  frame.image.hidden = true;
  frame.image.removeAttribute("src");
  frame.image.alt = "";
  frame.empty.hidden = false;
  frame.progress.value = 0;
  frame.latency.value = "";
  frame.verdict.replaceChildren();
  frame.strip.replaceChildren();
  frame.download.hidden = true;
  frame.results = [];
  element("answers").hidden = true;
  element("judge-note").textContent = "Generate to see the answers.";
}

function toggleMix() {
  element("mix").hidden = !frames.some((frame) => frame.model.value === MIX);
}

async function connect() {
  try {
    offerModels((await (await ask("v1/models")).json()).data);
    restore(fromHash(linked));
    linked = ""; // another key must not undo what was typed since
    element("error").hidden = true;
    element("status").textContent = "Ready";
  } catch (error) {
    fail(error);
    element("status").textContent = "Not connected";
  }
}

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
element("form").addEventListener("input", showRequest);
element("reseed").addEventListener("click", reseed);
element("own").addEventListener("change", () => {
  scoreOwn(element("own").files[0]);
  element("own").value = ""; // the same file can be chosen again
});
document.addEventListener("dragover", dragOver);
document.addEventListener("dragleave", (event) => showDropping(event.relatedTarget !== null && holdsFiles(event)));
document.addEventListener("drop", drop);
window.addEventListener("hashchange", () => restore(fromHash(location.hash)));
element("stop").addEventListener("click", () => running?.abort());
element("key").addEventListener("change", connect);
for (const frame of frames) {
  frame.model.addEventListener("change", () => {
    running?.abort();
    forget(frame);
    toggleMix();
    showRequest();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  if (event.key === "Escape") running?.abort();
});
connect();
