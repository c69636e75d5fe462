// The playground: draws one prompt with two models from one seed, shows both while they form, and asks the judge about both.
"use strict";

const PREVIEWS = 6;
const MIX = "mix of experts";
const SMALL_PX = 160;

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
  };
});
let running = null;

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

function generationBody(frame) {
  const body = {
    prompt: element("prompt").value.trim(),
    model: frame.model.value === MIX ? mixWeights() : frame.model.value,
    seed: Number(element("seed").value),
    stream: true,
    partial_images: PREVIEWS,
  };
  if (element("steps").value) body.num_inference_steps = Number(element("steps").value);
  if (element("guidance").value) body.guidance_scale = Number(element("guidance").value);
  return body;
}

function show(frame, event) {
  frame.image.src = `data:image/${event.output_format};base64,${event.b64_json}`;
  frame.image.classList.toggle("small", Math.max(...event.size.split("x").map(Number)) <= SMALL_PX);
  frame.image.hidden = false;
  frame.empty.hidden = true;
}

async function draw(frame, body, signal) {
  const startedMs = performance.now();
  const response = await ask("v1/images/generations", body, signal);
  for await (const event of serverSentEvents(response)) {
    if (event.type === "error") throw new Refusal("stream", event.error);
    show(frame, event);
    frame.latency.value = `${((performance.now() - startedMs) / 1000).toFixed(2)} s`;
    if (event.type === "image_generation.completed") {
      frame.progress.value = 1;
      frame.image.alt = `${body.prompt}, drawn by ${frame.model.value} from seed ${body.seed}`;
      return event.b64_json;
    }
    frame.progress.value = (event.partial_image_index + 1) / (PREVIEWS + 1);
  }
  throw new Refusal("stream", { message: "The answer ended before the image was finished", code: "incomplete" });
}

function clear() {
  element("error").hidden = true;
  element("answers").hidden = true;
  element("judge-note").textContent = "The judge is asked when both images are finished.";
  for (const frame of frames) {
    frame.progress.value = 0;
    frame.latency.value = "";
    frame.verdict.replaceChildren();
  }
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
  clear();
  const controller = new AbortController();
  running = controller;
  element("generate").hidden = true;
  element("stop").hidden = false;
  element("status").textContent = "Drawing";
  try {
    const images = await Promise.all(frames.map((frame) => draw(frame, generationBody(frame), controller.signal)));
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
  const body = { prompt: element("prompt").value.trim(), images, metrics: ["dsg"] };
  try {
    const scores = await (await ask("v1/scores", body, signal)).json();
    scores.data.forEach((scored, index) => showVerdict(frames[index], scored));
    showAnswers(scores.data);
    const differing = element("answers").querySelectorAll("tr.differs").length;
    const differences = differing === 1 ? "1 answer differs" : `${differing || "No"} answers differ`;
    element("judge-note").textContent = `${differences}. Answers are those of ${scores.judge}.`;
    element("status").textContent = "Done";
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // The images are there, whatever becomes of their scores.
    element("judge-note").textContent =
      error.code === "unsupported_caption"
        ? "No score: the judge has questions about scenes of its own world alone, and none about this prompt."
        : `No score for this prompt: ${error.message}`;
    element("status").textContent = "Drawn, not scored";
  }
}

function showVerdict(frame, scored) {
  const score = document.createElement("strong");
  score.textContent = scored.scores.dsg === null ? "no score" : `${Math.round(100 * scored.scores.dsg)}%`;
  const held = scored.questions.filter((question) => question.counted).length;
  frame.verdict.replaceChildren(score, `DSG, ${held} of ${scored.questions.length} questions hold`);
}

function showAnswers(data) {
  const headings = element("answers").querySelectorAll("thead .answer");
  frames.forEach((frame, index) => (headings[index].textContent = frame.model.value));
  const rows = data[0].questions.map((question, index) => {
    const row = document.createElement("tr");
    const heading = document.createElement("th");
    heading.scope = "row";
    heading.textContent = question.question;
    const answers = data.map((scored) => scored.questions[index]);
    row.classList.toggle("differs", answers[0].counted !== answers[1].counted);
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
  input.addEventListener("input", () => (output.value = Number(input.value).toFixed(2)));
  row.append(label, input, output);
  element("sliders").append(row);
}

function offerModels(models) {
  const experts = models.filter((model) => model.kind === "expert").map((model) => model.id);
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
  element("answers").hidden = true;
  element("judge-note").textContent = "Generate to see the answers.";
}

function toggleMix() {
  element("mix").hidden = !frames.some((frame) => frame.model.value === MIX);
}

async function connect() {
  try {
    offerModels((await (await ask("v1/models")).json()).data);
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
element("reseed").addEventListener("click", () => (element("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]));
element("stop").addEventListener("click", () => running?.abort());
element("key").addEventListener("change", connect);
for (const frame of frames) {
  frame.model.addEventListener("change", () => {
    running?.abort();
    forget(frame);
    toggleMix();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate();
  if (event.key === "Escape") running?.abort();
});
connect();
